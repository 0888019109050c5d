// Upper bounds of products inside models, at less than their cost. Of some columns products are made; those of all
// others add at most the product of what is left of the two rows' norms. Where there are products of 8 bits, panels are
// rounded first: their products are exact in 32-bit integers, take a quarter of the time, and a bound is raised by the
// most that the rounding can have taken away.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu/common.h"
#include "cpu/kernels.h"
#include "cpu/kernels/gram.h"
#include "cpu/kernels/pack.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

// Calls fn(row, from, to) for what block_product leaves out of the block at (row0, column0), on or above the diagonal,
// because its rows and columns are of one group: vectors [from, to) of kRows rows. Entries below the diagonal are not
// wanted by anybody.
template <typename W, typename Fn>
void inside_vectors(const GramTarget<W>& target, int64_t row0, int64_t column0, const Fn& fn) {
    constexpr int kLanes = Tile<W>::kLanes, kRows = Tile<W>::kRows;
    const int rows = static_cast<int>(min64(kPanel, target.rows - row0));
    for (int row = 0; row < rows; row += kRows) {
        const int64_t from = max64(0, (row0 + row - column0) / kLanes),
                      to = min64(kPanel / kLanes, (target.first_column(row0 + row) - column0) / kLanes);
        if (from < to) fn(row, static_cast<int>(from), static_cast<int>(to));
    }
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
template <typename W>
constexpr bool kRounds = sizeof(W) == sizeof(float);
#else
template <typename W>
constexpr bool kRounds = false;
#endif

constexpr int64_t kQuad = 4;  // samples that one instruction multiplies and adds up

// One panel as 8-bit integers q: sample k of a unit is step * q, within half a step. The same integers stand twice,
// because the instruction multiplies unsigned by signed ones.
struct RoundedPanel {
    uint8_t left[kGramDepth * kPanel];  // [depth / 4][48][4] q + 128
    int8_t right[kGramDepth * kPanel];  // the same, q
    int32_t offset[kPanel];             // -128 times the sum of q
    float step[kPanel];
};

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

// Rounds the n samples of a panel. missed += the most that the sum of squares of what rounding took away can be, seen
// += the sum of squares.
inline void round_panel(const float* from, int64_t n, RoundedPanel& to, double* missed, double* seen) {
    const __m512i low = _mm512_set1_epi32(0xff), flip = _mm512_set1_epi32(static_cast<int>(0x80808080u));
    for (int u = 0; u < kPanel; u += 16) {
        __m512 most = _mm512_setzero_ps(), square = most;
        for (int64_t k = 0; k < n; ++k) {
            const __m512 x = _mm512_loadu_ps(from + k * kPanel + u);
            most = _mm512_max_ps(most, _mm512_abs_ps(x));
            square = _mm512_fmadd_ps(x, x, square);
        }
        add_to<double, float>(seen + u, (VectorOf<float>::type)square);
        const __m512 step = _mm512_mul_ps(most, _mm512_set1_ps(1.0F / 127));
        const __mmask16 some = _mm512_cmp_ps_mask(most, _mm512_setzero_ps(), _CMP_GT_OQ);
        const __m512 by = _mm512_maskz_div_ps(some, _mm512_set1_ps(127), most);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t k = 0; k < n; k += kQuad) {
            __m512i quad = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int i = 0; i < kQuad; ++i) {
                if (k + i >= n) break;
                const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + (k + i) * kPanel + u), by));
                sum = _mm512_add_epi32(sum, q);
                quad = _mm512_or_si512(quad, _mm512_slli_epi32(_mm512_and_si512(q, low), 8 * i));
            }
            _mm512_storeu_si512(to.right + k * kPanel + u * kQuad, quad);
            _mm512_storeu_si512(to.left + k * kPanel + u * kQuad, _mm512_xor_si512(quad, flip));
        }
        _mm512_storeu_si512(to.offset + u, _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sum), 7));
        _mm512_storeu_ps(to.step + u, step);
    }
    for (int u = 0; u < kPanel; ++u) {
        const double half = 0.5001 * static_cast<double>(to.step[u]);
        missed[u] += half * half * static_cast<double>(n);
    }
}

// c[rows][NV * 16] += the product of two rounded panels, rows from unit `row` and columns from unit `column` on.
template <int NV>
__attribute__((noinline)) void bound_tile(int64_t quads, const RoundedPanel& p, const RoundedPanel& q, int row,
                                          int column, int rows, float* c, int64_t ldc) {
    __m512i acc[8][NV];
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) {
        const __m512i offset = _mm512_loadu_si512(q.offset + column + j * 16);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) acc[i][j] = offset;
    }
    const uint8_t* a = p.left + row * kQuad;
    const int8_t* b = q.right + column * kQuad;
#pragma GCC unroll 1
    for (int64_t k = 0; k < quads; ++k) {
        __m512i right[NV];
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) right[j] = _mm512_loadu_si512(b + j * 64);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            int four;
            memcpy(&four, a + i * kQuad, sizeof four);
            const __m512i left = _mm512_set1_epi32(four);
#pragma GCC unroll 3
            for (int j = 0; j < NV; ++j) {
                // _mm512_dpbusd_epi32, of which GCC 12 copies every sum twice at each step.
                asm("vpdpbusd %2, %1, %0" : "+v"(acc[i][j]) : "v"(left), "v"(right[j]));
            }
        }
        a += kQuad * kPanel;
        b += kQuad * kPanel;
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        if (i >= rows) break;
        const __m512 mine = _mm512_set1_ps(p.step[row + i]);
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) {
            const __m512 by = _mm512_mul_ps(mine, _mm512_loadu_ps(q.step + column + j * 16));
            float* at = c + i * ldc + j * 16;
            _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i][j]), by, _mm512_loadu_ps(at)));
        }
    }
}

// The entries of a block inside models, of rounded panels.
inline void bound_block(int64_t quads, const RoundedPanel& p, const RoundedPanel& q, const GramTarget<float>& target,
                        int64_t row0, int64_t column0) {
    inside_vectors(target, row0, column0, [&](int row, int from, int to) {
        const int column = from * Tile<float>::kLanes, left = static_cast<int>(min64(8, target.rows - row0 - row));
        float* at = target.data + (row0 + row) * target.ld + column0 + column;
        if (to - from == 1) bound_tile<1>(quads, p, q, row, column, left, at, target.ld);
        if (to - from == 2) bound_tile<2>(quads, p, q, row, column, left, at, target.ld);
        if (to - from == 3) bound_tile<3>(quads, p, q, row, column, left, at, target.ld);
    });
}

#else

inline void round_panel(const float*, int64_t, RoundedPanel&, double*, double*) {}
inline void bound_block(int64_t, const RoundedPanel&, const RoundedPanel&, const GramTarget<float>&, int64_t, int64_t) {
}

#endif

// The entries of a block inside models, of panels as they are.
template <typename W>
void inside_block(int64_t depth, const W* p, const W* q, const GramTarget<W>& target, int64_t row0, int64_t column0) {
    constexpr int kLanes = Tile<W>::kLanes, kVectors = Tile<W>::kVectors;
    inside_vectors(target, row0, column0, [&](int row, int from, int to) {
        const int left = static_cast<int>(target.rows - row0) - row;
        for (int v = from; v < to; v += kVectors) {
            const int column = v * kLanes, wide = (to - v < kVectors ? to - v : kVectors) * kLanes;
            edge_tile<W, W>(depth, p + row, q + column, target.data + (row0 + row) * target.ld + column0 + column,
                            target.ld, left, 0, wide, false);
        }
    });
}

// Of how many columns products are made for bounds: as few as tell two units of one model from the rows' best pairs, as
// far as some rows show after the first columns. Bounds that turn out too high cost another similarity, so all are
// taken where rows have a second best pair that is nearly as good: pairs that get in each other's way leave units for
// last that match nothing.
template <typename W>
class Separation {
  public:
    // What activations say of two units of one model.
    void see_inside(W x) { inside_ = x > inside_ ? x : inside_; }
    // A row's pairs with all units of another model, one by one, and their end.
    void see_pair(W x) {
        const W less = x < best_ ? x : best_;
        best_ = x > best_ ? x : best_;
        second_ = less > second_ ? less : second_;
    }
    void end_of_pairs() {
        lowest_ = best_ < lowest_ ? best_ : lowest_;
        rival_ = second_ > rival_ ? second_ : rival_;
        best_ = second_ = -1;
    }

    // share: of the weights. margin: what the best pairs shrink by before the last of them joins.
    int64_t columns(int64_t total, double share, double margin) const {
        constexpr double kRoom = 0.85, kRounding = 0.04;  // the part of the room that is used; for errors of rounding
        constexpr double kWorthLess = 0.95;               // of all columns
        constexpr int64_t kAtOnce = 16;
        const double lowest = static_cast<double>(lowest_) * margin, inside = static_cast<double>(inside_);
        if (2 * static_cast<double>(rival_) > lowest + inside) return total;
        // What is left of two rows may be correlated by as much as the rest.
        const double part = 1 - ((lowest - inside) / share * kRoom - kRounding);
        if (!(part < kWorthLess)) return total;
        return part > 0 ? ceil_div(static_cast<int64_t>(part * static_cast<double>(total)) + 1, kAtOnce) * kAtOnce : 0;
    }

  private:
    W best_ = -1, second_ = -1;                // of the row so far
    W lowest_ = 1, rival_ = -1, inside_ = -1;  // of the best pairs; the highest second best; the highest inside
};

// The bounds of one similarity: products of the first columns as they are packed, then what raises these to bounds.
template <typename W>
class InsideBounds {
  public:
    bool allocate(int64_t panels) {
        const int64_t units = panels * kPanel;
        panels_ = panels;
        if (kRounds<W> && !rounded_.allocate(panels)) return false;
        if (!missed_.allocate(units) || !seen_.allocate(units) || !error_.allocate(units) || !reach_.allocate(units) ||
            !rest_.allocate(units))
            return false;
        for (int64_t u = 0; u < units; ++u) missed_[u] = seen_[u] = 0;
        return true;
    }

    // Adds products of the next columns to a target with groups, as long as any are `wanted`.
    bool multiply(int threads, int64_t depth, int64_t wanted, const W* const* values, const GramTarget<W>& target,
                  const Poll* poll) {
        const int64_t columns = min64(depth, wanted - done_);
        if (columns <= 0) return true;
        done_ += columns;
        if constexpr (kRounds<W>) {
            parallel_each(threads, panels_, [&](int64_t p, int) {
                round_panel(values[p], columns, rounded_[p], missed_.get() + p * kPanel, seen_.get() + p * kPanel);
            });
            return gram_blocks(threads, columns, target, poll, [&](int64_t i, int64_t j) {
                bound_block(ceil_div(columns, kQuad), rounded_[i], rounded_[j], target, i * kPanel, j * kPanel);
            });
        } else {
            parallel_each(threads, panels_, [&](int64_t p, int) {
                double none[kPanel] = {};
                measure(values[p], columns, none, seen_.get() + p * kPanel);
            });
            return gram_blocks(threads, columns, target, poll, [&](int64_t i, int64_t j) {
                inside_block(columns, values[i], values[j], target, i * kPanel, j * kPanel);
            });
        }
    }

    // All products were made, and none was rounded.
    bool exact(int64_t columns) const { return !kRounds<W> && done_ == columns; }

    // A row whose entries have `squares` as their sum of squares, `inverse` one over its norm when centred.
    void settle(int64_t unit, double squares, double inverse, int64_t columns) {
        error_[unit] = static_cast<W>(inverse * sqrt(missed_[unit]));
        reach_[unit] = static_cast<W>(inverse * sqrt(squares));
        // Beside what sums of kGramDepth squares in float32 may be off.
        const double rest = done_ < columns ? fmax(squares - seen_[unit], 0) + 4e-5 * squares : 0;
        rest_[unit] = static_cast<W>(inverse * sqrt(rest));
        // Of what is multiplied in W, and of the bound itself.
        slack_ = static_cast<W>(
            1e-4 + 1.2e-7 * (static_cast<double>(kStep) + static_cast<double>(columns) / static_cast<double>(kStep)));
    }

    // Raises row[0 .. n), entries of `unit` with the units from `first` on: for rows x and y and what they missed,
    // |x y - (x + d) (y + e)| <= |d| |y| + |x| |e| + |d| |e|.
    void raise(int64_t unit, int64_t first, int64_t n, W* __restrict row) const {
        const W error = error_[unit], reach = reach_[unit] + error, rest = rest_[unit];
        const W *errors = error_.get() + first, *reaches = reach_.get() + first, *rests = rest_.get() + first;
        for (int64_t j = 0; j < n; ++j) row[j] += error * reaches[j] + reach * errors[j] + rest * rests[j] + slack_;
    }

  private:
    int64_t panels_ = 0, done_ = 0;
    Buffer<RoundedPanel> rounded_;
    Buffer<double> missed_, seen_;  // [units] squares of what rounding took away, at most; of what is multiplied
    // [units] in units of the row's centred norm: what rounding took away at most, what is multiplied, what is not.
    Buffer<W> error_, reach_, rest_;
    W slack_ = 0;
};

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
