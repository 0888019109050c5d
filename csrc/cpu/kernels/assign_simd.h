// Vectors for the assignment kernels: one thin type per element type, on whatever the instruction set has.
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
    static Vec all(float a) { return {_mm512_set1_ps(a)}; }
    void store(float* p) const { _mm512_storeu_ps(p, x); }
    friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
    friend Vec vmax(Vec a, Vec b) { return {_mm512_max_ps(a.x, b.x)}; }
    friend Vec vmin(Vec a, Vec b) { return {_mm512_min_ps(a.x, b.x)}; }
    friend float lowest(Vec a) { return _mm512_reduce_min_ps(a.x); }
    friend uint64_t ge(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_GE_OQ); }
    friend uint64_t gt(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_GT_OQ); }
};

template <>
struct Vec<double> {
    static constexpr int lanes = 8;
    __m512d x;
    static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
    static Vec load(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
    static Vec all(double a) { return {_mm512_set1_pd(a)}; }
    void store(double* p) const { _mm512_storeu_pd(p, x); }
    friend Vec operator+(Vec a, Vec b) { return {_mm512_add_pd(a.x, b.x)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_pd(a.x, b.x)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_pd(a.x, b.x)}; }
    friend Vec vmax(Vec a, Vec b) { return {_mm512_max_pd(a.x, b.x)}; }
    friend Vec vmin(Vec a, Vec b) { return {_mm512_min_pd(a.x, b.x)}; }
    friend double lowest(Vec a) { return _mm512_reduce_min_pd(a.x); }
    friend uint64_t ge(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.x, b.x, _CMP_GE_OQ); }
    friend uint64_t gt(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.x, b.x, _CMP_GT_OQ); }
};

#elif defined(__AVX2__)

template <>
struct Vec<float> {
    static constexpr int lanes = 8;
    __m256 x;
    static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
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
    static Vec all(double a) { return {_mm256_set1_pd(a)}; }
    void store(double* p) const { _mm256_storeu_pd(p, x); }
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
    static Vec all(C a) {
        Vec r;
        for (int k = 0; k < lanes; ++k) r.x[k] = a;
        return r;
    }
    void store(C* p) const { memcpy(p, &x, sizeof(V)); }
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

#if !defined(__AVX512F__)
// The smallest of a vector's lanes.
template <class C>
inline C lowest(Vec<C> a) {
    C lane[Vec<C>::lanes];
    a.store(lane);
    for (int w = Vec<C>::lanes / 2; w >= 1; w /= 2) {
        for (int k = 0; k < w; ++k) lane[k] = lane[k] < lane[k + w] ? lane[k] : lane[k + w];
    }
    return lane[0];
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
