// A network as integers: made once from Python's description, then visited with one call a tie of spaces.
#include "cpu/network.h"

#include <array>
#include <memory>
#include <tuple>

#include "bindings/arguments.h"
#include "bindings/covariance.h"

namespace mudsc::bindings {

namespace {

using SpaceTuple = std::tuple<int64_t, int64_t, bool, bool, std::vector<int>>;
using MemberTuple = std::tuple<int, std::vector<int>, std::vector<int>>;
using PieceTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, std::vector<int64_t>, std::vector<MemberTuple>>;
using MapTuple = std::tuple<int64_t, bool, std::vector<PieceTuple>>;
using ViewTuple = std::tuple<std::string, int64_t, int64_t, std::vector<int64_t>, std::vector<int64_t>>;
using TensorTuple = std::tuple<std::string, std::array<int64_t, 5>, int, int>;
using TermTuple = std::tuple<std::vector<int>, std::vector<std::pair<std::vector<int>, int>>, std::vector<ViewTuple>>;

Dtype float_type(const std::string& name) {
    if (name == "float64") return Dtype::f64;
    if (name == "float32") return Dtype::f32;
    if (name == "float16") return Dtype::f16;
    require(name == "bfloat16", "terms: expected a floating type");
    return Dtype::bf16;
}

// What guards memory: indices of spaces, maps and dims, and factors that stay inside their axis.
NetworkMap checked_map(const MapTuple& tuple, const std::vector<NetworkSpace>& spaces) {
    NetworkMap map{std::get<0>(tuple), std::get<1>(tuple), {}};
    for (const auto& [start, runs, period, length, factors, members] : std::get<2>(tuple)) {
        int64_t total = 1;
        for (int64_t f : factors) total *= f;
        require(length > 0 && runs * length == total && start >= 0 && period >= 0 &&
                    start + (runs - 1) * period + length <= map.positions,
                "maps: a piece goes past its axis");
        MapPiece piece{start, runs, period, length, factors, {}};
        for (const auto& [space, block, inner] : members) {
            require(space >= 0 && space < static_cast<int>(spaces.size()), "maps: no such space");
            const auto product = [&](const std::vector<int>& at) {
                int64_t size = 1;
                for (int f : at) {
                    require(f >= 0 && f < static_cast<int>(factors.size()), "maps: no such factor");
                    size *= factors[static_cast<size_t>(f)];
                }
                return size;
            };
            const NetworkSpace& about = spaces[static_cast<size_t>(space)];
            require(product(block) * product(inner) == about.width &&
                        (block.empty() ? about.blocks == 1 : product(block) == about.blocks),
                    "maps: another number of units");
            piece.members.push_back({space, block, inner});
        }
        map.pieces.push_back(std::move(piece));
    }
    return map;
}

NetworkTerm checked_term(const TermTuple& tuple, const NetworkLayout& layout, int64_t units) {
    NetworkTerm term{std::get<0>(tuple), std::get<1>(tuple), {}};
    require(static_cast<int64_t>(std::get<2>(tuple).size()) == layout.models, "terms: expected one view a model");
    for (const auto& [dtype, tensor, offset, shape, strides] : std::get<2>(tuple)) {
        require(shape.size() == strides.size() && shape.size() <= kMaxDims && tensor >= 0 && offset >= 0,
                "terms: a view out of range");
        std::vector<char> used(shape.size(), 0);
        const auto product = [&](const std::vector<int>& dims) {
            int64_t size = 1;
            for (int d : dims) {
                require(d >= 0 && d < static_cast<int>(shape.size()) && used[static_cast<size_t>(d)] == 0,
                        "terms: dims out of range or named twice");
                used[static_cast<size_t>(d)] = 1;
                size *= shape[static_cast<size_t>(d)];
            }
            return size;
        };
        require(product(term.unit_dims) == units, "terms: another number of units");
        for (const auto& [dims, map] : term.axes) {
            require(map >= 0 && map < static_cast<int>(layout.maps.size()), "terms: no such map");
            require(product(dims) == layout.maps[static_cast<size_t>(map)].positions, "terms: a map of another length");
        }
        require(term.views.empty() || shape == term.views[0].shape, "terms: models differ in shape");
        term.views.push_back({float_type(dtype), tensor, offset, shape, strides});
    }
    return term;
}

std::shared_ptr<NetworkLayout> make_layout(int64_t models, const std::vector<SpaceTuple>& spaces,
                                           const std::vector<MapTuple>& maps,
                                           const std::vector<std::vector<TermTuple>>& terms,
                                           const std::vector<TensorTuple>& tensors) {
    require(models > 1 && models <= kMaxModels && terms.size() == spaces.size(), "network: sizes out of range");
    auto layout = std::make_shared<NetworkLayout>();
    layout->models = models;
    for (const auto& [width, blocks, fixed, supported, near] : spaces) {
        require(width > 0 && blocks > 0 && width % blocks == 0, "spaces: blocks must divide the width");
        for (int space : near)
            require(space >= 0 && space < static_cast<int>(spaces.size()), "spaces: no such neighbour");
        layout->spaces.push_back({width, blocks, fixed, supported, near});
    }
    for (const MapTuple& map : maps) layout->maps.push_back(checked_map(map, layout->spaces));
    for (size_t s = 0; s < terms.size(); ++s) {
        auto& own = layout->terms.emplace_back();
        for (const TermTuple& term : terms[s]) own.push_back(checked_term(term, *layout, layout->spaces[s].width));
    }
    for (const auto& [dtype, sizes, first, second] : tensors) {
        const auto fits = [&](int map, int64_t positions) {
            return map == -1 || (map >= 0 && map < static_cast<int>(layout->maps.size()) &&
                                 layout->maps[static_cast<size_t>(map)].positions == positions);
        };
        require(fits(first, sizes[1]) && fits(second, sizes[3]), "tensors: a map of another length");
        layout->tensors.push_back({float_type(dtype), sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], first, second});
    }
    return layout;
}

std::unique_ptr<Network> make_network(const std::shared_ptr<NetworkLayout>& layout,
                                      const std::vector<uintptr_t>& pointers, bool zip, std::vector<int64_t> widths,
                                      double attenuation, double budget,
                                      const std::vector<const CovarianceBuffers*>& activations) {
    const size_t spaces = layout->spaces.size();
    require(widths.size() == spaces && activations.size() == spaces, "network: expected one a space");
    std::vector<const CovarianceState*> seen;
    for (size_t s = 0; s < spaces; ++s) {
        const CovarianceState* state = activations[s] == nullptr ? nullptr : &activations[s]->state();
        const bool full = zip && !layout->spaces[s].fixed;
        require(state == nullptr || (state->width == layout->spaces[s].width && state->models == layout->models &&
                                     state->counts[0] > 0 && state->counts[1] == 0 && !(full && state->cross)),
                "activations: another width, number of models or scope, or samples that are pending");
        seen.push_back(state);
    }
    for (const auto& own : layout->terms) {
        for (const NetworkTerm& term : own) {
            for (const NetworkView& view : term.views)
                require(view.tensor < static_cast<int64_t>(pointers.size()), "data: a tensor is missing");
        }
    }
    require(layout->tensors.size() * static_cast<size_t>(layout->models) <= pointers.size(),
            "data: a tensor is missing");
    std::vector<const void*> data;
    for (uintptr_t pointer : pointers) data.push_back(reinterpret_cast<const void*>(pointer));
    return std::make_unique<Network>(layout, std::move(data),
                                     NetworkOptions{zip, std::move(widths), attenuation, budget, std::move(seen)});
}

void set_labels(Network& network, int space, const std::optional<py::object>& labels_obj, int64_t merged) {
    const NetworkLayout& layout = network.layout();
    require(space >= 0 && space < static_cast<int>(layout.spaces.size()), "space: no such one");
    if (!labels_obj) {
        network.set_labels(space, nullptr, 0);
        return;
    }
    TensorArg labels(*labels_obj, "labels");
    const int64_t count = layout.models * layout.spaces[static_cast<size_t>(space)].width;
    network.set_labels(space, flat_of<int64_t>(labels, Dtype::i64, count, "labels"), merged);
}

// For each tie that was visited [(labels as bytes, or None where they are as before, value)] of its spaces. Fewer than
// all where time was over, or where the plain way has to be taken for the next one, for which a last None stands: for
// what this one cannot follow, and for the errors that it makes.
py::list visit(Network& network, const std::vector<std::vector<int>>& ties, double balance, int threads,
               int64_t milliseconds) {
    const int spaces = static_cast<int>(network.layout().spaces.size());
    for (const std::vector<int>& tie : ties) {
        require(!tie.empty(), "ties: expected at least one space in each");
        for (int space : tie) {
            require(space >= 0 && space < spaces &&
                        network.layout().spaces[static_cast<size_t>(space)].blocks ==
                            network.layout().spaces[static_cast<size_t>(tie[0])].blocks,
                    "ties: no such space, or another number of blocks");
        }
    }
    SignalPoll signals;
    std::vector<std::vector<NetworkMatch>> found;
    const Status status = signals.outcome(without_gil([&](const KernelTable& table) {
        return network.visit(table, ties, balance, threads, milliseconds, signals.poll(), found);
    }));
    if (status == Status::interrupted || status == Status::no_memory) check(status, "match");
    py::list result(found.size());
    for (size_t t = 0; t < found.size(); ++t) {
        py::list matches(found[t].size());
        for (size_t k = 0; k < found[t].size(); ++k) {
            const NetworkMatch& match = found[t][k];
            py::object labels = py::none();
            if (match.changed)
                labels = py::bytearray(reinterpret_cast<const char*>(match.labels.data()),
                                       match.labels.size() * sizeof(int64_t));
            matches[k] = py::make_tuple(std::move(labels), match.value);
        }
        result[t] = std::move(matches);
    }
    if (status != Status::ok) result.append(py::none());
    return result;
}

// Writes the merged tensors from `first` on; 0 where one is done, 1 where it is not finite, 2 where the plain way has
// to be taken.
std::vector<int> merge(Network& network, const std::vector<double>& shares, size_t first,
                       const std::vector<uintptr_t>& pointers, int threads) {
    const NetworkLayout& layout = network.layout();
    require(static_cast<int64_t>(shares.size()) == layout.models, "merge: expected a share a model");
    require(first <= layout.tensors.size() && pointers.size() <= layout.tensors.size() - first,
            "merge: no such tensor");
    double total = 0;
    for (double share : shares) total += share;
    require(total > 0, "shares: all vanish");
    std::vector<void*> outs;
    for (uintptr_t pointer : pointers) outs.push_back(reinterpret_cast<void*>(pointer));
    std::vector<Status> found;
    SignalPoll signals;
    const Status done = without_gil([&](const KernelTable& table) {
        found = network.merge(table, shares, first, outs, threads, signals.poll());
        return Status::ok;
    });
    check(signals.outcome(done), "merge");
    std::vector<int> result;
    for (Status status : found) {
        if (status == Status::no_memory) check(status, "merge");
        result.push_back(status == Status::ok ? 0 : status == Status::not_finite ? 1 : 2);
    }
    return result;
}

// What a layout depends on of tensors, type, shape and strides of each, as bytes; and where each begins. None where one
// is not a plain floating tensor on the CPU. With `alike` they come in groups of so many, one tensor of every model,
// and those of a group have to be of one shape and type, dense and not empty.
py::object describe(const py::list& tensors, size_t alike) {
    std::string kinds;
    py::list pointers(tensors.size());
    size_t last = 0;  // where the description of the tensor before begins
    for (size_t k = 0; k < tensors.size(); ++k) {
        py::object tensor = py::reinterpret_borrow<py::object>(tensors[k]);
        if (Torch::is_parameter(tensor)) tensor = tensor.attr("detach")();
        if (!Torch::is_tensor(tensor) || !Torch::is_cpu(tensor) || !Torch::is_strided(tensor) || Torch::is_neg(tensor))
            return py::none();
        if (!Torch::is_float(tensor) || Torch::dim(tensor) > kMaxDims) return py::none();
        const TensorArg view = TensorArg::of_plain(tensor, "tensors");
        const size_t first = kinds.size();
        const auto note = [&](int64_t number) { kinds.append(reinterpret_cast<const char*>(&number), sizeof number); };
        note(static_cast<int64_t>(view->dtype));
        note(view->ndim);
        int64_t dense = 1;
        bool plain = view->numel() > 0;
        for (int d = view->ndim - 1; d >= 0; --d) {
            note(view->shape[d]);
            note(view->strides[d]);
            plain &= view->shape[d] == 1 || view->strides[d] == dense;
            dense *= view->shape[d];
        }
        if (alike > 0 && !plain) return py::none();
        if (alike > 0 && k % alike != 0 && kinds.compare(first, kinds.npos, kinds, last, first - last) != 0)
            return py::none();
        last = first;
        pointers[k] = reinterpret_cast<uintptr_t>(view->data);
    }
    return py::make_tuple(py::bytes(kinds), pointers);
}

// Merged units of labels (models, width): see sound_labels.
int64_t merged_units(const int64_t* label, int64_t models, int64_t width, int64_t blocks, bool align) {
    const int64_t count = models * width;
    if (count == 0 || blocks < 1 || width % blocks != 0) return 0;
    std::vector<int64_t> members(static_cast<size_t>(count), 0);
    int64_t size = 0;
    for (int64_t k = 0; k < count; ++k) {
        if (label[k] < 0 || label[k] >= count) return 0;
        ++members[static_cast<size_t>(label[k])];
        size = std::max(size, label[k] + 1);
        if (align && k < width && label[k] != k) return 0;
    }
    for (int64_t j = 0; j < size; ++j) {
        if (members[static_cast<size_t>(j)] == 0) return 0;
    }
    if (size % blocks != 0) return 0;
    std::vector<int64_t> last(static_cast<size_t>(size), -1);  // the last model that has a unit there
    const int64_t each = width / blocks, inner = size / blocks;
    for (int64_t k = 0; k < count; ++k) {
        if (label[k] / inner != label[k / each * each] / inner) return 0;
        int64_t& seen = last[static_cast<size_t>(label[k])];
        if (align && (seen == k / width || size != width)) return 0;
        seen = k / width;
    }
    return size;
}

// For each space's labels (models, width) the number of merged units if they keep what a plan promises: they are a
// plain tensor of two models or more, every merged unit from 0 on has a member, blocks stay together, and with `align`
// every row is a permutation, the first one in order. 0 where they may not. spaces: (width, blocks) each.
std::vector<int64_t> sound_labels(const py::list& labels, const std::vector<std::pair<int64_t, int64_t>>& spaces,
                                  bool align) {
    require(labels.size() == spaces.size(), "labels: expected one a space");
    std::vector<int64_t> result(spaces.size(), 0);
    for (size_t k = 0; k < spaces.size(); ++k) {
        const py::handle tensor = labels[k];
        if (!Torch::is_tensor(tensor) || !Torch::is_cpu(tensor) || !Torch::is_strided(tensor)) continue;
        if (!Torch::is_int64(tensor)) continue;  // not every type can be looked at more closely
        const TensorArg view(tensor, "labels");
        const auto [width, blocks] = spaces[k];
        if (view->ndim != 2 || view->shape[0] < 2 || view->shape[1] != width) continue;
        const bool plain = view->strides[0] == width && (width == 1 || view->strides[1] == 1);
        if (!plain || reinterpret_cast<uintptr_t>(view->data) % sizeof(int64_t) != 0) continue;
        result[k] = merged_units(view->as<int64_t>(), view->shape[0], width, blocks, align);
    }
    return result;
}

}  // namespace

void bind_network(py::module_& m) {
    m.def("describe", &describe, py::arg("tensors"), py::arg("alike"));
    m.def("sound_labels", &sound_labels, py::arg("labels"), py::arg("spaces"), py::arg("align"));
    py::class_<NetworkLayout, std::shared_ptr<NetworkLayout>>(m, "NetworkLayout")
        .def(py::init(&make_layout), py::arg("models"), py::arg("spaces"), py::arg("maps"), py::arg("terms"),
             py::arg("tensors"));
    py::class_<Network>(m, "Network")
        .def(py::init(&make_network), py::arg("layout"), py::arg("data"), py::arg("zip"), py::arg("widths"),
             py::arg("attenuation"), py::arg("budget"), py::arg("activations"))
        .def("set_labels", &set_labels, py::arg("space"), py::arg("labels"), py::arg("merged"))
        .def("visit", &visit, py::arg("ties"), py::arg("balance"), py::arg("threads"), py::arg("milliseconds"))
        .def("merge", &merge, py::arg("shares"), py::arg("first"), py::arg("outs"), py::arg("threads"))
        .def("bounded", &Network::bounded)
        .def("matched", &Network::matched);
}

}  // namespace mudsc::bindings
