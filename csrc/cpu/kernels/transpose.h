// Four rows side by side become lines of four.
#pragma once

#include <stdint.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mudsc {
namespace MUDSC_ISA {
namespace {

// to[k * ld + u] = rows[u][k] for 4 rows and n columns.
template <typename W>
[[maybe_unused]] inline void transpose_4(const W* const* rows, int64_t n, W* to, int64_t ld) {
    int64_t k = 0;
#if defined(__SSE2__)
    if constexpr (sizeof(W) == sizeof(float)) {
        for (; k + 4 <= n; k += 4) {
            __m128 a = _mm_loadu_ps(reinterpret_cast<const float*>(rows[0] + k)),
                   b = _mm_loadu_ps(reinterpret_cast<const float*>(rows[1] + k));
            __m128 c = _mm_loadu_ps(reinterpret_cast<const float*>(rows[2] + k)),
                   d = _mm_loadu_ps(reinterpret_cast<const float*>(rows[3] + k));
            _MM_TRANSPOSE4_PS(a, b, c, d);
            float* at = reinterpret_cast<float*>(to + k * ld);
            _mm_storeu_ps(at, a);
            _mm_storeu_ps(at + ld, b);
            _mm_storeu_ps(at + 2 * ld, c);
            _mm_storeu_ps(at + 3 * ld, d);
        }
    }
#endif
    for (; k < n; ++k) {
        for (int u = 0; u < 4; ++u) to[k * ld + u] = rows[u][k];
    }
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
