// Packing: blocks [samples][48] of a panel are shifted, scaled and measured. Units side by side in memory are read and
// stored in the same go; all others come through fill.h.
#pragma once

#include <stdint.h>

#include "cpu/common.h"
#include "cpu/kernels.h"
#include "cpu/kernels/gram.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mudsc {
namespace MUDSC_ISA {
namespace {

// block = (block - shift) * scale, by unit.
template <typename W>
void shift_and_scale(W* block, int64_t n, const W* shift, const W* scale) {
    for (int64_t k = 0; k < n; ++k) {
        W* row = block + k * kPanel;
        for (int u = 0; u < kPanel; ++u) row[u] = (row[u] - shift[u]) * scale[u];
    }
}

// sums += x and squares += x * x by unit, in float64.
template <typename W>
void measure(const W* block, int64_t n, double* sums, double* squares) {
    constexpr int kGroup = 16;
    for (int u0 = 0; u0 < kPanel; u0 += kGroup) {
        double sum[kGroup] = {}, square[kGroup] = {};
        for (int64_t k = 0; k < n; ++k) {
            const W* row = block + k * kPanel + u0;
            for (int u = 0; u < kGroup; ++u) {
                const double x = static_cast<double>(row[u]);
                sum[u] += x;
                square[u] += x * x;
            }
        }
        for (int u = 0; u < kGroup; ++u) {
            sums[u0 + u] += sum[u];
            squares[u0 + u] += square[u];
        }
    }
}

// Samples in one pass: with Zeroed, non-finite entries count as 0 (docs/method.md rule 1); block = (block - shift) *
// scale; then sums and squares as in measure, of 16 samples at a time in W. Lanes after the first `units` are left
// alone.
template <bool Zeroed = true, typename W>
void settle_samples(W* block, int64_t n, const W* shift, const W* scale, double* sums, double* squares,
                    int units = kPanel) {
    using V = typename VectorOf<W>::type;
    constexpr int kLanes = Tile<W>::kLanes;
    constexpr int64_t kChain = 16;
    for (int u = 0; u < units; u += kLanes) {
        const V from = *reinterpret_cast<const V*>(shift + u), by = *reinterpret_cast<const V*>(scale + u), zero = V{};
        for (int64_t k = 0; k < n; k += kChain) {
            V sum = V{}, square = V{};
            const int64_t last = min64(k + kChain, n);
            for (int64_t i = k; i < last; ++i) {
                V* at = reinterpret_cast<V*>(block + i * kPanel + u);
                V x = *at;
                if constexpr (Zeroed) x = x - x == zero ? x : zero;  // x - x is 0 for finite x only
                x = (x - from) * by;
                *at = x;
                sum += x;
                square += x * x;
            }
            add_to<double, W>(sums + u, sum);
            add_to<double, W>(squares + u, square);
        }
    }
}

// Samples first, first + 1, .. of a panel of pairs, of values that bf16 holds: even ones take the low half and clear
// the high one.
template <typename W>
void store_pairs(const W* block, int64_t n, int64_t first, uint32_t* pairs) {
    for (int64_t k = 0; k < n; ++k) {
        uint32_t* to = pairs + (first + k) / 2 * kPanel;
        const W* row = block + k * kPanel;
        if ((first + k) % 2 == 0 && k + 1 < n) {
            const W* next = row + kPanel;
            for (int u = 0; u < kPanel; ++u)
                to[u] = float_to_bits(static_cast<float>(row[u])) >> 16 |
                        (float_to_bits(static_cast<float>(next[u])) & 0xffff0000u);
            ++k;
        } else if ((first + k) % 2 == 0) {
            for (int u = 0; u < kPanel; ++u) to[u] = float_to_bits(static_cast<float>(row[u])) >> 16;
        } else {
            for (int u = 0; u < kPanel; ++u) to[u] |= float_to_bits(static_cast<float>(row[u])) & 0xffff0000u;
        }
    }
}

// Panels of a few samples: values, pairs of bf16, or both.
template <typename W>
class Panels {
  public:
    bool allocate(int64_t panels, int64_t depth, bool values, bool pairs) {
        depth_ = depth;
        if (!(values_.allocate(panels) && pairs_.allocate(panels))) return false;
        if (values && !value_.allocate(panels * depth * kPanel)) return false;
        if (pairs && !pair_.allocate(panels * ceil_div(depth, 2) * kPanel)) return false;
        for (int64_t p = 0; p < panels; ++p) {
            values_[p] = values ? value_.get() + p * depth * kPanel : nullptr;
            pairs_[p] = pairs ? pair_.get() + p * ceil_div(depth, 2) * kPanel : nullptr;
        }
        return true;
    }

    GramOperand<W> operand(int64_t first = 0) const { return {values_.get() + first, pairs_.get() + first}; }
    const W* const* values() const { return values_.get(); }
    // Where samples of a panel are put from `at` on, which are then `done`. block: room for them where only pairs are
    // kept.
    W* room(int64_t p, int64_t at, W* block) const {
        return values_[p] != nullptr ? value_.get() + (p * depth_ + at) * kPanel : block;
    }
    void done(int64_t p, int64_t at, int64_t n, const W* from) const {
        if (pairs_[p] != nullptr) store_pairs(from, n, at, pair_.get() + p * ceil_div(depth_, 2) * kPanel);
    }

  private:
    int64_t depth_ = 0;
    Buffer<W> value_;
    Buffer<uint32_t> pair_;
    Buffer<const W*> values_;
    Buffer<const uint32_t*> pairs_;
};

// ---- Whole panels of units side by side: read, shifted, measured and stored in one go ----

constexpr int64_t kFastRows = 16;

template <typename T>
inline VectorOf<float>::type load_vector(const T* from) {
    typename VectorOf<float>::type x;
    for (int i = 0; i < Tile<float>::kLanes; ++i) x[i] = to_f32(from[i]);
    return x;
}
template <>
inline VectorOf<float>::type load_vector<float>(const float* from) {
    return *reinterpret_cast<const typename VectorOf<float>::type*>(from);
}
#if defined(__AVX512F__)
template <>
inline VectorOf<float>::type load_vector<bf16>(const bf16* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return (VectorOf<float>::type)_mm512_slli_epi32(wide, 16);
}
template <>
inline VectorOf<float>::type load_vector<f16>(const f16* from) {
    return (VectorOf<float>::type)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#elif defined(__AVX2__)
template <>
inline VectorOf<float>::type load_vector<bf16>(const bf16* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return (VectorOf<float>::type)_mm256_slli_epi32(wide, 16);
}
template <>
inline VectorOf<float>::type load_vector<f16>(const f16* from) {
    return (VectorOf<float>::type)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#endif

inline bool all_finite(VectorOf<float>::type x) {
    bool finite = true;
    for (int i = 0; i < Tile<float>::kLanes; ++i) finite &= x[i] - x[i] == 0;
    return finite;
}

// Asks for a vector of units that is read later. They may lie across two lines, and where they do not, asking twice is
// quicker than once all the same (docs/performance.md).
template <typename T>
inline __attribute__((always_inline)) void ask_for(const T* units) {
    __builtin_prefetch(units, 0, 2);
    __builtin_prefetch(units + Tile<float>::kLanes, 0, 2);
}

// to[k][48] = (data[off[k]][48] - shift) * scale for n <= kFastRows samples, and their sums and squares. Returns false,
// with sums and squares as they were, if a value or a sum is not finite: then the careful way has to be taken. `later`:
// kFastRows more samples follow.
template <typename T>
bool pack_values(const T* data, const int64_t* off, int64_t n, const float* shift, const float* scale, float* to,
                 double* sums, double* squares, bool later) {
    using V = VectorOf<float>::type;
    constexpr int kLanes = Tile<float>::kLanes;
    V sum[kPanel / kLanes], square[kPanel / kLanes], total = V{};
    for (int u = 0; u < kPanel; u += kLanes) {
        const V from = load_vector(shift + u), by = load_vector(scale + u);
        V s = V{}, q = V{};
        for (int64_t k = 0; k < n; ++k) {
            const V x = (load_vector(data + off[k] + u) - from) * by;
            *reinterpret_cast<V*>(to + k * kPanel + u) = x;
            if (later) {
                ask_for(data + off[k + kFastRows] + u);
                __builtin_prefetch(to + (k + kFastRows) * kPanel + u, 1, 2);
            }
            s += x;
            q += x * x;
        }
        sum[u / kLanes] = s;
        square[u / kLanes] = q;
        total += q;
    }
    if (!all_finite(total)) return false;
    for (int u = 0; u < kPanel; u += kLanes) {
        add_to<double, float>(sums + u, sum[u / kLanes]);
        add_to<double, float>(squares + u, square[u / kLanes]);
    }
    return true;
}

#if defined(__AVX512BF16__)
// to[k / 2][48] = samples k and k + 1 as a pair, for an even number of samples n <= kFastRows. Sums and squares come
// from dot products of the pairs. `later` as above.
inline bool pack_pairs(const bf16* data, const int64_t* off, int64_t n, uint32_t* to, double* sums, double* squares,
                       bool later) {
    using V = VectorOf<float>::type;
    const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    __m512 sum[3], square[3], total = _mm512_setzero_ps();
    for (int u = 0; u < 3; ++u) {
        sum[u] = square[u] = _mm512_setzero_ps();
        for (int64_t k = 0; k < n; k += 2) {
            const __m512i low =
                _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + off[k] + u * 16)));
            const __m512i high =
                _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + off[k + 1] + u * 16)));
            const __m512i pair = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
            _mm512_storeu_si512(to + k / 2 * kPanel + u * 16, pair);
            if (later) {
                ask_for(data + off[k + kFastRows] + u * 16);
                ask_for(data + off[k + kFastRows + 1] + u * 16);
                __builtin_prefetch(to + (k + kFastRows) / 2 * kPanel + u * 16, 1, 2);
            }
            sum[u] = _mm512_dpbf16_ps(sum[u], (__m512bh)pair, ones);
            square[u] = _mm512_dpbf16_ps(square[u], (__m512bh)pair, (__m512bh)pair);
        }
        total = _mm512_add_ps(total, square[u]);
    }
    if (!all_finite((V)total)) return false;
    for (int u = 0; u < 3; ++u) {
        add_to<double, float>(sums + u * 16, (V)sum[u]);
        add_to<double, float>(squares + u * 16, (V)square[u]);
    }
    return true;
}
#endif

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
