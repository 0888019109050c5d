// The ceiling that benchmarks are read against: how many multiply-adds one core of this machine makes when nothing else
// holds it back. Twelve independent chains of the widest registers hide the latency of the instruction.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/common.h"
#include "cpu/kernels.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

constexpr int kChains = 12;

// A chain each, by name: an array would live in memory. X(c) is repeated once a chain.
#define MUDSC_CHAINS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

// Makes the compiler keep a chain in a register, and its steps apart.
#if defined(__x86_64__)
#define MUDSC_KEEP(value) asm volatile("" : "+x"(value))
#else
#define MUDSC_KEEP(value) asm volatile("" : "+w"(value))
#endif

#if defined(__AVX512F__)
typedef float Wide __attribute__((vector_size(64)));
#elif defined(__AVX2__)
typedef float Wide __attribute__((vector_size(32)));
#else
typedef float Wide __attribute__((vector_size(16)));
#endif

}  // namespace

double peak_f32(int64_t iterations, float* sink);
double peak_f32(int64_t iterations, float* sink) {
    const Wide by = Wide{} + (1.0f - 1e-7f * sink[0]), add = Wide{} + 1e-9f;
#define X(c) Wide sum##c = {};
    MUDSC_CHAINS(X)
#undef X
    for (int64_t i = 0; i < iterations; ++i) {
#define X(c)                    \
    sum##c = sum##c * by + add; \
    MUDSC_KEEP(sum##c);
        MUDSC_CHAINS(X)
#undef X
    }
    Wide all{};
#define X(c) all += sum##c;
    MUDSC_CHAINS(X)
#undef X
    sink[0] = all[0];
    return 2.0 * kChains * (sizeof(Wide) / sizeof(float)) * static_cast<double>(iterations);
}

double peak_bf16(int64_t iterations, float* sink);
double peak_bf16(int64_t iterations, float* sink) {
#if defined(__AVX512BF16__)
    const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(float_to_bits(sink[0])));
#define X(c) __m512 sum##c = _mm512_setzero_ps();
    MUDSC_CHAINS(X)
#undef X
    for (int64_t i = 0; i < iterations; ++i) {
#define X(c)                                 \
    sum##c = _mm512_dpbf16_ps(sum##c, x, x); \
    MUDSC_KEEP(sum##c);
        MUDSC_CHAINS(X)
#undef X
    }
    __m512 all = _mm512_setzero_ps();
#define X(c) all = _mm512_add_ps(all, sum##c);
    MUDSC_CHAINS(X)
#undef X
    sink[0] = _mm512_cvtss_f32(all);
    return 4.0 * kChains * 16.0 * static_cast<double>(iterations);
#else
    (void)iterations;
    (void)sink;
    return 0;  // no such instruction
#endif
}

}  // namespace MUDSC_ISA
}  // namespace mudsc
