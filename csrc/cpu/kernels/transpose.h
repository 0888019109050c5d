// Rows side by side, at most eight, become lines of as many.
#pragma once

#include <stdint.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mudsc {
namespace MUDSC_ISA {
namespace {

// to[k * ld + u] = rows[u][from + k] for 4 rows and n columns.
template <typename W>
[[maybe_unused]] inline void transpose_4(const W* const* rows, int64_t from, int64_t n, W* to, int64_t ld) {
    int64_t k = 0;
#if defined(__SSE2__)
    if constexpr (sizeof(W) == sizeof(float)) {
        for (; k + 4 <= n; k += 4) {
            __m128 a = _mm_loadu_ps(reinterpret_cast<const float*>(rows[0] + from + k)),
                   b = _mm_loadu_ps(reinterpret_cast<const float*>(rows[1] + from + k));
            __m128 c = _mm_loadu_ps(reinterpret_cast<const float*>(rows[2] + from + k)),
                   d = _mm_loadu_ps(reinterpret_cast<const float*>(rows[3] + from + k));
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
        for (int u = 0; u < 4; ++u) to[k * ld + u] = rows[u][from + k];
    }
}

// The same for 8 rows.
template <typename W>
[[maybe_unused]] inline void transpose_8(const W* const* rows, int64_t from, int64_t n, W* to, int64_t ld) {
#if defined(__AVX2__)
    if constexpr (sizeof(W) == sizeof(float)) {
        int64_t k = 0;
        for (; k + 4 <= n; k += 4) {
            // Rows u and u + 4 in the two halves of a vector: what is shuffled stays in its half.
            const auto both = [&](int u) {
                const __m128 x = _mm_loadu_ps(reinterpret_cast<const float*>(rows[u] + from + k));
                return _mm256_insertf128_ps(_mm256_castps128_ps256(x),
                                            _mm_loadu_ps(reinterpret_cast<const float*>(rows[u + 4] + from + k)), 1);
            };
            const __m256 a = both(0), b = both(1), c = both(2), d = both(3);
            const __m256 ab = _mm256_unpacklo_ps(a, b), cd = _mm256_unpacklo_ps(c, d);
            const __m256 ba = _mm256_unpackhi_ps(a, b), dc = _mm256_unpackhi_ps(c, d);
            float* at = reinterpret_cast<float*>(to + k * ld);
            _mm256_storeu_ps(at, _mm256_shuffle_ps(ab, cd, 0x44));
            _mm256_storeu_ps(at + ld, _mm256_shuffle_ps(ab, cd, 0xee));
            _mm256_storeu_ps(at + 2 * ld, _mm256_shuffle_ps(ba, dc, 0x44));
            _mm256_storeu_ps(at + 3 * ld, _mm256_shuffle_ps(ba, dc, 0xee));
        }
        for (; k < n; ++k) {
            for (int u = 0; u < 8; ++u) to[k * ld + u] = rows[u][from + k];
        }
        return;
    }
#endif
    transpose_4(rows, from, n, to, ld);
    transpose_4(rows + 4, from, n, to + 4, ld);
}

// The same for any number of rows up to 8.
template <typename W>
[[maybe_unused]] inline void transpose_rows(const W* const* rows, int64_t count, int64_t from, int64_t n, W* to,
                                            int64_t ld) {
    int64_t done = 0;
    if (count == 8) {
        transpose_8(rows, from, n, to, ld);
        done = 8;
    } else if (count >= 4) {
        transpose_4(rows, from, n, to, ld);
        done = 4;
    }
    for (; done < count; ++done) {
        for (int64_t k = 0; k < n; ++k) to[k * ld + done] = rows[done][from + k];
    }
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
