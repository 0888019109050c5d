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
    Wide sum[kChains] = {};
    const Wide by = Wide{} + 1.0f - 1e-7f * sink[0], add = Wide{} + 1e-9f;
    for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
        for (int c = 0; c < kChains; ++c) {
            sum[c] = sum[c] * by + add;
            asm volatile("" : "+x"(sum[c]));
        }
    }
    Wide all{};
    for (int c = 0; c < kChains; ++c) all += sum[c];
    sink[0] = all[0];
    return 2.0 * kChains * (sizeof(Wide) / sizeof(float)) * static_cast<double>(iterations);
}

double peak_bf16(int64_t iterations, float* sink);
double peak_bf16(int64_t iterations, float* sink) {
#if defined(__AVX512BF16__)
    __m512 sum[kChains];
    for (int c = 0; c < kChains; ++c) sum[c] = _mm512_setzero_ps();
    const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(float_to_bits(sink[0])));
    for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
        for (int c = 0; c < kChains; ++c) {
            sum[c] = _mm512_dpbf16_ps(sum[c], x, x);
            asm volatile("" : "+v"(sum[c]));
        }
    }
    __m512 all = sum[0];
    for (int c = 1; c < kChains; ++c) all = _mm512_add_ps(all, sum[c]);
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
