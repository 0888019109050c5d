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
typedef uint16_t Halves16 __attribute__((vector_size(32)));
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

template <>
struct WideSum<bf16> {
    Floats16 sum = {};
    void add(const bf16* in) {
        Halves16 half;
        memcpy(&half, in, sizeof half);
        const Bits16 bits = __builtin_convertvector(half, Bits16) << 16;
        Floats16 x;
        memcpy(&x, &bits, sizeof x);
        sum += x;
    }
    void store(bf16* out, float by) const {
        const Floats16 x = sum * by;
        Bits16 bits;
        memcpy(&bits, &x, sizeof bits);
        const Bits16 up = (bits + (((bits >> 16) & 1u) + 0x7fffu)) >> 16, quiet = (bits >> 16) | 0x40u;
        const Bits16 nan = (Bits16)(x != x);
        const Halves16 half = __builtin_convertvector((nan & quiet) | (~nan & up), Halves16);
        memcpy(out, &half, sizeof half);
    }
};

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

// Units [j0, j1) of one outer index, each `bytes` <= Width long and next to the one before, on both sides. `at` is
// where each member lies, in elements of `size` bytes; reads up to `readable` bytes from `in` on are allowed.
template <int Width>
void move_short(char* out, const char* in, const int64_t* ptr, const int64_t* at, int64_t size, int64_t bytes,
                int64_t readable, int64_t j0, int64_t j1) {
    const int64_t last = j1 - ceil_div(Width, bytes);  // from here on a vector would reach past this task's units
    for (int64_t j = j0; j < j1; ++j) {
        char* to = out + j * bytes;
        const int64_t m = ptr[j];
        if (m == ptr[j + 1]) {
            memset(to, 0, static_cast<size_t>(bytes));
            continue;
        }
        const int64_t from = at[m] * size;
        if (j <= last && from + Width <= readable) {
            memcpy(to, in + from, Width);
        } else {
            copy_short(to, in + from, bytes);
        }
    }
}

// The same, summed and scaled, for units of at most kWide elements.
template <typename T, typename Acc>
void sum_short(T* out, const T* in, const int64_t* ptr, const int64_t* at, const double* scale, int64_t inner,
               int64_t readable, int64_t j0, int64_t j1) {
    const int64_t last = j1 - ceil_div(kWide, inner);
    T part[kWide] = {};
    for (int64_t j = j0; j < j1; ++j) {
        WideSum<T> sum;
        for (int64_t m = ptr[j]; m < ptr[j + 1]; ++m) {
            if (at[m] + kWide <= readable) {
                sum.add(in + at[m]);
            } else {
                memcpy(part, in + at[m], static_cast<size_t>(inner) * sizeof(T));
                sum.add(part);
            }
        }
        const Acc by = scale != nullptr ? static_cast<Acc>(scale[j]) : Acc{1};
        if (j <= last) {
            sum.store(out + j * inner, by);
        } else {
            sum.store(part, by);
            memcpy(out + j * inner, part, static_cast<size_t>(inner) * sizeof(T));
        }
    }
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
