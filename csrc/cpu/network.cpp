// What is known of a network while it is matched, and its merged tensors.
#include "cpu/network.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace mudsc {

Network::Network(std::shared_ptr<const NetworkLayout> layout, std::vector<const void*> data, NetworkOptions options)
    : layout_(std::move(layout)),
      data_(std::move(data)),
      options_(std::move(options)),
      states_(layout_->spaces.size()),
      mapped_(layout_->maps.size()),
      duals_(layout_->spaces.size()),
      needs_all_(layout_->spaces.size(), 0),
      visited_(layout_->spaces.size()) {}

bool Network::aligned(int space) const { return !options_.zip || layout_->spaces[static_cast<size_t>(space)].fixed; }

void Network::set_labels(int space, const int64_t* labels, int64_t merged) {
    const NetworkSpace& about = layout_->spaces[static_cast<size_t>(space)];
    State& state = states_[static_cast<size_t>(space)];
    std::vector<int64_t> given;
    if (labels != nullptr) given.assign(labels, labels + layout_->models * about.width);
    if (given == state.labels && merged == state.merged) return;
    state.version = next_version_++;
    state.merged = merged;
    state.labels.swap(given);
    state.digest = digest_of(state.labels);
    state.blocks.clear();
    if (state.labels.empty()) return;
    state.keeps_blocks = merged > 0 && merged % about.blocks == 0;
    for (int64_t label : state.labels) state.keeps_blocks &= label >= 0 && label < merged;
    if (!state.keeps_blocks) return;
    const int64_t each = about.width / about.blocks, inner = merged / about.blocks;
    for (int64_t b = 0; b < layout_->models * about.blocks; ++b) {
        const int64_t goes_to = state.labels[static_cast<size_t>(b * each)] / inner;
        for (int64_t i = 1; i < each; ++i)
            state.keeps_blocks &= state.labels[static_cast<size_t>(b * each + i)] / inner == goes_to;
        state.blocks.push_back(goes_to);
    }
}

// Sixteen bytes that tell labels apart. Each number goes through a product and a shift in two ways.
Network::Digest Network::digest_of(const std::vector<int64_t>& labels) {
    if (labels.empty()) return {};
    uint64_t a = labels.size(), b = ~a;
    for (const int64_t label : labels) {
        const auto x = static_cast<uint64_t>(label);
        a = (a ^ x) * 0x9e3779b97f4a7c15u;
        a ^= a >> 32;
        b = (b ^ x) * 0xd1342543de82ef95u;
        b ^= b >> 29;
    }
    return {a, b};
}

const Network::Mapped& Network::mapped(int map) {
    const NetworkMap& about = layout_->maps[static_cast<size_t>(map)];
    Mapped& result = mapped_[static_cast<size_t>(map)];
    std::vector<int64_t> versions;
    for (const MapPiece& piece : about.pieces)
        for (const MapMember& m : piece.members) versions.push_back(states_[static_cast<size_t>(m.space)].version);
    if (!result.known || versions != result.versions) {
        result.versions = std::move(versions);
        result.known = true;
        evaluate(about, result);
    }
    return result;
}

// Whether one space is the whole axis, in order: then its labels are the axis's, whatever the merged width.
bool Network::is_whole(const NetworkMap& map) const {
    if (map.pieces.size() != 1 || map.pieces[0].members.size() != 1) return false;
    const MapPiece& piece = map.pieces[0];
    const MapMember& m = piece.members[0];
    return m.block.empty() && m.inner.size() == piece.factors.size() &&
           std::is_sorted(m.inner.begin(), m.inner.end()) && piece.start == 0 && piece.runs == 1 &&
           layout_->spaces[static_cast<size_t>(m.space)].width == map.positions;
}

void Network::evaluate(const NetworkMap& map, Mapped& result) const {
    const bool whole = is_whole(map);
    result.labelled = result.counted = false;
    result.usable = true;
    result.scale.clear();
    result.size = map.positions;
    for (const MapPiece& piece : map.pieces) {
        for (const MapMember& m : piece.members) {
            const State& state = states_[static_cast<size_t>(m.space)];
            if (state.labels.empty()) continue;
            result.labelled = true;
            result.usable &= state.keeps_blocks;
            if (state.merged == layout_->spaces[static_cast<size_t>(m.space)].width) continue;
            result.usable &= whole;
            result.size = state.merged;
        }
    }
    if (!result.labelled || !result.usable) return;
    const int64_t models = layout_->models;
    if (whole) {
        result.labels = states_[static_cast<size_t>(map.pieces[0].members[0].space)].labels;
    } else {
        result.labels.resize(static_cast<size_t>(models * map.positions));
        for (int64_t m = 0; m < models; ++m) {
            int64_t* labels = result.labels.data() + m * map.positions;
            std::iota(labels, labels + map.positions, int64_t{0});
            for (const MapPiece& piece : map.pieces) result.usable &= move_piece(piece, m, labels);
        }
    }
    if (!map.in || !result.usable) return;
    std::vector<int64_t> members(static_cast<size_t>(result.size), 0);
    for (int64_t label : result.labels) ++members[static_cast<size_t>(label)];
    for (int64_t count : members)
        result.scale.push_back(count > 0 ? static_cast<double>(models) / static_cast<double>(count) : 0.0);
}

// Tied spaces move a block factor they share once, then each its own units inside. Returns false if they disagree.
bool Network::move_piece(const MapPiece& piece, int64_t model, int64_t* labels) const {
    const size_t factors = piece.factors.size();
    int64_t total = 1;
    for (int64_t f : piece.factors) total *= f;
    for (size_t a = 0; a < piece.members.size(); ++a) {
        for (size_t b = 0; b < a; ++b) {
            const MapMember &one = piece.members[a], &other = piece.members[b];
            const State &mine = states_[static_cast<size_t>(one.space)],
                        &theirs = states_[static_cast<size_t>(other.space)];
            if (one.block.empty() || one.block != other.block || mine.labels.empty() || theirs.labels.empty()) continue;
            if (mine.blocks != theirs.blocks) return false;
        }
    }
    const auto position = [&](int64_t q) { return piece.start + q / piece.length * piece.period + q % piece.length; };
    std::vector<int64_t> at(factors, 0), to(factors);
    for (int64_t q = 0; q < total; ++q) {
        to = at;
        for (const MapMember& m : piece.members) {
            const State& state = states_[static_cast<size_t>(m.space)];
            if (state.labels.empty()) continue;
            const NetworkSpace& about = layout_->spaces[static_cast<size_t>(m.space)];
            int64_t block = 0, inner = 0;
            for (int f : m.block) block = block * piece.factors[static_cast<size_t>(f)] + at[static_cast<size_t>(f)];
            for (int f : m.inner) inner = inner * piece.factors[static_cast<size_t>(f)] + at[static_cast<size_t>(f)];
            const int64_t each = about.width / about.blocks;
            const int64_t label = state.labels[static_cast<size_t>(model * about.width + block * each + inner)];
            int64_t goes_to = label / each, place = label % each;
            for (size_t k = m.block.size(); k-- > 0;) {
                const size_t f = static_cast<size_t>(m.block[k]);
                to[f] = goes_to % piece.factors[f];
                goes_to /= piece.factors[f];
            }
            for (size_t k = m.inner.size(); k-- > 0;) {
                const size_t f = static_cast<size_t>(m.inner[k]);
                to[f] = place % piece.factors[f];
                place /= piece.factors[f];
            }
        }
        int64_t local = 0;
        for (size_t f = 0; f < factors; ++f) local = local * piece.factors[f] + to[f];
        labels[position(q)] = position(local);
        for (size_t f = factors; f-- > 0;) {
            if (++at[f] < piece.factors[f]) break;
            at[f] = 0;
        }
    }
    return true;
}

void Network::find_members(Mapped& goes_to, int64_t positions) const {
    const int64_t models = layout_->models, size = goes_to.size;
    if (goes_to.counted) return;
    goes_to.counted = true;
    goes_to.several = false;
    bool stays = size == positions;
    for (size_t k = 0; stays && k < goes_to.labels.size(); ++k)
        stays = goes_to.labels[k] == static_cast<int64_t>(k) % positions;
    goes_to.ptr.clear();
    if (stays) return;
    goes_to.ptr.assign(static_cast<size_t>(models * (size + 1)), 0);
    goes_to.members.resize(static_cast<size_t>(models * positions));
    goes_to.single.assign(static_cast<size_t>(models), 1);
    for (int64_t m = 0; m < models; ++m) {
        const int64_t* labels = goes_to.labels.data() + m * positions;
        int64_t *ptr = goes_to.ptr.data() + m * (size + 1), *members = goes_to.members.data() + m * positions;
        for (int64_t i = 0; i < positions; ++i) ++ptr[labels[i] + 1];
        for (int64_t j = 0; j < size; ++j) {
            if (ptr[j + 1] != 1) goes_to.single[static_cast<size_t>(m)] = 0;
            ptr[j + 1] += ptr[j];
        }
        goes_to.several |= goes_to.single[static_cast<size_t>(m)] == 0;
        std::vector<int64_t> next(ptr, ptr + size);
        bool in_order = size == positions;
        for (int64_t i = 0; i < positions; ++i) {
            members[next[static_cast<size_t>(labels[i])]++] = i;
            in_order &= labels[i] == i;
        }
        if (in_order) goes_to.single[static_cast<size_t>(m)] = kInOrder;
    }
}

std::vector<Status> Network::merge(const KernelTable& table, const std::vector<double>& shares, size_t first,
                                   const std::vector<void*>& outs, int threads, Poll poll) {
    const int64_t models = layout_->models;
    for (size_t k = 0; k < layout_->maps.size(); ++k) {
        mapped(static_cast<int>(k));
        if (mapped_[k].labelled && mapped_[k].usable) find_members(mapped_[k], layout_->maps[k].positions);
    }
    std::vector<Status> found;
    for (size_t k = 0; k < outs.size(); ++k) {
        const NetworkTensor& tensor = layout_->tensors[first + k];
        MergeArgs a{};
        bool usable = true;
        const auto axis = [&](int map, int64_t positions) {
            MergeAxis result{positions, positions, false, nullptr, nullptr, nullptr};
            if (map < 0) return result;
            const Mapped& goes_to = mapped_[static_cast<size_t>(map)];
            usable &= goes_to.usable && (!goes_to.labelled || goes_to.size == positions);
            if (!goes_to.labelled || goes_to.ptr.empty()) return result;
            // One member in every model needs no scale.
            result.out = goes_to.several && !layout_->maps[static_cast<size_t>(map)].in;
            result.ptr = goes_to.ptr.data();
            result.members = goes_to.members.data();
            result.single = goes_to.single.data();
            return result;
        };
        a.first = axis(tensor.first_map, tensor.first);
        a.second = axis(tensor.second_map, tensor.second);
        if (!usable) {
            found.push_back(Status::unsupported);
            continue;
        }
        a.dtype = tensor.dtype;
        a.models = models;
        a.outer = tensor.outer;
        a.middle = tensor.middle;
        a.inner = tensor.inner;
        a.data = data_.data() + (first + k) * static_cast<size_t>(models);
        a.shares = shares.data();
        a.out = outs[k];
        a.threads = threads;
        a.poll = poll;
        found.push_back(table.merge(a));
        if (found.back() == Status::interrupted) break;
    }
    return found;
}

}  // namespace mudsc
