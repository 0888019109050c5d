// Visits: a similarity, and the match that it gives.
#include "cpu/network.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <numeric>

#include "cpu/common.h"
#include "cpu/term_table.h"
#include "cpu/unions.h"

namespace mudsc {

// Memory for one similarity, kept from visit to visit: fresh pages cost as much as the work on a small one.
class Network::Arena {
  public:
    void* room(int64_t bytes) {
        if (bytes > bytes_) bytes_ = memory_.allocate(bytes) ? bytes : 0;
        return bytes_ >= bytes ? memory_.get() : nullptr;
    }

  private:
    Buffer<char> memory_;
    int64_t bytes_ = 0;
};

Status Network::similarity(const KernelTable& table, int space, bool full, bool bound, double balance, int threads,
                           Poll poll, Arena& arena, Similar& result) {
    const NetworkSpace& about = layout_->spaces[static_cast<size_t>(space)];
    const int64_t models = layout_->models, n = about.width;
    const CovarianceState* seen = options_.activations[static_cast<size_t>(space)];
    std::vector<TermTable> tables;
    std::vector<SimilarityTerm> terms;
    bool wide = false;
    if (balance > 0) {
        if (!about.supported) return Status::unsupported;
        const std::vector<NetworkTerm>& own = layout_->terms[static_cast<size_t>(space)];
        tables.reserve(own.size() * static_cast<size_t>(models));
        for (const NetworkTerm& term : own) {
            for (int64_t m = 0; m < models; ++m) {
                const NetworkView& view = term.views[static_cast<size_t>(m)];
                std::vector<LabelledAxes> labelled;
                for (const auto& [dims, map] : term.axes) {
                    const Mapped& goes_to = mapped(map);
                    if (!goes_to.usable) return Status::unsupported;
                    if (!goes_to.labelled) continue;
                    const int64_t positions = layout_->maps[static_cast<size_t>(map)].positions;
                    labelled.push_back({dims, goes_to.labels.data() + m * positions, goes_to.size,
                                        goes_to.scale.empty() ? nullptr : goes_to.scale.data()});
                }
                tables.emplace_back(view.shape.data(), view.strides.data(), static_cast<int>(view.shape.size()),
                                    term.unit_dims, labelled);
                SimilarityTerm entry{};
                entry.dtype = view.dtype;
                const int64_t bytes = view.dtype == Dtype::f64 ? 8 : view.dtype == Dtype::f32 ? 4 : 2;
                entry.data = static_cast<const char*>(data_[static_cast<size_t>(view.tensor)]) + view.offset * bytes;
                tables.back().fill(entry);
                terms.push_back(entry);
                wide |= view.dtype == Dtype::f64;
            }
        }
    }
    // With nothing else to compare, activations count whatever the balance.
    if (balance >= 1 && !terms.empty()) seen = nullptr;
    if (terms.empty() && seen == nullptr) return Status::unsupported;
    wide |= seen != nullptr && seen->dtype == Dtype::f64;
    const int64_t row = full ? zip_stride(models * n) : n;
    const int64_t size = full ? models * n * row : (models - 1) * n * n;
    SimilarityArgs a{};
    a.dtype = wide ? Dtype::f64 : Dtype::f32;
    a.n = n;
    a.models = models;
    a.cross = !full;
    a.terms = terms.data();
    a.term_count = static_cast<int64_t>(terms.size()) / models;
    a.balance = balance;
    a.activation = seen;
    a.out = arena.room(size * (wide ? 8 : 4));
    if (a.out == nullptr) return Status::no_memory;
    int64_t bad = -1;
    a.bad_term = &bad;
    a.threads = threads;
    a.poll = poll;
    a.row_stride = full ? row : 0;
    a.bound = &bound;
    // Entries of merged units shrink as they do in a zip, up to the one that joins the last model's unit.
    a.bound_margin = std::pow(options_.attenuation, static_cast<double>(models - 2));
    const Status status = table.similarity(a);
    result = {a.dtype, a.out, n, row, full ? n : n * n, full, bound};
    return status;
}

namespace {

std::vector<int64_t> identity_labels(int64_t models, int64_t n) {
    std::vector<int64_t> labels(static_cast<size_t>(models * n));
    for (int64_t m = 0; m < models; ++m) std::iota(labels.begin() + m * n, labels.begin() + (m + 1) * n, int64_t{0});
    return labels;
}

double entry(Dtype dtype, const void* data, int64_t at) {
    return dtype == Dtype::f64 ? static_cast<const double*>(data)[at]
                               : static_cast<double>(static_cast<const float*>(data)[at]);
}

const void* moved(Dtype dtype, const void* data, int64_t by) {
    return static_cast<const char*>(data) + by * (dtype == Dtype::f64 ? 8 : 4);
}

// Results of a batch of assignments.
struct Assigned {
    std::vector<int64_t> indices;  // [problems, n]
    std::vector<double> value, gap, u, v;

    Status run(const KernelTable& table, AssignArgs a) {
        const int64_t problems = a.shape[0] * a.shape[1];
        indices.resize(static_cast<size_t>(problems * a.n));
        value.resize(static_cast<size_t>(problems));
        gap.resize(value.size());
        u.resize(indices.size());
        v.resize(indices.size());
        a.indices = indices.data();
        a.value = value.data();
        a.gap = gap.data();
        a.u = u.data();
        a.v = v.data();
        return table.assign(a);
    }
};

}  // namespace

Status Network::assign_whole(const KernelTable& table, int space, const Similar& s, int threads, Poll poll,
                             NetworkMatch& found) {
    const int64_t models = layout_->models, n = s.n;
    std::vector<double>& duals = duals_[static_cast<size_t>(space)];
    AssignArgs a{};
    a.dtype = s.dtype;
    a.similarity = s.data;
    a.shape[0] = 1;
    a.shape[1] = models - 1;
    a.strides[1] = s.model_stride;
    a.n = n;
    a.row_stride = s.row_stride;
    a.col_stride = 1;
    // The last duals are nearly feasible for a similarity that changed a little.
    a.start = duals.empty() ? nullptr : duals.data();
    a.threads = threads;
    a.poll = poll;
    Assigned result;
    const Status status = result.run(table, a);
    if (status != Status::ok) return status;
    duals.resize(static_cast<size_t>((models - 1) * 2 * n));
    found.labels = identity_labels(models, n);
    found.value = 0;
    for (int64_t m = 0; m + 1 < models; ++m) {
        std::copy_n(result.u.begin() + m * n, n, duals.begin() + 2 * m * n);
        std::copy_n(result.v.begin() + m * n, n, duals.begin() + (2 * m + 1) * n);
        for (int64_t i = 0; i < n; ++i)
            found.labels[static_cast<size_t>((m + 1) * n + result.indices[static_cast<size_t>(m * n + i)])] = i;
        found.value += result.value[static_cast<size_t>(m)];
    }
    found.value /= static_cast<double>(models - 1);
    return Status::ok;
}

// One pairing of blocks for all spaces of the tie, by the sum of their scores; then each its own match inside.
Status Network::match_blocks(const KernelTable& table, const std::vector<int>& tie, const std::vector<Similar>& similar,
                             int threads, Poll poll, std::vector<NetworkMatch>& found) {
    const int64_t pairs = layout_->models - 1, blocks = layout_->spaces[static_cast<size_t>(tie[0])].blocks;
    const auto cross = [&](const Similar& s, int64_t m) {  // the block (model 0, model m + 1)
        return moved(s.dtype, s.data, s.full ? (m + 1) * s.model_stride : m * s.model_stride);
    };
    std::vector<double> total(static_cast<size_t>(pairs * blocks * blocks), 0.0);
    std::vector<std::vector<Assigned>> inside(tie.size());
    for (size_t k = 0; k < tie.size(); ++k) {
        const Similar& s = similar[k];
        const int64_t each = s.n / blocks;
        for (int64_t m = 0; m < pairs; ++m) {
            double* scores = total.data() + m * blocks * blocks;
            if (layout_->spaces[static_cast<size_t>(tie[k])].fixed) {
                for (int64_t b = 0; b < blocks * blocks; ++b) {
                    double sum = 0;
                    const int64_t first = b / blocks * each * s.row_stride + b % blocks * each;
                    for (int64_t i = 0; i < each; ++i)
                        sum += entry(s.dtype, cross(s, m), first + i * (s.row_stride + 1));
                    if (!std::isfinite(sum)) return Status::not_finite;
                    scores[b] += sum / static_cast<double>(each);
                }
                continue;
            }
            AssignArgs a{};
            a.dtype = s.dtype;
            a.similarity = cross(s, m);
            a.shape[0] = a.shape[1] = blocks;
            a.strides[0] = each * s.row_stride;
            a.strides[1] = each;
            a.n = each;
            a.row_stride = s.row_stride;
            a.col_stride = 1;
            a.threads = threads;
            a.poll = poll;
            const Status status = inside[k].emplace_back().run(table, a);
            if (status != Status::ok) return status;
            for (int64_t b = 0; b < blocks * blocks; ++b) scores[b] += inside[k].back().value[static_cast<size_t>(b)];
        }
    }
    AssignArgs a{};
    a.dtype = Dtype::f64;
    a.similarity = total.data();
    a.shape[0] = 1;
    a.shape[1] = pairs;
    a.strides[1] = blocks * blocks;
    a.n = a.row_stride = blocks;
    a.col_stride = 1;
    a.threads = threads;
    a.poll = poll;
    Assigned between;
    const Status status = between.run(table, a);
    if (status != Status::ok) return status;
    for (size_t k = 0; k < tie.size(); ++k) {
        const Similar& s = similar[k];
        if (!aligned(tie[k])) {
            std::vector<int64_t> pairing(static_cast<size_t>(blocks));
            std::iota(pairing.begin(), pairing.end(), int64_t{0});
            pairing.insert(pairing.end(), between.indices.begin(), between.indices.end());
            const Status zipped = zip_units(table, tie[k], s, pairing, threads, poll, found[k]);
            if (zipped != Status::ok) return zipped;
            continue;
        }
        const int64_t each = s.n / blocks;
        found[k].labels = identity_labels(layout_->models, s.n);
        found[k].value = 0;
        for (int64_t m = 0; m < pairs; ++m) {
            double taken = 0;
            for (int64_t i = 0; i < s.n; ++i) {
                const int64_t b = i / each, partner = between.indices[static_cast<size_t>(m * blocks + b)];
                const int64_t place = inside[k].empty()
                                          ? i % each
                                          : inside[k][static_cast<size_t>(m)]
                                                .indices[static_cast<size_t>((b * blocks + partner) * each + i % each)];
                const int64_t column = partner * each + place;
                found[k].labels[static_cast<size_t>((m + 1) * s.n + column)] = i;
                taken += entry(s.dtype, cross(s, m), i * s.row_stride + column);
            }
            found[k].value += taken / static_cast<double>(s.n);
        }
        found[k].value /= static_cast<double>(pairs);
    }
    return Status::ok;
}

// pairing: [models, blocks], model 0's in order; empty: one block.
Status Network::zip_units(const KernelTable& table, int space, const Similar& s, const std::vector<int64_t>& pairing,
                          int threads, Poll poll, NetworkMatch& found) const {
    const int64_t models = layout_->models, d = s.n, width = options_.widths[static_cast<size_t>(space)];
    const int64_t blocks = pairing.empty() ? 1 : layout_->spaces[static_cast<size_t>(space)].blocks;
    if (width < 1 || width % blocks != 0 || width > models * d) return Status::unsupported;
    const int64_t to_remove = models * d - width, each = d / blocks, n = models * each;
    const double share = static_cast<double>(to_remove / models) * options_.budget + 1e-4;
    std::vector<int64_t> budget(static_cast<size_t>(models), static_cast<int64_t>(std::min(share, 4e18)));
    std::vector<int64_t> units(static_cast<size_t>(models * d)), owner(units.size()), number(static_cast<size_t>(n));
    std::vector<int32_t> model_of(units.size());
    for (int64_t k = 0; k < blocks; ++k) {
        for (int64_t m = 0; m < models; ++m) {
            const int64_t block = pairing.empty() ? 0 : pairing[static_cast<size_t>(m * blocks + k)];
            for (int64_t i = 0; i < each; ++i) {
                const auto at = static_cast<size_t>(k * n + m * each + i);
                units[at] = m * d + block * each + i;
                model_of[at] = static_cast<int32_t>(m);
            }
        }
    }
    ZipUnions all{};
    all.each.dtype = s.dtype;
    all.each.similarity = s.data;
    all.each.row_stride = s.row_stride;
    all.each.col_stride = 1;
    all.each.n = n;
    all.each.models = static_cast<int>(models);
    all.each.merges = n - width / blocks;
    all.each.attenuation = options_.attenuation;
    all.each.in_place = pairing.empty();
    all.each.threads = threads;
    all.each.poll = poll;
    all.count = blocks;
    all.units = units.data();
    all.model_of = model_of.data();
    all.owner = owner.data();
    all.budget = budget.data();
    all.block_budget = blocks == 1 ? to_remove : to_remove / (models * blocks);
    const Status status = zip_unions(table, all);
    if (status != Status::ok) return status;
    found.labels.assign(static_cast<size_t>(models * d), 0);
    double sum = 0;
    for (int64_t k = 0; k < blocks; ++k) {
        // A unit joins one before it, so the first of each merged unit is reached by rising order.
        const int64_t* joined = owner.data() + k * n;
        int64_t next = k * (width / blocks);
        for (int64_t i = 0; i < n; ++i) {
            const auto at = static_cast<size_t>(i);
            number[at] = joined[i] == i ? next++ : number[static_cast<size_t>(joined[i])];
            found.labels[static_cast<size_t>(units[static_cast<size_t>(k * n + i)])] = number[at];
        }
        sum += all.total[static_cast<size_t>(k)];
    }
    found.value = to_remove > 0 ? sum / static_cast<double>(to_remove) : 0.0;
    return Status::ok;
}

// A zip that joins no two units of one model took entries between models alone (rule 5: an entry of merged units is a
// minimum of those of their members, times the attenuation). So the products inside models, half of all, are first
// replaced by upper bounds, which are quicker to find: if even so it joins none, it is the zip of the similarity
// itself, because at each step that has the same entry, no larger one, and of equal ones none before it. What the
// space's last match joined tells whether that is worth a try.
bool Network::worth_bounds(int space, double balance) const {
    const auto at = static_cast<size_t>(space);
    if (aligned(space) || needs_all_[at] != 0 || balance <= 0) return false;
    const std::vector<int64_t>& last = states_[at].labels;
    return !last.empty() && !joins_inside(space, last);
}

// Whether two units of one model have one label.
bool Network::joins_inside(int space, const std::vector<int64_t>& labels) const {
    const int64_t width = layout_->spaces[static_cast<size_t>(space)].width;
    std::vector<int64_t> model_of(labels.size(), -1);  // by label: the last model with a unit of it
    for (size_t k = 0; k < labels.size(); ++k) {
        int64_t& last = model_of[static_cast<size_t>(labels[k])];
        const int64_t model = static_cast<int64_t>(k) / width;
        if (last == model) return true;
        last = model;
    }
    return false;
}

Status Network::visit(const KernelTable& table, const std::vector<std::vector<int>>& ties, double balance, int threads,
                      int64_t milliseconds, Poll poll, std::vector<std::vector<NetworkMatch>>& found) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(milliseconds);
    for (const std::vector<int>& tie : ties) {
        std::vector<NetworkMatch> matches;
        const Status status = visit_tie(table, tie, balance, threads, poll, matches);
        if (status != Status::ok) return status;
        for (size_t k = 0; k < tie.size(); ++k) {
            const auto space = static_cast<size_t>(tie[k]);
            matches[k].changed = matches[k].labels != states_[space].labels;
            if (!matches[k].changed) continue;
            const int64_t width = layout_->spaces[space].width;
            set_labels(tie[k], matches[k].labels.data(), aligned(tie[k]) ? width : options_.widths[space]);
        }
        found.push_back(std::move(matches));
        if (std::chrono::steady_clock::now() >= end) break;
    }
    return Status::ok;
}

namespace {

// Matches that are kept of a tie. After a sweep that did not help, the labels go back to the best ones, and the sweeps
// of a settling match meet few different neighbours.
constexpr size_t kRemembered = 4;

}  // namespace

Status Network::visit_tie(const KernelTable& table, const std::vector<int>& tie, double balance, int threads, Poll poll,
                          std::vector<NetworkMatch>& found) {
    std::vector<Visited>& known = visited_[static_cast<size_t>(tie[0])];
    std::vector<Digest> near;
    if (balance > 0) {
        for (const int space : tie) {
            for (const int other : layout_->spaces[static_cast<size_t>(space)].near)
                near.push_back(states_[static_cast<size_t>(other)].digest);
        }
        for (size_t k = 0; k < known.size(); ++k) {
            if (known[k].near != near) continue;
            std::rotate(known.begin() + static_cast<std::ptrdiff_t>(k),
                        known.begin() + static_cast<std::ptrdiff_t>(k) + 1, known.end());
            found = known.back().found;
            return Status::ok;
        }
    }
    ++matched_;
    bool again = false;
    Status status = visit_once(table, tie, balance, threads, poll, found, &again);
    if (again) status = visit_once(table, tie, balance, threads, poll, found, &again);
    if (status != Status::ok || balance <= 0) return status;
    if (known.size() == kRemembered) known.erase(known.begin());
    known.push_back({std::move(near), found});
    return Status::ok;
}

std::pair<int64_t, int64_t> Network::matched() const {
    size_t most = 0;
    for (const std::vector<Visited>& known : visited_) most = std::max(most, known.size());
    return {matched_, static_cast<int64_t>(most)};
}

// again: out: bounds did not tell, so that all entries are needed; they are not bounded a second time.
Status Network::visit_once(const KernelTable& table, const std::vector<int>& tie, double balance, int threads,
                           Poll poll, std::vector<NetworkMatch>& found, bool* again) {
    *again = false;
    std::vector<Similar> similar(tie.size());
    while (arenas_.size() < tie.size()) arenas_.push_back(std::make_shared<Arena>());
    for (size_t k = 0; k < tie.size(); ++k) {
        const Status status = similarity(table, tie[k], !aligned(tie[k]), worth_bounds(tie[k], balance), balance,
                                         threads, poll, *arenas_[k], similar[k]);
        if (status != Status::ok) return status;
    }
    found.resize(tie.size());
    const NetworkSpace& first = layout_->spaces[static_cast<size_t>(tie[0])];
    Status status;
    if (tie.size() > 1 || first.blocks > 1 || first.fixed) {
        status = match_blocks(table, tie, similar, threads, poll, found);
    } else if (aligned(tie[0])) {
        status = assign_whole(table, tie[0], similar[0], threads, poll, found[0]);
    } else {
        status = zip_units(table, tie[0], similar[0], {}, threads, poll, found[0]);
    }
    if (status != Status::ok && status != Status::infeasible) return status;
    bool bounded = false;
    for (size_t k = 0; k < tie.size(); ++k) {
        if (!similar[k].bound) continue;
        bounded = true;
        if (status == Status::ok && !joins_inside(tie[k], found[k].labels)) continue;
        needs_all_[static_cast<size_t>(tie[k])] = 1;
        *again = true;
    }
    if (bounded) ++(*again ? bounded_.second : bounded_.first);
    return status;
}

}  // namespace mudsc
