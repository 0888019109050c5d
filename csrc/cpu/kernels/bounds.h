// Upper bounds of products at a third of their cost: panels rounded to 8 bits, whose products are exact in 32-bit
// integers, and the most that the rounding can have taken away. Where the instruction set has no such products,
// kHasBounds is false.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/common.h"
#include "cpu/kernels.h"
#include "cpu/kernels/gram.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr bool kHasBounds = true;
#else
constexpr bool kHasBounds = false;
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

// Rounds the n samples of a panel. missed += the most that the sum of squares of what rounding took away can be.
inline void round_panel(const float* from, int64_t n, RoundedPanel& to, double* missed) {
    const __m512i low = _mm512_set1_epi32(0xff), flip = _mm512_set1_epi32(static_cast<int>(0x80808080u));
    for (int u = 0; u < kPanel; u += 16) {
        __m512 most = _mm512_setzero_ps();
        for (int64_t k = 0; k < n; ++k)
            most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(from + k * kPanel + u)));
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

// What block_product leaves out of a block on or above the diagonal because its rows and columns are of one group: the
// same entries, of rounded panels. Entries below the diagonal are not wanted by anybody.
inline void bound_block(int64_t quads, const RoundedPanel& p, const RoundedPanel& q, const GramTarget<float>& target,
                        int64_t row0, int64_t column0) {
    constexpr int kLanes = 16;
    const int rows = static_cast<int>(min64(kPanel, target.rows - row0));
    for (int row = 0; row < rows; row += 8) {
        const int64_t from = max64(0, (row0 + row - column0) / kLanes),
                      to = min64(kPanel / kLanes, (target.first_column(row0 + row) - column0) / kLanes);
        if (from >= to) continue;
        const int column = static_cast<int>(from) * kLanes, left = rows - row < 8 ? rows - row : 8;
        float* at = target.data + (row0 + row) * target.ld + column0 + column;
        if (to - from == 1) bound_tile<1>(quads, p, q, row, column, left, at, target.ld);
        if (to - from == 2) bound_tile<2>(quads, p, q, row, column, left, at, target.ld);
        if (to - from == 3) bound_tile<3>(quads, p, q, row, column, left, at, target.ld);
    }
}

#else

inline void round_panel(const float*, int64_t, RoundedPanel&, double*) {}
inline void bound_block(int64_t, const RoundedPanel&, const RoundedPanel&, const GramTarget<float>&, int64_t, int64_t) {
}

#endif

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
