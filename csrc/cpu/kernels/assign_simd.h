// Vectors for kernels that look for extremes: one thin type per element type, on whatever the instruction set has.
// Only included by kernel sources: everything is in the anonymous namespace of the instruction set.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined registers inside its own AVX-512 headers for a mistake (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

namespace mudsc {
namespace MUDSC_ISA {
namespace {

// A vector of `lanes` numbers of type C: loads from the matrix's type, sums, maxima, comparisons to bit masks.
template <class C>
struct Vec;

#if defined(__AVX512F__)

template <>
struct Vec<float> {
    static constexpr int lanes = 16;
    __m512 x;
    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Vec load_some(const float* p, int count) { return {_mm512_maskz_loadu_ps(first_bits(count), p)}; }
    static __mmask16 first_bits(int count) { return static_cast<__mmask16>((1u << count) - 1); }
    static Vec all(float a) { return {_mm512_set1_ps(a)}; }
    void store(float* p) const { _mm512_storeu_ps(p, x); }
    friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
    friend Vec vmax(Vec a, Vec b) { return {_mm512_max_ps(a.x, b.x)}; }
    friend Vec vmin(Vec a, Vec b) { return {_mm512_min_ps(a.x, b.x)}; }
    friend uint64_t ge(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_GE_OQ); }
    friend uint64_t gt(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_GT_OQ); }
};

template <>
struct Vec<double> {
    static constexpr int lanes = 8;
    __m512d x;
    static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
    static Vec load(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
    static Vec load_some(const double* p, int count) { return {_mm512_maskz_loadu_pd(first_bits(count), p)}; }
    static Vec load_some(const float* p, int count) {
        return {_mm512_cvtps_pd(_mm256_maskz_loadu_ps(first_bits(count), p))};
    }
    static __mmask8 first_bits(int count) { return static_cast<__mmask8>((1u << count) - 1); }
    static Vec all(double a) { return {_mm512_set1_pd(a)}; }
    void store(double* p) const { _mm512_storeu_pd(p, x); }
    double first() const { return _mm512_cvtsd_f64(x); }
    friend Vec operator+(Vec a, Vec b) { return {_mm512_add_pd(a.x, b.x)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_pd(a.x, b.x)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_pd(a.x, b.x)}; }
    friend Vec vmax(Vec a, Vec b) { return {_mm512_max_pd(a.x, b.x)}; }
    friend Vec vmin(Vec a, Vec b) { return {_mm512_min_pd(a.x, b.x)}; }
    friend uint64_t ge(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.x, b.x, _CMP_GE_OQ); }
    friend uint64_t gt(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.x, b.x, _CMP_GT_OQ); }
};

#elif defined(__AVX2__)

template <>
struct Vec<float> {
    static constexpr int lanes = 8;
    __m256 x;
    static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Vec load_some(const float* p, int count) { return {_mm256_maskload_ps(p, first_lanes(count))}; }
    static __m256i first_lanes(int count) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static Vec all(float a) { return {_mm256_set1_ps(a)}; }
    void store(float* p) const { _mm256_storeu_ps(p, x); }
    friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.x, b.x)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.x, b.x)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.x, b.x)}; }
    friend Vec vmax(Vec a, Vec b) { return {_mm256_max_ps(a.x, b.x)}; }
    friend Vec vmin(Vec a, Vec b) { return {_mm256_min_ps(a.x, b.x)}; }
    friend uint64_t ge(Vec a, Vec b) { return (uint64_t)_mm256_movemask_ps(_mm256_cmp_ps(a.x, b.x, _CMP_GE_OQ)); }
    friend uint64_t gt(Vec a, Vec b) { return (uint64_t)_mm256_movemask_ps(_mm256_cmp_ps(a.x, b.x, _CMP_GT_OQ)); }
};

template <>
struct Vec<double> {
    static constexpr int lanes = 4;
    __m256d x;
    static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
    static Vec load(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
    static Vec load_some(const double* p, int count) {
        return {_mm256_maskload_pd(p, _mm256_cvtepi32_epi64(first_lanes(count)))};
    }
    static Vec load_some(const float* p, int count) {
        return {_mm256_cvtps_pd(_mm_maskload_ps(p, first_lanes(count)))};
    }
    static __m128i first_lanes(int count) { return _mm_cmpgt_epi32(_mm_set1_epi32(count), _mm_setr_epi32(0, 1, 2, 3)); }
    static Vec all(double a) { return {_mm256_set1_pd(a)}; }
    void store(double* p) const { _mm256_storeu_pd(p, x); }
    double first() const { return _mm256_cvtsd_f64(x); }
    friend Vec operator+(Vec a, Vec b) { return {_mm256_add_pd(a.x, b.x)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_pd(a.x, b.x)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_pd(a.x, b.x)}; }
    friend Vec vmax(Vec a, Vec b) { return {_mm256_max_pd(a.x, b.x)}; }
    friend Vec vmin(Vec a, Vec b) { return {_mm256_min_pd(a.x, b.x)}; }
    friend uint64_t ge(Vec a, Vec b) { return (uint64_t)_mm256_movemask_pd(_mm256_cmp_pd(a.x, b.x, _CMP_GE_OQ)); }
    friend uint64_t gt(Vec a, Vec b) { return (uint64_t)_mm256_movemask_pd(_mm256_cmp_pd(a.x, b.x, _CMP_GT_OQ)); }
};

#else

// Sixteen bytes in the compiler's own vectors: SSE2 and NEON alike.
template <class C>
struct Vec {
    static constexpr int lanes = (int)(16 / sizeof(C));
    typedef C V __attribute__((vector_size(16)));
    V x;
    template <class T>
    static Vec load(const T* p) {
        Vec r;
        for (int k = 0; k < lanes; ++k) r.x[k] = (C)p[k];
        return r;
    }
    static Vec load(const C* p) {
        Vec r;
        memcpy(&r.x, p, sizeof(V));
        return r;
    }
    template <class T>
    static Vec load_some(const T* p, int count) {
        Vec r = all(0);
        for (int k = 0; k < lanes && k < count; ++k) r.x[k] = (C)p[k];
        return r;
    }
    static Vec all(C a) {
        Vec r;
        for (int k = 0; k < lanes; ++k) r.x[k] = a;
        return r;
    }
    void store(C* p) const { memcpy(p, &x, sizeof(V)); }
    C first() const { return x[0]; }
    friend Vec operator+(Vec a, Vec b) { return {a.x + b.x}; }
    friend Vec operator-(Vec a, Vec b) { return {a.x - b.x}; }
    friend Vec operator*(Vec a, Vec b) { return {a.x * b.x}; }
    friend Vec vmax(Vec a, Vec b) { return {a.x > b.x ? a.x : b.x}; }
    friend Vec vmin(Vec a, Vec b) { return {a.x < b.x ? a.x : b.x}; }
    friend uint64_t ge(Vec a, Vec b) { return bits(a.x >= b.x); }
    friend uint64_t gt(Vec a, Vec b) { return bits(a.x > b.x); }
    template <class M>
    static uint64_t bits(M m) {
        uint64_t word[2], r = 0;
        memcpy(word, &m, 16);
        if ((word[0] | word[1]) == 0) return 0;
        for (int k = 0; k < lanes; ++k) r |= (uint64_t)(m[k] != 0) << k;
        return r;
    }
};

#endif

// Reductions over the lanes of a vector: the smallest, the largest, and the two largest of all lanes where `first` and
// `second` hold the two largest seen by each lane.
#if defined(__AVX2__)

inline __m128d upper_half(__m256d a) { return _mm256_extractf128_pd(a, 1); }
inline __m128 upper_half(__m256 a) { return _mm256_extractf128_ps(a, 1); }

inline void top_two(__m256d first, __m256d second, double* a, double* b) {
    const __m128d f1 = _mm256_castpd256_pd128(first), f2 = upper_half(first);
    const __m128d s1 = _mm_max_pd(_mm_max_pd(_mm256_castpd256_pd128(second), upper_half(second)), _mm_min_pd(f1, f2));
    const __m128d f = _mm_max_pd(f1, f2), g = _mm_unpackhi_pd(f, f);
    *a = _mm_cvtsd_f64(_mm_max_sd(f, g));
    *b = _mm_cvtsd_f64(_mm_max_sd(_mm_max_sd(s1, _mm_unpackhi_pd(s1, s1)), _mm_min_sd(f, g)));
}

inline void top_two(__m256 first, __m256 second, float* a, float* b) {
    const __m128 f1 = _mm256_castps256_ps128(first), f2 = upper_half(first);
    __m128 s = _mm_max_ps(_mm_max_ps(_mm256_castps256_ps128(second), upper_half(second)), _mm_min_ps(f1, f2));
    __m128 f = _mm_max_ps(f1, f2), g = _mm_movehl_ps(f, f);
    s = _mm_max_ps(_mm_max_ps(s, _mm_movehl_ps(s, s)), _mm_min_ps(f, g));
    f = _mm_max_ps(f, g);
    g = _mm_movehdup_ps(f);
    *a = _mm_cvtss_f32(_mm_max_ss(f, g));
    *b = _mm_cvtss_f32(_mm_max_ss(_mm_max_ss(s, _mm_movehdup_ps(s)), _mm_min_ss(f, g)));
}

inline double lowest(__m256d a) {
    const __m128d b = _mm_min_pd(_mm256_castpd256_pd128(a), upper_half(a));
    return _mm_cvtsd_f64(_mm_min_sd(b, _mm_unpackhi_pd(b, b)));
}

inline float lowest(__m256 a) {
    __m128 b = _mm_min_ps(_mm256_castps256_ps128(a), upper_half(a));
    b = _mm_min_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_min_ss(b, _mm_movehdup_ps(b)));
}

inline float highest(__m256 a) {
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), upper_half(a));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

inline double highest(__m256d a) {
    const __m128d b = _mm_max_pd(_mm256_castpd256_pd128(a), upper_half(a));
    return _mm_cvtsd_f64(_mm_max_sd(b, _mm_unpackhi_pd(b, b)));
}

#if defined(__AVX512F__)

inline __m256d upper_half(__m512d a) { return _mm512_extractf64x4_pd(a, 1); }
inline __m256 upper_half(__m512 a) { return _mm512_extractf32x8_ps(a, 1); }

inline void top_two(Vec<double> first, Vec<double> second, double* a, double* b) {
    const __m256d f1 = _mm512_castpd512_pd256(first.x), f2 = upper_half(first.x);
    const __m256d s = _mm256_max_pd(_mm512_castpd512_pd256(second.x), upper_half(second.x));
    top_two(_mm256_max_pd(f1, f2), _mm256_max_pd(s, _mm256_min_pd(f1, f2)), a, b);
}
inline void top_two(Vec<float> first, Vec<float> second, float* a, float* b) {
    const __m256 f1 = _mm512_castps512_ps256(first.x), f2 = upper_half(first.x);
    const __m256 s = _mm256_max_ps(_mm512_castps512_ps256(second.x), upper_half(second.x));
    top_two(_mm256_max_ps(f1, f2), _mm256_max_ps(s, _mm256_min_ps(f1, f2)), a, b);
}
inline double lowest(Vec<double> a) { return lowest(_mm256_min_pd(_mm512_castpd512_pd256(a.x), upper_half(a.x))); }
inline float lowest(Vec<float> a) { return lowest(_mm256_min_ps(_mm512_castps512_ps256(a.x), upper_half(a.x))); }
inline double highest(Vec<double> a) { return highest(_mm256_max_pd(_mm512_castpd512_pd256(a.x), upper_half(a.x))); }
inline float highest(Vec<float> a) { return highest(_mm256_max_ps(_mm512_castps512_ps256(a.x), upper_half(a.x))); }
inline Vec<double> lowest_in_all(Vec<double> a) {
    const __m512d b = _mm512_min_pd(a.x, _mm512_shuffle_f64x2(a.x, a.x, 0x4e));
    const __m512d c = _mm512_min_pd(b, _mm512_shuffle_f64x2(b, b, 0xb1));
    return {_mm512_min_pd(c, _mm512_permute_pd(c, 0x55))};
}

#else

template <class C>
inline void top_two(Vec<C> first, Vec<C> second, C* a, C* b) {
    top_two(first.x, second.x, a, b);
}
template <class C>
inline C lowest(Vec<C> a) {
    return lowest(a.x);
}
template <class C>
inline C highest(Vec<C> a) {
    return highest(a.x);
}
inline Vec<double> lowest_in_all(Vec<double> a) {
    const __m256d b = _mm256_min_pd(a.x, _mm256_permute2f128_pd(a.x, a.x, 1));
    return {_mm256_min_pd(b, _mm256_permute_pd(b, 5))};
}

#endif
#else

template <class C>
inline void top_two(Vec<C> first, Vec<C> second, C* a, C* b) {
    C f = first.x[0], s = second.x[0];
    for (int k = 1; k < Vec<C>::lanes; ++k) {
        const C x = first.x[k], low = x < f ? x : f, y = second.x[k] > low ? second.x[k] : low;
        s = y > s ? y : s;
        f = x > f ? x : f;
    }
    *a = f;
    *b = s;
}
template <class C>
inline C lowest(Vec<C> a) {
    C least = a.x[0];
    for (int k = 1; k < Vec<C>::lanes; ++k) least = a.x[k] < least ? a.x[k] : least;
    return least;
}
template <class C>
inline C highest(Vec<C> a) {
    C most = a.x[0];
    for (int k = 1; k < Vec<C>::lanes; ++k) most = a.x[k] > most ? a.x[k] : most;
    return most;
}
inline Vec<double> lowest_in_all(Vec<double> a) { return Vec<double>::all(lowest(a)); }

#endif

// Sets one lane of the vector in memory. Read and written whole, so that the next load of it need not wait until a
// smaller store has left the store queue.
inline void put_at(double* p, int lane, double value) {
#if defined(__AVX512F__)
    __m512d x = _mm512_mask_mov_pd(_mm512_loadu_pd(p), static_cast<__mmask8>(1u << lane), _mm512_set1_pd(value));
    asm("" : "+v"(x));  // or the compiler makes it a masked store, which the next load has to wait for
    _mm512_storeu_pd(p, x);
#elif defined(__AVX2__)
    const __m256i here = _mm256_cmpeq_epi64(_mm256_set1_epi64x(lane), _mm256_setr_epi64x(0, 1, 2, 3));
    _mm256_storeu_pd(p, _mm256_blendv_pd(_mm256_loadu_pd(p), _mm256_set1_pd(value), _mm256_castsi256_pd(here)));
#else
    p[lane] = value;
#endif
}

#if defined(__AVX512F__)

// One lane for each bit; the others of `load_where` are zero, those of `lower_where` infinite.
inline Vec<double> load_where(uint64_t bits, const double* p) {
    return {_mm512_maskz_loadu_pd(static_cast<__mmask8>(bits), p)};
}
inline Vec<double> load_where(uint64_t bits, const float* p) {
    return {_mm512_cvtps_pd(_mm256_maskz_loadu_ps(static_cast<__mmask8>(bits), p))};
}
inline Vec<double> lower_where(uint64_t bits, Vec<double> a, Vec<double> b) {
    return {_mm512_mask_min_pd(_mm512_set1_pd(INFINITY), static_cast<__mmask8>(bits), a.x, b.x)};
}

// Bit j: lane j % 8 of vector j / 8 is at most `most`.
inline uint64_t at_most(const Vec<double> (&x)[8], Vec<double> most) {
    __mmask8 m[8];
    for (int k = 0; k < 8; ++k) m[k] = _mm512_cmp_pd_mask(x[k].x, most.x, _CMP_LE_OQ);
    const __mmask16 a = _mm512_kunpackb(m[1], m[0]), b = _mm512_kunpackb(m[3], m[2]);
    const __mmask16 c = _mm512_kunpackb(m[5], m[4]), d = _mm512_kunpackb(m[7], m[6]);
    return _cvtmask64_u64(_mm512_kunpackd(_mm512_kunpackw(d, c), _mm512_kunpackw(b, a)));
}

#endif

// Writes `value` to p[k] where bit k of mask is set, for the lanes of a Vec<double>.
inline void put_where(uint64_t mask, int32_t value, int32_t* p) {
#if defined(__AVX512VL__)
    _mm256_mask_storeu_epi32(p, static_cast<__mmask8>(mask), _mm256_set1_epi32(value));
#elif defined(__AVX2__)
    const __m128i bit = _mm_setr_epi32(1, 2, 4, 8);
    const __m128i on = _mm_cmpeq_epi32(_mm_and_si128(_mm_set1_epi32(static_cast<int>(mask)), bit), bit);
    _mm_maskstore_epi32(p, on, _mm_set1_epi32(value));
#else
    for (int k = 0; mask != 0; ++k, mask >>= 1) {
        if ((mask & 1) != 0) p[k] = value;
    }
#endif
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
