// Units that are a few elements each, as the 3 x 3 kernels of a convolution's input channels. A run is moved or added
// up as one wide vector that goes past its end: what it writes there is overwritten by the next run.
#pragma once

#include "cpu/kernels/regroup_layout.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

constexpr int kWide = 16;  // elements that are added up at once

// Sums of sixteen elements. GCC and clang split these vectors into registers of the instruction set's own size.
typedef float Floats16 __attribute__((vector_size(64)));
typedef uint32_t Bits16 __attribute__((vector_size(64)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef uint32_t Bits8 __attribute__((vector_size(32)));
typedef double Doubles8 __attribute__((vector_size(64)));

template <typename T>
struct WideSum;

template <>
struct WideSum<float> {
    Floats16 sum = {};
    void add(const float* in) {
        Floats16 x;
        memcpy(&x, in, sizeof x);
        sum += x;
    }
    void store(float* out, float by) const {
        const Floats16 x = sum * by;
        memcpy(out, &x, sizeof x);
    }
};

template <>
struct WideSum<double> {
    Doubles8 low = {}, high = {};
    void add(const double* in) {
        Doubles8 a, b;
        memcpy(&a, in, sizeof a);
        memcpy(&b, in + 8, sizeof b);
        low += a;
        high += b;
    }
    void store(double* out, double by) const {
        const Doubles8 a = low * by, b = high * by;
        memcpy(out, &a, sizeof a);
        memcpy(out + 8, &b, sizeof b);
    }
};

#if defined(__AVX512BF16__)
// The instruction takes subnormal numbers for zero, and is right about NaN. False where there are some.
inline bool pack_pairs(bf16* out, Floats8 even, Floats8 odd) {
    const __m256 a = reinterpret_cast<__m256>(even), b = reinterpret_cast<__m256>(odd);
    if ((_mm256_fpclass_ps_mask(a, kSubnormal) | _mm256_fpclass_ps_mask(b, kSubnormal)) != 0) return false;
    const __m256i order = _mm256_set_epi16(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
    const __m256i x = _mm256_permutexvar_epi16(order, reinterpret_cast<__m256i>(_mm256_cvtne2ps_pbh(b, a)));
    memcpy(out, &x, sizeof x);
    return true;
}
inline bool pack_pairs(bf16* out, Floats16 even, Floats16 odd) {
    const __m512 a = reinterpret_cast<__m512>(even), b = reinterpret_cast<__m512>(odd);
    if ((_mm512_fpclass_ps_mask(a, kSubnormal) | _mm512_fpclass_ps_mask(b, kSubnormal)) != 0) return false;
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i x = _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
    memcpy(out, &x, sizeof x);
    return true;
}
#endif

// A bfloat16 is the upper half of a float: of each pair, the even one is shifted there and the odd one stands there.
// `Bits` and `Floats` are of 32 bytes for short units, of 64 for long runs.
template <typename Bits, typename Floats>
struct PairSum {
    static constexpr int kCount = 2 * static_cast<int>(sizeof(Bits) / 4);
    Floats even = {}, odd = {};
    // Through references: vectors wider than the registers are not to be returned.
    static void add_bits(Floats& sum, const Bits& bits) {
        Floats x;
        memcpy(&x, &bits, sizeof x);
        sum += x;
    }
    // In the upper half, as from_f32 rounds.
    static void round(Bits& out, const Floats& x) {
        Bits bits;
        memcpy(&bits, &x, sizeof bits);
        const Bits nan = (Bits)(x != x);
        out = (nan & (bits | 0x400000u)) | (~nan & (bits + (((bits >> 16) & 1u) + 0x7fffu)));
    }
    void add(const bf16* in) {
        Bits x;
        memcpy(&x, in, sizeof x);
        add_bits(even, x << 16);
        add_bits(odd, x & 0xffff0000u);
    }
    void store(bf16* out, float by) const {
        const Floats a = even * by, b = odd * by;
#if defined(__AVX512BF16__)
        if (pack_pairs(out, a, b)) return;
#endif
        Bits low, high;
        round(low, a);
        round(high, b);
        const Bits x = low >> 16 | (high & 0xffff0000u);
        memcpy(out, &x, sizeof x);
    }
};

template <>
struct WideSum<bf16> : PairSum<Bits8, Floats8> {};

// As many elements as are added up at once where a run is long.
template <typename T>
struct LongSum : WideSum<T> {
    static constexpr int kCount = kWide;
};
template <>
struct LongSum<bf16> : PairSum<Bits16, Floats16> {};

template <>
struct WideSum<f16> {
#if defined(__F16C__)
    __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();
    void add(const f16* in) {
        const __m128i* x = reinterpret_cast<const __m128i*>(in);
        low = _mm256_add_ps(low, _mm256_cvtph_ps(_mm_loadu_si128(x)));
        high = _mm256_add_ps(high, _mm256_cvtph_ps(_mm_loadu_si128(x + 1)));
    }
    void store(f16* out, float by) const {
        const __m256 f = _mm256_set1_ps(by);
        __m128i* x = reinterpret_cast<__m128i*>(out);
        _mm_storeu_si128(x, _mm256_cvtps_ph(_mm256_mul_ps(low, f), _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128(x + 1, _mm256_cvtps_ph(_mm256_mul_ps(high, f), _MM_FROUND_TO_NEAREST_INT));
    }
#else
    float sum[kWide] = {};
    void add(const f16* in) {
        for (int k = 0; k < kWide; ++k) sum[k] += to_f32(in[k]);
    }
    void store(f16* out, float by) const {
        for (int k = 0; k < kWide; ++k) out[k] = from_f32<f16>(sum[k] * by);
    }
#endif
};

// Units [j0, j1) of one outer index, each `inner` elements of at most Width bytes and next to the one before, on both
// sides. `at` is where each member lies; reads of up to `readable` elements from `in` on are allowed.
template <int Width, typename T>
void move_short(T* out, const T* in, const int64_t* ptr, const int32_t* at, bool full, int64_t inner, int64_t readable,
                int64_t j0, int64_t j1, Ahead ahead) {
    constexpr int64_t size = static_cast<int64_t>(sizeof(T)), kElements = (Width + size - 1) / size;
    const int64_t safe = max64(j0, j1 - ceil_div(Width, inner * size));  // from here on a vector reaches past j1
    const int64_t last = readable - kElements, bytes = inner * size;
    T* to = out + j0 * inner;
    const auto move = [&](int64_t from, bool inside) {
        if (inside && from <= last) {
            memcpy(to, in + from, Width);
        } else {
            copy_short(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(in + from), bytes);
        }
        to += inner;
    };
    if (full) {
        int64_t j = j0;
        for (; j + Ahead::kGroup <= safe;) {
            ahead.ask(to);
            for (const int64_t stop = j + Ahead::kGroup; j < stop; ++j) move(at[j], true);
        }
        for (; j < j1; ++j) move(at[j], j < safe);
        return;
    }
    for (int64_t j = j0; j < j1; ++j) {
        if ((j - j0) % Ahead::kGroup == 0) ahead.ask(to);
        if (ptr[j] < ptr[j + 1]) {
            move(at[ptr[j]], j < safe);
        } else {
            memset(to, 0, static_cast<size_t>(bytes));
            to += inner;
        }
    }
}

// The same, summed and scaled, for units of at most kWide elements.
template <typename T, typename Acc, typename Factor>
void sum_short(T* out, const T* in, const int64_t* ptr, const int32_t* at, const Factor& factor, int64_t inner,
               int64_t readable, int64_t j0, int64_t j1, Ahead ahead) {
    const int64_t safe = max64(j0, j1 - ceil_div(kWide, inner)), last = readable - kWide;
    const size_t bytes = static_cast<size_t>(inner) * sizeof(T);
    T part[kWide] = {};
    T* to = out + j0 * inner;
    int64_t m = ptr[j0];
    for (int64_t j = j0; j < j1;) {
        ahead.ask(to);
        for (const int64_t stop = min64(j + Ahead::kGroup, j1); j < stop; ++j, to += inner) {
            WideSum<T> sum;
            if (ptr[j + 1] - m == 2 && at[m] <= last && at[m + 1] <= last && j < safe) {  // the usual zip
                sum.add(in + at[m]);
                sum.add(in + at[m + 1]);
                sum.store(to, factor(j));
                m += 2;
                continue;
            }
            for (const int64_t end = ptr[j + 1]; m < end; ++m) {
                if (at[m] <= last) {
                    sum.add(in + at[m]);
                } else {
                    memcpy(part, in + at[m], bytes);
                    sum.add(part);
                }
            }
            const Acc by = factor(j);
            if (j < safe) {
                sum.store(to, by);
            } else {
                sum.store(part, by);
                memcpy(to, part, bytes);
            }
        }
    }
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
