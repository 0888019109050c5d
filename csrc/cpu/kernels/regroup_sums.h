// Sums of several elements side by side, in registers: of short units, long runs and the lines of tiles.
#pragma once

#include "cpu/kernels/regroup_layout.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

// GCC and clang split vectors into registers of the instruction set's own size.
template <int Bytes>
struct VectorsOf {
    typedef float Floats __attribute__((vector_size(Bytes)));
    typedef double Doubles __attribute__((vector_size(Bytes)));
    typedef uint32_t Bits __attribute__((vector_size(Bytes)));
};

// One factor for the lower half of a vector and one for the upper.
template <typename Acc>
struct Halves {
    Acc low, high;
};

// Through references: vectors wider than the registers are not to be returned.
template <typename Vector, typename Acc>
inline void scale_by(Vector& x, Acc by) {
    x *= by;
}
template <typename Vector, typename Acc>
inline void scale_by(Vector& x, const Halves<Acc>& by) {
    constexpr int n = static_cast<int>(sizeof(Vector) / sizeof(Acc));
    Vector factor;
#pragma GCC unroll 16
    for (int k = 0; k < n; ++k) factor[k] = k < n / 2 ? by.low : by.high;
    x *= factor;
}

// The sum of runs of `Bytes`. `quick` scales, rounds and stores it; where it returns true, `exact` is to follow: there
// are numbers among them that it rounds wrongly.
template <typename T, int Bytes>
struct Sum;

template <typename Vector>
struct PlainSum {
    Vector sum = {};
    void start(const void* in) { memcpy(&sum, in, sizeof sum); }
    void add(const void* in) {
        Vector x;
        memcpy(&x, in, sizeof x);
        sum += x;
    }
    template <typename By>
    void exact(void* out, const By& by) const {
        Vector x = sum;
        scale_by(x, by);
        memcpy(out, &x, sizeof x);
    }
    template <typename By>
    bool quick(void* out, const By& by) const {
        exact(out, by);
        return false;
    }
};
template <int Bytes>
struct Sum<float, Bytes> : PlainSum<typename VectorsOf<Bytes>::Floats> {};
template <int Bytes>
struct Sum<double, Bytes> : PlainSum<typename VectorsOf<Bytes>::Doubles> {};

// A bfloat16 is the upper half of a float: of each pair, the even one is shifted there and the odd one stands there.
template <int Bytes>
struct Sum<bf16, Bytes> {
    using Floats = typename VectorsOf<Bytes>::Floats;
    using Bits = typename VectorsOf<Bytes>::Bits;
    Floats even = {}, odd = {};

    void start(const void* in) { split(in, even, odd); }
    void add(const void* in) {
        Floats a, b;
        split(in, a, b);
        even += a;
        odd += b;
    }
    template <typename By>
    bool quick(void* out, const By& by) const {
        Floats a = even, b = odd;
        scale_by(a, by);
        scale_by(b, by);
#if defined(__AVX512BF16__)
        // The instruction takes subnormal numbers for zero, and is right about NaN.
        if constexpr (Bytes == 32) {
            const __m256 x = reinterpret_cast<__m256>(a), y = reinterpret_cast<__m256>(b);
            const __m256i order = _mm256_set_epi16(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
            const auto both = reinterpret_cast<__m256i>(_mm256_cvtne2ps_pbh(y, x));
            _mm256_storeu_si256(static_cast<__m256i*>(out), _mm256_permutexvar_epi16(order, both));
            return (_mm256_fpclass_ps_mask(x, kSubnormal) | _mm256_fpclass_ps_mask(y, kSubnormal)) != 0;
        } else if constexpr (Bytes == 64) {
            const __m512 x = reinterpret_cast<__m512>(a), y = reinterpret_cast<__m512>(b);
            const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                   22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
            const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x));
            _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, both));
            return (_mm512_fpclass_ps_mask(x, kSubnormal) | _mm512_fpclass_ps_mask(y, kSubnormal)) != 0;
        }
#endif
        Bits low, high;
        round(low, a);
        round(high, b);
        const Bits pairs = low >> 16 | (high & 0xffff0000u);
        memcpy(out, &pairs, sizeof pairs);
        return any((Bits)(a != a) | (Bits)(b != b));
    }
    template <typename By>
    void exact(void* out, const By& by) const {
        Floats each[2] = {even, odd};
        scale_by(each[0], by);
        scale_by(each[1], by);
        bf16 to[Bytes / 2];
        for (int k = 0; k < Bytes / 2; ++k) to[k] = from_f32<bf16>(each[k % 2][k / 2]);
        memcpy(out, to, sizeof to);
    }

  private:
    static void split(const void* in, Floats& a, Floats& b) {
        Bits x;
        memcpy(&x, in, sizeof x);
        const Bits low = x << 16, high = x & 0xffff0000u;
        memcpy(&a, &low, sizeof a);
        memcpy(&b, &high, sizeof b);
    }
    // As from_f32 rounds all but NaN, in the upper half.
    static void round(Bits& bits, const Floats& x) {
        memcpy(&bits, &x, sizeof bits);
        bits += ((bits >> 16) & 1u) + 0x7fffu;
    }
    static bool any(const Bits& x) {
        uint64_t parts[Bytes / 8], all = 0;
        memcpy(parts, &x, sizeof parts);
        for (int k = 0; k < Bytes / 8; ++k) all |= parts[k];
        return all != 0;
    }
};

template <int Bytes>
struct Sum<f16, Bytes> {
    template <typename By>
    bool quick(void* out, const By& by) const {
        exact(out, by);
        return false;
    }
#if defined(__F16C__)
    static constexpr int kParts = Bytes / 16;
    __m256 part[kParts] = {};
    void start(const void* in) {
        for (int k = 0; k < kParts; ++k) part[k] = load(in, k);
    }
    void add(const void* in) {
        for (int k = 0; k < kParts; ++k) part[k] = _mm256_add_ps(part[k], load(in, k));
    }
    // One part alone, as the lanes of a line lie apart.
    void start_part(const void* in, int k) { part[k] = load(in, 0); }
    void add_part(const void* in, int k) { part[k] = _mm256_add_ps(part[k], load(in, 0)); }
    void exact(void* out, float by) const { exact(out, Halves<float>{by, by}); }
    // Two parts in one store: the vector is read as one, and stores of halves would keep that waiting.
    void exact(void* out, const Halves<float>& by) const {
        static_assert(kParts % 2 == 0, "pairs of parts");
        for (int k = 0; k < kParts; k += 2) {
            const __m128i x = narrow(part[k], k < kParts / 2 ? by.low : by.high);
            const __m128i y = narrow(part[k + 1], k + 1 < kParts / 2 ? by.low : by.high);
            const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(x), y, 1);
            _mm256_storeu_si256(static_cast<__m256i*>(out) + k / 2, both);
        }
    }

  private:
    static __m128i narrow(__m256 x, float by) {
        return _mm256_cvtps_ph(_mm256_mul_ps(x, _mm256_set1_ps(by)), _MM_FROUND_TO_NEAREST_INT);
    }
    static __m256 load(const void* in, int k) {
        return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(in) + k));
    }
#else
    static constexpr int kCount = Bytes / 2;
    float sum[kCount] = {};
    void start(const void* in) { add(in); }
    void add(const void* in) {
        f16 x[kCount];
        memcpy(x, in, sizeof x);
        for (int k = 0; k < kCount; ++k) sum[k] += to_f32(x[k]);
    }
    void exact(void* out, float by) const {
        f16 x[kCount];
        for (int k = 0; k < kCount; ++k) x[k] = from_f32<f16>(sum[k] * by);
        memcpy(out, x, sizeof x);
    }
#endif
};

template <typename T, int Bytes, typename By>
inline void store_sum(const Sum<T, Bytes>& sum, void* out, const By& by) {
    if (sum.quick(out, by)) sum.exact(out, by);
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
