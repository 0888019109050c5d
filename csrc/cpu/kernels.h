// The CPU kernels: what each takes, and the table that holds one pointer a kernel for each instruction set.
// All strides are in elements. Kernels write into memory of the caller and allocate only scratch.
#pragma once

#include <stdint.h>

#include <limits>

#include "cpu/parallel.h"
#include "cpu/status.h"

namespace mudsc {

constexpr int kMaxDims = 12;

// regroup: out[.., j, ..] = scale[j] * sum over p in members[ptr[j] .. ptr[j + 1]) of in[.., p, ..]
struct RegroupArgs {
    Dtype dtype;                // sums: f64, f32, f16, bf16; gathers (every unit has at most one member, no scale): any
    int element_bytes;          // 1, 2, 4, 8 or 16
    int ndim;                   // of in and out, at most kMaxDims
    int dim;                    // the unit axis
    const int64_t* shape;       // [ndim], of out
    const void* in;             // shape but for the unit axis
    const int64_t* in_strides;  // [ndim]
    void* out;                  // no two elements at one address
    const int64_t* out_strides;  // [ndim]
    const int64_t* ptr;          // [shape[dim] + 1]
    const int64_t* members;      // [ptr[shape[dim]]], positions on in's unit axis
    const double* scale;         // [shape[dim]] or null
    int threads;
};

// zip: greedy agglomeration of units (docs/method.md rules 5 and 7). Works on units[0..n) of a square similarity.
struct ZipArgs {
    Dtype dtype;             // f32 or f64
    const void* similarity;  // symmetric
    int64_t row_stride, col_stride;
    const int64_t* units;     // [n] rows of the similarity, in the order that breaks ties
    const int32_t* model_of;  // [n]
    int64_t n;
    int models;
    int64_t merges;  // how many to make
    double attenuation;
    int64_t* budget;        // [models] merges left inside each model; lowered as they are spent
    int64_t* block_budget;  // [models] the same for these units alone
    int64_t* owner;         // [n] out: the unit (index below n) that each joined; a survivor is its own
    bool in_place;          // the similarity is given up: all its units in order, entries finite, exactly symmetric,
                            // cache lines whole, col_stride 1 and row_stride zip_stride(n)
    bool trusted;           // entries are finite, as the caller knows
    double* total;          // out: sum of the entries taken
    int64_t* made;          // out: merges made, fewer than asked when infeasible
    int threads;
    Poll poll;
};

// Row stride of what a zip works on: an odd number of cache lines of float32, so that the entries of one column do not
// share cache sets.
constexpr int64_t zip_stride(int64_t n) { return ((n + 15) / 16 | 1) * 16; }

// An attenuation above 0 as T holds it: never 0, which a barred entry (-inf) would not outlast.
template <typename T>
static constexpr T held_attenuation(double given) {
    const T rounded = static_cast<T>(given), least = std::numeric_limits<T>::min();
    return rounded > least ? rounded : least;
}

constexpr int kSmallAssignment = 256;  // up to this size, assign reads whole rows

// assign: for each matrix of a batch the one-to-one match of rows to columns with the largest sum (docs/method.md rule
// 4).
struct AssignArgs {
    Dtype dtype;                   // f32 or f64
    const void* similarity;        // [shape[0], shape[1], n, n]
    int64_t shape[2], strides[2];  // of the batch
    int64_t n, row_stride, col_stride;
    bool trusted;         // entries are finite, as the caller knows
    const double* start;  // [problems, 2, n] duals (u, v) to start from, or null
    int64_t* indices;     // [problems, n] out: the column of each row
    double* value;        // [problems] out: mean of the entries taken
    double* gap;          // [problems] out: sum(u) + sum(v) - sum of the entries taken
    double *u, *v;        // [problems, n] out: u[i] + v[j] >= similarity[i, j]
    int threads;
    Poll poll;
};

// assign_tile: for some rows of an n x n matrix the columns with the `room` largest s - v, and the largest s - v.
struct AssignTileArgs {
    Dtype dtype;       // f32 or f64
    const void* tile;  // [rows, n], columns contiguous
    int64_t rows, n, row_stride;
    int64_t first_row;  // turns what is left out among equal columns from row to row
    const double* v;    // [n] prices
    int64_t room;       // at most n; 0: no lists
    int32_t* columns;   // [rows, room] out
    double* values;     // [rows, room] out: the entries
    double* threshold;  // [rows] out: no column left out has a larger s - v
    double* maxima;     // [rows] out, or null
    int threads;
    Poll poll;
};

// assign_lists: matches rows to columns on lists of each row's best columns, as far as the lists can tell.
struct AssignListsArgs {
    int64_t n;
    const int64_t* ptr;       // [n + 1] where each row's list begins
    const int32_t* columns;   // [ptr[n]]
    const double* values;     // [ptr[n]] the entries
    const double* keys;       // [ptr[n]] s - v when the list was made, falling along each list
    const double* threshold;  // [n] bounds s - v of the columns left out
    double* v;                // [n] prices; they only rise
    int64_t* column_of;       // [n] in and out: the column of each row, or -1
    uint8_t* wanted;          // [n] out: rows that need a new list
    int64_t* free_rows;       // out: how many rows have no column
    Poll poll;
};

constexpr int kGramPanel = 48;       // units of a packed panel, and of a block of accumulated products
constexpr int64_t kGramDepth = 512;  // samples that a panel has room for
constexpr int kMaxModels = 1 << 15;

// Streaming covariance: sums over samples of y_i y_j with y = (x - shift) * scale, by unit. Vectors are in panel order:
// "full" stacks the units of all models; "cross" puts model 0 in panels of its own and stacks models 1.. behind them.
struct CovarianceState {
    Dtype dtype;  // f32 or f64: of panels and of the products
    int64_t width, models;
    bool cross;
    double* gram;     // 48 x 48 blocks: full: those on and above the diagonal; cross: model 0 x the others
    void* panels;     // [panels][kGramDepth][48] packed samples that are not in gram yet
    double* shift;    // [panels * 48], representable in dtype
    double* scale;    // [panels * 48] powers of two
    double* sums;     // [panels * 48] of y, pending samples included
    double* squares;  // [panels * 48] of y * y, pending samples included
    uint8_t* raw;     // [panels] 1: the pending samples of this panel are pairs of bf16, not shifted
    int64_t* counts;  // [2] samples seen; of these pending
};

struct CovarianceSource {
    Dtype dtype;
    const void* data;
    int64_t unit_stride;
    int ndim;  // of the samples
    int64_t shape[kMaxDims], strides[kMaxDims];
};

struct CovarianceUpdateArgs {
    CovarianceState* state;
    const CovarianceSource* sources;  // [models]
    int64_t samples;                  // the product of each source's shape
    int threads;
};

// self += other, both without pending samples and of one dtype and layout.
struct CovarianceMergeArgs {
    CovarianceState* self;
    const CovarianceState* other;
    int threads;
};

// weight similarity: element (unit, column) of a term is scale[column] * sum over p in [ptr[column], ptr[column + 1])
// of data[unit_off[unit] + off[p]]; without ptr the one at off[column].
struct SimilarityTerm {
    Dtype dtype;
    const void* data;
    const int64_t* unit_off;  // [n]
    int64_t columns;
    const int64_t* off;
    const int64_t* ptr;   // [columns + 1] or null
    const double* scale;  // [columns] or null
};

// out = balance * (correlation of the terms' rows) + (1 - balance) * (correlation by activations).
struct SimilarityArgs {
    Dtype dtype;                  // f32 or f64: of out
    int64_t n, models;            // units a model
    bool cross;                   // out: [models - 1][n][n], else [models * n][models * n]
    const SimilarityTerm* terms;  // [term_count][models]; columns agree among models
    int64_t term_count;
    double balance;
    const CovarianceState* activation;  // null: weights alone
    void* out;
    int64_t row_stride;   // of a full out; 0: models * n
    bool* bound;          // null, or in: entries of two units of one model may be upper bounds, which are quicker to
                          // find; out: whether they are
    double bound_margin;  // they are of use below the best pairs of two models times this
    int64_t* bad_term;    // out: the term that is not finite
    int threads;
    Poll poll;
};

// One axis of a tensor that is merged: where each model's positions go.
struct MergeAxis {
    int64_t positions, size;  // before and after
    bool out;                 // produces units: entries are scaled by all shares over those of their members
    const int64_t* ptr;       // [models, size + 1], or null: every position stays
    const int64_t* members;   // [models, positions], those of merged position j from ptr[j] on
    const uint8_t* single;    // [models] 1: every merged position has one member, kInOrder: itself, 0: neither
};
constexpr uint8_t kInOrder = 2;

// merge: the mean of the models' tensors, seen as [outer, first, middle, second, inner], in merged coordinates.
struct MergeArgs {
    Dtype dtype;  // f64, f32, f16, bf16; averaged in f64 for f64, else in f32
    int64_t models, outer, middle, inner;
    MergeAxis first, second;
    const void* const* data;  // [models], contiguous
    const double* shares;     // [models], >= 0
    void* out;                // contiguous
    int threads;
    Poll poll;
};

struct KernelTable {
    const char* isa;
    Status (*regroup)(const RegroupArgs&);
    Status (*zip)(const ZipArgs&);
    Status (*assign)(const AssignArgs&);
    Status (*assign_tile)(const AssignTileArgs&);
    Status (*assign_lists)(const AssignListsArgs&);
    double (*peak_f32)(int64_t iterations, float* sink);   // flop done; for benchmarks
    double (*peak_bf16)(int64_t iterations, float* sink);  // 0 where there is no such instruction
    Status (*covariance_update)(const CovarianceUpdateArgs&);
    Status (*covariance_flush)(CovarianceState&, int threads);  // multiplies the pending samples
    Status (*covariance_merge)(const CovarianceMergeArgs&);
    Status (*covariance_rebase)(CovarianceState&, const double* shift, const double* scale, int threads);
    Status (*similarity)(const SimilarityArgs&);
    Status (*merge)(const MergeArgs&);  // not_finite: written, but something in it is not
};

// The kernels of the instruction set in use: the best that this CPU runs, or the one that MUDSC_FAST_ISA names.
// Throws std::invalid_argument for an unknown name and std::runtime_error for one that this CPU cannot run.
const KernelTable& kernels();

void use_isa(const char* name);  // nullptr: choose again
int isa_count();                 // instruction sets built, best last
const char* isa_name(int index);
bool isa_usable(int index);

}  // namespace mudsc
