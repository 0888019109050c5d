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
    template <typename Acc>
    void exact(void* out, Acc by) const {
        const Vector x = sum * by;
        memcpy(out, &x, sizeof x);
    }
    template <typename Acc>
    bool quick(void* out, Acc by) const {
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
    bool quick(void* out, float by) const {
        const Floats a = even * by, b = odd * by;
#if defined(__AVX512BF16__)
        // The instruction takes subnormal numbers for zero, and is right about NaN.
        if constexpr (Bytes == 64) {
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
    void exact(void* out, float by) const {
        const Floats each[2] = {even * by, odd * by};
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
    bool quick(void* out, float by) const {
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
    // Two parts in one store: the vector is read as one, and stores of halves would keep that waiting.
    void exact(void* out, float by) const {
        static_assert(kParts % 2 == 0, "pairs of parts");
        for (int k = 0; k < kParts; k += 2) {
            const __m128i x = narrow(part[k], by), y = narrow(part[k + 1], by);
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

#if defined(__AVX512F__)
// Sixteen numbers of 16 bits are one vector of floats.
template <typename T>
struct Sixteen {
    __m512 sum = _mm512_setzero_ps();
    void start(const void* in) { sum = T::widen(_mm256_loadu_si256(static_cast<const __m256i*>(in))); }
    void add(const void* in) { sum += T::widen(_mm256_loadu_si256(static_cast<const __m256i*>(in))); }
};

template <>
struct Sum<f16, 32> : Sixteen<Sum<f16, 32>> {
    static __m512 widen(__m256i x) { return _mm512_maskz_cvtph_ps(kAll, x); }
    void exact(void* out, float by) const {
        const __m256i x = _mm512_maskz_cvtps_ph(kAll, sum * by, _MM_FROUND_TO_NEAREST_INT);
        _mm256_storeu_si256(static_cast<__m256i*>(out), x);
    }
    bool quick(void* out, float by) const {
        exact(out, by);
        return false;
    }
};

template <>
struct Sum<bf16, 32> : Sixteen<Sum<bf16, 32>> {
    static __m512 widen(__m256i x) {
        return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAll, _mm512_maskz_cvtepu16_epi32(kAll, x), 16));
    }
    bool quick(void* out, float by) const {
        const __m512 x = sum * by;
#if defined(__AVX512BF16__)
        _mm256_storeu_si256(static_cast<__m256i*>(out), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
        return _mm512_fpclass_ps_mask(x, kSubnormal) != 0;
#else
        // As from_f32 rounds all but NaN.
        const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1), half = _mm512_set1_epi32(0x7fff);
        const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(kAll, bits, 16), one);
        const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, half));
        const __m512i upper = _mm512_maskz_srli_epi32(kAll, rounded, 16);
        _mm256_storeu_si256(static_cast<__m256i*>(out), _mm512_maskz_cvtepi32_epi16(kAll, upper));
        return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0;
#endif
    }
    void exact(void* out, float by) const {
        const __m512 x = sum * by;
        bf16 to[16];
        for (int k = 0; k < 16; ++k) to[k] = from_f32<bf16>(x[k]);
        memcpy(out, to, sizeof to);
    }
};
#endif

template <typename T, int Bytes, typename Acc>
inline void store_sum(const Sum<T, Bytes>& sum, void* out, Acc by) {
    if (sum.quick(out, by)) sum.exact(out, by);
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
