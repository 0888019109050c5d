// Filling: strided tensors of any floating type become blocks [samples][48] of a panel, read in place, without a copy
// of the tensor in between. A call fills the part of a block that belongs to one model; pack.h goes on from there.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cpu/common.h"
#include "cpu/kernels.h"
#include "cpu/kernels/gram.h"
#include "cpu/kernels/transpose.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mudsc {
namespace MUDSC_ISA {
namespace {

// Samples packed at a time: 64 x 48 floats (12 KiB) are still in the L1 when they are measured and shifted.
constexpr int64_t kPackRows = 64;

// The columns (samples) of a source: column c is scale[c] * sum over p in [ptr[c], ptr[c + 1]) of the element at
// off[p]; without ptr it is the element at off[c].
struct Columns {
    int64_t count;  // of all
    const int64_t* off;
    const int64_t* ptr;
    const double* scale;
};

template <typename W, typename T>
inline W load_as(T x) {
    return static_cast<W>(to_f32(x));
}
template <>
inline double load_as<double, double>(double x) {
    return x;
}

// to[i] = from[i], or += where Add.
template <bool Add, typename W, typename T>
inline void convert_run(W* __restrict to, const T* __restrict from, int64_t n) {
    if constexpr (!Add && sizeof(T) == sizeof(W)) {
        using V = typename VectorOf<W>::type;
        constexpr int kLanes = Tile<W>::kLanes;
        if (n == kPanel) {  // the usual length, without a call to memcpy
            for (int i = 0; i < kPanel; i += kLanes)
                *reinterpret_cast<V*>(to + i) = *reinterpret_cast<const V*>(from + i);
            return;
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        if constexpr (Add) {
            to[i] += load_as<W>(from[i]);
        } else {
            to[i] = load_as<W>(from[i]);
        }
    }
}
#if defined(__F16C__)
template <bool Add, typename W>
inline void convert_run(W* __restrict to, const f16* __restrict from, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        float part[8];
        _mm256_storeu_ps(part, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
        for (int j = 0; j < 8; ++j) to[i + j] = (Add ? to[i + j] : W(0)) + static_cast<W>(part[j]);
    }
    for (; i < n; ++i) to[i] = (Add ? to[i] : W(0)) + load_as<W>(from[i]);
}
#endif

// Units side by side in memory: one run of `units` elements a column.
template <typename W, typename T>
void fill_unit_runs(const T* data, const Columns& columns, int64_t units, int64_t c0, int64_t n, W* to) {
    for (int64_t k = 0; k < n; ++k) {
        W* row = to + k * kPanel;
        const int64_t c = c0 + k;
        if (columns.ptr == nullptr) {
            convert_run<false>(row, data + columns.off[c], units);
        } else {
            const int64_t first = columns.ptr[c], last = columns.ptr[c + 1];
            if (first == last) {
                for (int64_t u = 0; u < units; ++u) row[u] = W(0);
            } else {
                convert_run<false>(row, data + columns.off[first], units);
            }
            for (int64_t p = first + 1; p < last; ++p) convert_run<true>(row, data + columns.off[p], units);
        }
        if (columns.scale != nullptr) {
            const W scale = static_cast<W>(columns.scale[c]);
            for (int64_t u = 0; u < units; ++u) row[u] *= scale;
        }
    }
}

// Columns [c0, c0 + n) lie side by side in memory.
inline bool columns_run(const Columns& columns, int64_t c0, int64_t n) {
    if (columns.ptr != nullptr) return false;
    const int64_t* off = columns.off + c0;
    if (off[n - 1] - off[0] != n - 1) return false;
    bool run = true;
    for (int64_t k = 1; k < n; ++k) run &= off[k] == off[k - 1] + 1;
    return run;
}

// Columns that follow each other in memory, and whose members do where they have several: the 9 of a 3 x 3 kernel.
struct Run {
    int64_t first, length;
};

// The runs of columns [c0, c0 + n); returns how many there are.
inline int64_t find_runs(const Columns& columns, int64_t c0, int64_t n, Run* runs) {
    int64_t count = 0;
    for (int64_t c = c0; c < c0 + n; ++c) {
        bool follows = count > 0;
        if (follows && columns.ptr == nullptr) {
            follows = columns.off[c] == columns.off[c - 1] + 1;
        } else if (follows) {
            const int64_t *now = columns.off + columns.ptr[c], *before = columns.off + columns.ptr[c - 1];
            const int64_t members = columns.ptr[c + 1] - columns.ptr[c];
            follows = members == columns.ptr[c] - columns.ptr[c - 1];
            for (int64_t m = 0; follows && m < members; ++m) follows = now[m] == before[m] + 1;
        }
        if (follows) {
            ++runs[count - 1].length;
        } else {
            runs[count++] = {c, 1};
        }
    }
    return count;
}

template <int N, typename T>
struct VectorOfN {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
};

// N elements of any type as one vector of W.
template <int N, typename W>
struct Block {
    using V = typename VectorOfN<N, W>::type;
    V v = {};
    void store(W* to) const { memcpy(to, &v, sizeof v); }
    template <typename T>
    void add(const T* from) {
        if constexpr (sizeof(T) == 2) {
            float part[N];
            load_halves(from, part);
            add(part);
        } else {
            typename VectorOfN<N, T>::type x;
            memcpy(&x, from, sizeof x);
            v += __builtin_convertvector(x, V);
        }
    }
    static void load_halves(const bf16* from, float* to) {
        using Bits = typename VectorOfN<N, uint32_t>::type;
        typename VectorOfN<N, uint16_t>::type half;
        memcpy(&half, from, sizeof half);
        const Bits bits = __builtin_convertvector(half, Bits) << 16;
        memcpy(to, &bits, sizeof bits);
    }
    static void load_halves(const f16* from, float* to) {
#if defined(__F16C__)
        if constexpr (N == 8) {
            _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
            return;
        }
#endif
        for (int i = 0; i < N; ++i) to[i] = to_f32(from[i]);
    }
};

// The sum of some members' next N elements. `at` are their offsets.
template <int N, typename W, typename T>
inline void take(const T* data, const int64_t* at, int64_t members, W* to) {
    Block<N, W> sum;
    for (int64_t m = 0; m < members; ++m) sum.add(data + at[m]);
    sum.store(to);
}

// One unit's columns, run after run; the last vector of a run ends where the run does. The same of a unit that is read
// soon are asked for.
template <typename W, typename T>
void gather_unit(const T* data, const T* soon, const Columns& columns, const Run* runs, int64_t count, W* to) {
    for (int64_t r = 0; r < count; ++r) {
        const int64_t c = runs[r].first, n = runs[r].length;
        const int64_t* at = columns.off + (columns.ptr != nullptr ? columns.ptr[c] : c);
        const int64_t members = columns.ptr != nullptr ? columns.ptr[c + 1] - columns.ptr[c] : 1;
        if (members > 0) {
            __builtin_prefetch(soon + at[0]);
            __builtin_prefetch(soon + at[0] + n - 1);
        }
        if (n >= 8) {
            for (int64_t k = 0; k + 8 <= n; k += 8) take<8, W>(data + k, at, members, to + k);
            if (n % 8 != 0) take<8, W>(data + n - 8, at, members, to + n - 8);
        } else if (n >= 4) {
            take<4, W>(data, at, members, to);
            if (n > 4) take<4, W>(data + n - 4, at, members, to + n - 4);
        } else {
            for (int64_t k = 0; k < n; ++k) {
                W sum = W(0);
                for (int64_t m = 0; m < members; ++m) sum += load_as<W>(data[at[m] + k]);
                to[k] = sum;
            }
        }
        to += n;
    }
}

// Columns in no order: eight units at a time, straight to their places.
template <typename W, typename T>
void gather_scattered(const T* data, const int64_t* unit_off, const Columns& columns, int64_t units, int64_t c0,
                      int64_t n, W* to) {
    constexpr int64_t kAtOnce = 8;
    int64_t u0 = 0;
    for (; u0 + kAtOnce <= units; u0 += kAtOnce) {
        const T* unit[kAtOnce];
        for (int64_t u = 0; u < kAtOnce; ++u) unit[u] = data + unit_off[u0 + u];
        for (int64_t k = 0; k < n; ++k) {
            const int64_t c = c0 + k;
            const int64_t first = columns.ptr != nullptr ? columns.ptr[c] : c;
            const int64_t last = columns.ptr != nullptr ? columns.ptr[c + 1] : c + 1;
            W sum[kAtOnce] = {};
            for (int64_t p = first; p < last; ++p) {
                const int64_t at = columns.off[p];
#pragma GCC unroll 8
                for (int64_t u = 0; u < kAtOnce; ++u) sum[u] += load_as<W>(unit[u][at]);
            }
            memcpy(to + k * kPanel + u0, sum, sizeof sum);
        }
    }
    for (; u0 < units; ++u0) {
        const T* unit = data + unit_off[u0];
        for (int64_t k = 0; k < n; ++k) {
            const int64_t c = c0 + k;
            const int64_t first = columns.ptr != nullptr ? columns.ptr[c] : c;
            const int64_t last = columns.ptr != nullptr ? columns.ptr[c + 1] : c + 1;
            W sum = W(0);
            for (int64_t p = first; p < last; ++p) sum += load_as<W>(unit[columns.off[p]]);
            to[k * kPanel + u0] = sum;
        }
    }
}

template <typename W>
void scale_columns(const Columns& columns, int64_t units, int64_t c0, int64_t n, W* to) {
    if (columns.scale == nullptr) return;
    for (int64_t k = 0; k < n; ++k) {
        const W scale = static_cast<W>(columns.scale[c0 + k]);
        for (int64_t u = 0; u < units; ++u) to[k * kPanel + u] *= scale;
    }
}

// Asks for n elements.
template <typename T>
inline void ask_for_run(const T* next, int64_t n) {
    constexpr int64_t kLine = kCacheLine / static_cast<int64_t>(sizeof(T));
    for (int64_t k = 0; k < n; k += kLine) __builtin_prefetch(next + k, 0, 2);
}

// Units that lie within so many elements are asked for together.
constexpr int64_t kNear = 256;

// Units that lie apart: their columns are read unit by unit and transposed, eight units at a time.
template <typename W, typename T>
void fill_apart(const T* data, const int64_t* unit_off, const Columns& columns, int64_t units, int64_t c0, int64_t n,
                W* to) {
    const bool run = columns_run(columns, c0, n);
    Run runs[kPackRows];
    const int64_t count = run ? 1 : find_runs(columns, c0, n, runs);
    if (!run && count * 3 > n) {
        gather_scattered(data, unit_off, columns, units, c0, n, to);
        scale_columns(columns, units, c0, n, to);
        return;
    }
    // Runs with one member a column are read where they are.
    const bool direct = sizeof(T) == sizeof(W) && columns.ptr == nullptr;
    if (run) runs[0] = {c0, n};
    constexpr int64_t kAtOnce = 8;
    W part[kAtOnce][kPackRows];
    for (int64_t u0 = 0; u0 < units; u0 += kAtOnce) {
        const int64_t batch = min64(kAtOnce, units - u0);
        const W* rows[kAtOnce];
        for (int64_t u = 0; run && u < batch; ++u) ask_for_run(data + columns.off[c0] + n + unit_off[u0 + u], n);
        if (direct) {
            for (int64_t u = 0; u < batch; ++u) rows[u] = reinterpret_cast<const W*>(data + unit_off[u0 + u]);
            W* at = to + u0;
            const int64_t span = unit_off[u0 + batch - 1] - unit_off[u0];
            for (int64_t r = 0; r < count; ++r) {
                const int64_t soon = runs[r].first + n;
                if (!run && span <= kNear && soon < columns.count)
                    ask_for_run(data + columns.off[soon] + unit_off[u0], span + runs[r].length);
                transpose_rows(rows, batch, columns.off[runs[r].first], runs[r].length, at, kPanel);
                at += runs[r].length * kPanel;
            }
            continue;
        }
        for (int64_t u = 0; u < batch; ++u) {
            const T* unit = data + unit_off[u0 + u];
            rows[u] = part[u];
            if (run) {
                convert_run<false>(part[u], unit + columns.off[c0], n);
            } else {
                const T* soon = data + unit_off[min64(u0 + u + kAtOnce, units - 1)];
                gather_unit(unit, soon, columns, runs, count, part[u]);
            }
        }
        transpose_rows(rows, batch, 0, n, to + u0, kPanel);
    }
    scale_columns(columns, units, c0, n, to);
}

template <typename W, typename T>
void fill_typed(const void* data, const int64_t* unit_off, const Columns& columns, int64_t units, int64_t c0, int64_t n,
                W* to) {
    bool run = unit_off[units - 1] - unit_off[0] == units - 1;
    for (int64_t u = 1; run && u < units; ++u) run = unit_off[u] == unit_off[u - 1] + 1;
    const T* typed = static_cast<const T*>(data);
    if (run) {
        fill_unit_runs<W>(typed + unit_off[0], columns, units, c0, n, to);
    } else {
        fill_apart<W>(typed, unit_off, columns, units, c0, n, to);
    }
}

// to[k * 48 + u] = element (unit u, column c0 + k) for u < units, k < n <= kPackRows. unit_off: [units] offsets.
// Returns false for a type that is not floating.
template <typename W>
bool fill(Dtype dtype, const void* data, const int64_t* unit_off, const Columns& columns, int64_t units, int64_t c0,
          int64_t n, W* to) {
    if (units <= 0 || n <= 0) return true;
    switch (dtype) {
        case Dtype::f64: fill_typed<W, double>(data, unit_off, columns, units, c0, n, to); return true;
        case Dtype::f32: fill_typed<W, float>(data, unit_off, columns, units, c0, n, to); return true;
        case Dtype::f16: fill_typed<W, f16>(data, unit_off, columns, units, c0, n, to); return true;
        case Dtype::bf16: fill_typed<W, bf16>(data, unit_off, columns, units, c0, n, to); return true;
        default: return false;
    }
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
