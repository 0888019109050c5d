// A network's spaces and tensors as integers, and the visits of its match (docs/method.md rules 2 to 7), many at a
// call: neighbours' labels, similarities, and the assignment or zip that they give. A small network is matched in less
// time than Python takes to say what its tensors are, so this is said once.
#pragma once

#include <stdint.h>

#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace mudsc {

struct NetworkSpace {
    int64_t width, blocks;
    bool fixed;             // only whole blocks move
    bool supported;         // whether `terms` say all that is compared
    std::vector<int> near;  // spaces whose labels its weights are seen in
};

// One space on a piece of an axis: the common factors that hold its blocks and, in unit order, its units.
struct MapMember {
    int space;
    std::vector<int> block, inner;
};

// Positions start + r * period + [0, length), r < runs, of an axis: row-major over `factors`.
struct MapPiece {
    int64_t start, runs, period, length;
    std::vector<int64_t> factors;
    std::vector<MapMember> members;
};

// Where the positions of some dims of a tensor go when the spaces on them are merged.
struct NetworkMap {
    int64_t positions;
    bool in;  // role "in": merged positions are scaled by models / members
    std::vector<MapPiece> pieces;
};

// One model's tensor as a space sees it.
struct NetworkView {
    Dtype dtype;
    int64_t tensor, offset;  // which pointer, and how many elements behind it
    std::vector<int64_t> shape, strides;
};

struct NetworkTerm {
    std::vector<int> unit_dims;
    std::vector<std::pair<std::vector<int>, int>> axes;  // dims that a map relabels
    std::vector<NetworkView> views;                      // [models]
};

// A tensor that is merged, contiguous: [outer, first, middle, second, inner]; maps -1: the axis stays.
struct NetworkTensor {
    Dtype dtype;
    int64_t outer, first, middle, second, inner;
    int first_map, second_map;
};

struct NetworkLayout {
    int64_t models;
    std::vector<NetworkSpace> spaces;
    std::vector<NetworkMap> maps;
    std::vector<std::vector<NetworkTerm>> terms;  // [spaces]
    std::vector<NetworkTensor> tensors;           // of a merge: model m's data is pointer models * tensor + m
};

struct NetworkOptions {
    bool zip;
    std::vector<int64_t> widths;  // [spaces] merged
    double attenuation, budget;
    std::vector<const CovarianceState*> activations;  // [spaces], null where there are none
};

struct NetworkMatch {
    std::vector<int64_t> labels;  // [models, width]
    double value;
    bool changed = false;  // other labels than before the visit
};

class Network {
  public:
    Network(std::shared_ptr<const NetworkLayout> layout, std::vector<const void*> data, NetworkOptions options);

    // labels: [models, width], or null: not matched yet.
    void set_labels(int space, const int64_t* labels, int64_t merged);

    // Matches the spaces of each tie anew, one tie after another, and takes over their labels, until all are done or
    // `milliseconds` are over. found: the matches of the ties that were visited. Anything but `ok` is that of the first
    // tie that was not, whose labels are as they were; `unsupported` also means labels that this class does not know
    // how to follow. With a balance above 0, always the same one, a tie whose neighbours have the labels of an earlier
    // visit is not matched a second time.
    Status visit(const KernelTable& table, const std::vector<std::vector<int>>& ties, double balance, int threads,
                 int64_t milliseconds, Poll poll, std::vector<std::vector<NetworkMatch>>& found);

    // Merges the tensors from `first` on into `outs` (docs/method.md rule 9), as large as these: ok, not_finite, or
    // unsupported where labels change a width or cannot be followed. Ends behind a tensor that was interrupted.
    std::vector<Status> merge(const KernelTable& table, const std::vector<double>& shares, size_t first,
                              const std::vector<void*>& outs, int threads, Poll poll);

    const NetworkLayout& layout() const { return *layout_; }

    // Visits for which upper bounds were enough, and those for which they were not.
    std::pair<int64_t, int64_t> bounded() const { return bounded_; }

    // Visits in which a tie was matched, and the most matches that are remembered of one.
    std::pair<int64_t, int64_t> matched() const;

  private:
    using Digest = std::array<uint64_t, 2>;
    struct State {
        std::vector<int64_t> labels;  // empty: not matched
        std::vector<int64_t> blocks;  // [models, blocks] of merged blocks
        Digest digest{};              // of the labels; zeros where there are none
        int64_t merged = 0, version = 0;
        bool keeps_blocks = true;
    };
    struct Mapped {
        std::vector<int64_t> versions;
        bool known = false, labelled = false, usable = true, counted = false;
        std::vector<int64_t> labels;  // [models, positions]
        int64_t size = 0;
        std::vector<double> scale;  // [size], empty: none
        // For a merge: members of each merged position, empty where every position stays.
        std::vector<int64_t> ptr, members;  // [models, size + 1], [models, positions]
        std::vector<uint8_t> single;        // [models] see MergeAxis
        bool several = false;               // some model has not
    };
    // What a tie's match was with these labels of its neighbours.
    struct Visited {
        std::vector<Digest> near;
        std::vector<NetworkMatch> found;
    };
    // A similarity and where it lies: cross [models - 1][n][n], or full.
    struct Similar {
        Dtype dtype;
        const void* data;
        int64_t n, row_stride, model_stride;  // of the block (model 0, model m), elements
        bool full;
        bool bound;  // entries inside a model are upper bounds
    };
    class Arena;

    const Mapped& mapped(int map);
    bool is_whole(const NetworkMap& map) const;
    void find_members(Mapped& goes_to, int64_t positions) const;
    void evaluate(const NetworkMap& map, Mapped& result) const;
    bool move_piece(const MapPiece& piece, int64_t model, int64_t* labels) const;
    Status similarity(const KernelTable& table, int space, bool full, bool bound, double balance, int threads,
                      Poll poll, Arena& arena, Similar& result);
    bool worth_bounds(int space, double balance) const;
    bool joins_inside(int space, const std::vector<int64_t>& labels) const;
    static Digest digest_of(const std::vector<int64_t>& labels);
    Status visit_tie(const KernelTable& table, const std::vector<int>& tie, double balance, int threads, Poll poll,
                     std::vector<NetworkMatch>& found);
    Status visit_once(const KernelTable& table, const std::vector<int>& tie, double balance, int threads, Poll poll,
                      std::vector<NetworkMatch>& found, bool* again);
    Status assign_whole(const KernelTable& table, int space, const Similar& s, int threads, Poll poll,
                        NetworkMatch& found);
    Status match_blocks(const KernelTable& table, const std::vector<int>& tie, const std::vector<Similar>& similar,
                        int threads, Poll poll, std::vector<NetworkMatch>& found);
    Status zip_units(const KernelTable& table, int space, const Similar& s, const std::vector<int64_t>& pairing,
                     int threads, Poll poll, NetworkMatch& found) const;
    bool aligned(int space) const;

    std::shared_ptr<const NetworkLayout> layout_;
    std::vector<const void*> data_;
    NetworkOptions options_;
    std::vector<State> states_;
    std::vector<Mapped> mapped_;
    std::vector<std::vector<double>> duals_;  // [spaces] of the last assignment: [models - 1, 2, width]
    std::vector<char> needs_all_;             // [spaces] a zip by upper bounds was not the zip
    // [spaces] by the first space of a tie, the last one that was of use last
    std::vector<std::vector<Visited>> visited_;
    std::vector<std::shared_ptr<Arena>> arenas_;
    std::pair<int64_t, int64_t> bounded_{0, 0};
    int64_t matched_ = 0;
    int64_t next_version_ = 1;
};

}  // namespace mudsc
