// The one matrix product of this package: C += P^T Q for units packed in panels, where P and Q hold one column a unit
// and one row a sample (or weight column). Covariance (samples) and weight similarity (weight columns) both end here.
//
// A panel is [depth][48]: 48 units side by side, sample after sample. The same panel serves as left operand (elements
// broadcast) and as right operand (vectors loaded), so each unit is packed once. C is either an array of 48 x 48 blocks
// (only those on and above the diagonal when it is symmetric) or a row-major matrix.
//
// C is float64 where it is a stream's accumulator: in float32, identical batches added over and over would be rounded
// the same way each time (an error of 1e-4 after 10^6 samples).
//
// Every element of C sees the same additions in the same order whatever the thread count: a task owns its blocks.
#pragma once

#include <stdint.h>

#include "cpu/common.h"
#include "cpu/kernels.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // raised by GCC 12's own AVX-512 header (its bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace mudsc {
namespace MUDSC_ISA {
namespace {

constexpr int kPanel = kGramPanel;

// Samples added up in one chain of float32 additions.
constexpr int64_t kStep = 256;

// Register tile: kRows broadcasts times kVectors vectors of kLanes units.
template <typename T>
struct Tile {
#if defined(__AVX512F__)
    static constexpr int kLanes = 64 / sizeof(T), kRows = 8, kVectors = 3;
#elif defined(__AVX2__)
    static constexpr int kLanes = 32 / sizeof(T), kRows = 6, kVectors = 2;
#elif defined(__aarch64__)
    static constexpr int kLanes = 16 / sizeof(T), kRows = 8, kVectors = 3;
#else
    static constexpr int kLanes = 16 / sizeof(T), kRows = 6, kVectors = 2;
#endif
    static constexpr int kColumns = kLanes * kVectors;
    static_assert(kPanel % kColumns == 0 && kPanel % kRows == 0, "a panel holds whole tiles");
};

template <typename T>
struct VectorOf {
    typedef T type __attribute__((vector_size(Tile<T>::kLanes * sizeof(T)), aligned(sizeof(T)), may_alias));
};

// c[0 .. kLanes) += x; C is T or double.
template <typename C, typename T>
inline __attribute__((always_inline)) void add_to(C* c, typename VectorOf<T>::type x) {
    using V = typename VectorOf<T>::type;
    if constexpr (sizeof(C) == sizeof(T)) {
        *reinterpret_cast<V*>(c) += x;
    } else {
#if defined(__AVX512F__)
        const __m512 y = (__m512)x;
        double* low = reinterpret_cast<double*>(c);
        _mm512_storeu_pd(low, _mm512_add_pd(_mm512_loadu_pd(low), _mm512_cvtps_pd(_mm512_castps512_ps256(y))));
        _mm512_storeu_pd(low + 8,
                         _mm512_add_pd(_mm512_loadu_pd(low + 8), _mm512_cvtps_pd(_mm512_extractf32x8_ps(y, 1))));
#elif defined(__AVX2__)
        const __m256 y = (__m256)x;
        double* low = reinterpret_cast<double*>(c);
        _mm256_storeu_pd(low, _mm256_add_pd(_mm256_loadu_pd(low), _mm256_cvtps_pd(_mm256_castps256_ps128(y))));
        _mm256_storeu_pd(low + 4,
                         _mm256_add_pd(_mm256_loadu_pd(low + 4), _mm256_cvtps_pd(_mm256_extractf128_ps(y, 1))));
#else
        for (int i = 0; i < Tile<T>::kLanes; ++i) c[i] += static_cast<C>(x[i]);
#endif
    }
}

#if defined(__AVX512BF16__)
constexpr bool kHasBf16 = true;
#else
constexpr bool kHasBf16 = false;
#endif

// What panels hold: values, or pairs of bf16 samples, whose sums are float32.
template <typename E>
struct Packed {
    typedef E sum;
    static constexpr int kSamples = 1;
};
template <>
struct Packed<uint32_t> {
    typedef float sum;
    static constexpr int kSamples = 2;
};

// What a product does beside multiplying. A core converts, adds, stores and asks for memory at no cost while its
// multipliers are busy, so the sums of a tile are added to C a row at a time between the steps of the next tile, and
// the panel of the next blocks is asked into the L2.
template <typename C, typename T>
struct Aside {
    static constexpr int kLanes = Tile<T>::kLanes, kStride = Tile<T>::kColumns;
    alignas(kCacheLine) T sums[Tile<T>::kRows * kStride];  // of the last tile
    C* c = nullptr;                                        // where its next row goes
    int64_t ldc = 0;
    const T* from = nullptr;
    int rows = 0, vectors = 0;                          // still to be added; of a row
    const char *asked = nullptr, *asked_end = nullptr;  // memory that will be read

    void begin_adding(C* to, int64_t ld, int nv) {
        c = to;
        ldc = ld;
        from = sums;
        rows = Tile<T>::kRows;
        vectors = nv;
    }
    inline __attribute__((always_inline)) void add_row() {
        using V = typename VectorOf<T>::type;
        for (int j = 0; j < vectors; ++j) add_to<C, T>(c + j * kLanes, *reinterpret_cast<const V*>(from + j * kLanes));
        c += ldc;
        from += kStride;
        --rows;
    }
    // Has to be called before anybody else looks at C.
    void add_all() {
        while (rows > 0) add_row();
    }
    template <typename E>
    void ask_for(const E* panel, int64_t depth) {
        asked = reinterpret_cast<const char*>(panel);
        asked_end = reinterpret_cast<const char*>(panel + depth * kPanel);
    }
    inline __attribute__((always_inline)) void ask() {
        if (asked >= asked_end) return;
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) __builtin_prefetch(asked + i * kCacheLine, 0, 2);
        asked += 3 * kCacheLine;
    }
};

// acc[i][j] += a[i] * b[j]: one sample.
template <int NV, typename T>
inline __attribute__((always_inline)) void multiply_step(typename VectorOf<T>::type (&acc)[Tile<T>::kRows][NV],
                                                         const T* a, const T* b) {
    using V = typename VectorOf<T>::type;
    V right[NV];
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) right[j] = *reinterpret_cast<const V*>(b + j * Tile<T>::kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < Tile<T>::kRows; ++i) {
        const V left = a[i] - V{};  // a broadcast: x - 0 is x for every x, x + 0 is not (-0)
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j) acc[i][j] += left * right[j];
    }
}
#if defined(__AVX512BF16__)
// The same for a pair of bf16 samples: products are exact, sums are float32.
template <int NV>
inline __attribute__((always_inline)) void multiply_step(VectorOf<float>::type (&acc)[8][NV], const uint32_t* a,
                                                         const uint32_t* b) {
    __m512bh right[NV];
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) right[j] = (__m512bh)_mm512_loadu_si512(b + j * 16);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i]));
#pragma GCC unroll 3
        for (int j = 0; j < NV; ++j)
            acc[i][j] = (VectorOf<float>::type)_mm512_dpbf16_ps((__m512)acc[i][j], left, right[j]);
    }
}
#endif

// Steps between which something is done aside.
constexpr int64_t kRun = 16;

// c[kRows][NV * kLanes] += a^T b over k samples (or pairs of them). Registers hold the sums of kStep samples; those of
// further ones are first added up among themselves, so that C is touched once and rounding errors grow with the root of
// kStep. The sums are left to `aside`, whose own are added to their C on the way, once each kRun steps a row, while a
// row of this C is asked for.
template <typename C, typename E, int NV>
__attribute__((noinline)) void tile(int64_t k, const E* a, const E* b, C* c, int64_t ldc,
                                    Aside<C, typename Packed<E>::sum>& aside) {
    using T = typename Packed<E>::sum;
    using V = typename VectorOf<T>::type;
    constexpr int kRows = Tile<T>::kRows, kLanes = Tile<T>::kLanes, kLine = static_cast<int>(kCacheLine / sizeof(C));
    constexpr int64_t kChain = kStep / Packed<E>::kSamples;
    V acc[kRows][NV];
    const C* row = c;
    int rows_left = kRows;
    for (bool more = false;; more = true) {
        int64_t left = k < kChain ? k : kChain;
        k -= left;
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
            for (int j = 0; j < NV; ++j) acc[i][j] = V{};
        }
        while (left > 0) {
            const int64_t run = left < kRun ? left : kRun;
            left -= run;
#pragma GCC unroll 1
            for (int64_t p = 0; p < run; ++p) {
                multiply_step<NV>(acc, a, b);
                a += kPanel;
                b += kPanel;
            }
            if (rows_left == 0) {
                aside.ask();
                continue;
            }
            --rows_left;
#pragma GCC unroll 6
            for (int j = 0; j < NV * kLanes; j += kLine) __builtin_prefetch(row + j, 1, 2);
            row += ldc;
            if (aside.rows > 0) aside.add_row();
        }
        if (!more) aside.add_all();
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
            for (int j = 0; j < NV; ++j) {
                V* sum = reinterpret_cast<V*>(aside.sums + i * aside.kStride + j * kLanes);
                *sum = more ? *sum + acc[i][j] : acc[i][j];
            }
        }
        if (k == 0) break;
    }
    aside.begin_adding(c, ldc, NV);
}

// One tile of which only `rows` x `columns` entries, from vector `first` on, are wanted. `padded`: C has room for whole
// tiles, so what falls outside may be written too.
template <typename C, typename E>
void edge_tile(int64_t k, const E* a, const E* b, C* c, int64_t ldc, int rows, int first, int columns, bool padded,
               Aside<C, typename Packed<E>::sum>& aside) {
    using T = typename Packed<E>::sum;
    constexpr int kLanes = Tile<T>::kLanes, kRows = Tile<T>::kRows, kVectors = Tile<T>::kVectors;
    const int vectors = (columns + kLanes - 1) / kLanes - first;
    if (vectors <= 0) return;
    C scratch[kRows * kVectors * kLanes];
    const bool direct = padded || (rows >= kRows && columns % kLanes == 0);
    C* to = direct ? c + first * kLanes : scratch;
    const int64_t ld = direct ? ldc : kVectors * kLanes;
    if (!direct) memset(scratch, 0, sizeof scratch);
    b += first * kLanes;
    if (vectors == 1) tile<C, E, 1>(k, a, b, to, ld, aside);
    if (vectors == 2) tile<C, E, 2>(k, a, b, to, ld, aside);
    if constexpr (kVectors == 3) {
        if (vectors == 3) tile<C, E, 3>(k, a, b, to, ld, aside);
    }
    if (direct) return;
    aside.add_all();
    const int width = columns - first * kLanes;
    for (int i = 0; i < (rows < kRows ? rows : kRows); ++i) {
        for (int j = 0; j < width; ++j) c[i * ldc + first * kLanes + j] += scratch[i * kVectors * kLanes + j];
    }
}

// The same for one alone.
template <typename C, typename E>
void edge_tile(int64_t k, const E* a, const E* b, C* c, int64_t ldc, int rows, int first, int columns, bool padded) {
    Aside<C, typename Packed<E>::sum> aside;
    edge_tile<C, E>(k, a, b, c, ldc, rows, first, columns, padded, aside);
    aside.add_all();
}

// Where a product goes. ld 0: blocks of 48 x 48 in row-major order of blocks, only j >= i if symmetric.
template <typename C>
struct GramTarget {
    C* data;
    int64_t ld;
    int64_t rows, columns;  // units
    bool symmetric;         // rows are the columns: only entries on and above the diagonal are computed
    int64_t group = 0;      // of a symmetric product, units that follow each other and are not multiplied among them

    // The first column that is wanted of a row. Later rows want none before it.
    int64_t first_column(int64_t row) const {
        if (!symmetric) return 0;
        return group > 0 ? (row / group + 1) * group : row;
    }
};

// The 48 x 48 block of C at (row0, column0), of which `rows` x `columns` exist; tiles without a wanted entry are left
// out.
template <typename C, typename E>
void block_product(int64_t k, const E* a, const E* b, const GramTarget<C>& target, int64_t row0, int64_t column0, C* c,
                   int64_t ldc, int rows, int columns, bool padded, Aside<C, typename Packed<E>::sum>& aside) {
    using T = typename Packed<E>::sum;
    constexpr int kLanes = Tile<T>::kLanes, kRows = Tile<T>::kRows, kVectors = Tile<T>::kVectors;
    constexpr int kColumns = Tile<T>::kColumns;
    for (int column = 0; column < columns; column += kColumns) {
        const int wide = columns - column < kColumns ? columns - column : kColumns;
        for (int row = 0; row < rows; row += kRows) {
            const int64_t unwanted = (target.first_column(row0 + row) - column0 - column) / kLanes;
            if (unwanted >= kVectors) break;
            const int first = unwanted > 0 ? static_cast<int>(unwanted) : 0;
            C* at = c + row * ldc + column;
            if (first == 0 && wide == kColumns && (padded || rows - row >= kRows)) {
                tile<C, E, kVectors>(k, a + row, b + column, at, ldc, aside);
            } else {
                edge_tile<C, E>(k, a + row, b + column, at, ldc, rows - row, first, wide, padded, aside);
            }
        }
    }
}

inline int64_t block_index(int64_t i, int64_t j, int64_t column_blocks, bool symmetric) {
    return symmetric ? i * column_blocks - i * (i - 1) / 2 + (j - i) : i * column_blocks + j;
}

// One operand: a pointer a panel. raw[i], where it is not null, is panel i as pairs of bf16 samples ([depth / 2][48]);
// two such panels are multiplied as bf16.
template <typename T>
struct GramOperand {
    const T* const* values;
    const uint32_t* const* raw;  // null: none
};

template <typename T, typename C>
void gram_block(const GramOperand<T>& p, const GramOperand<T>& q, int64_t depth, int64_t i, int64_t j,
                const GramTarget<C>& c, Aside<C, T>& aside) {
    const int64_t row = i * kPanel, column = j * kPanel;
    const int rows = static_cast<int>(min64(kPanel, c.rows - row)),
              columns = static_cast<int>(min64(kPanel, c.columns - column));
    const bool padded = c.ld == 0;
    const int64_t ldc = padded ? kPanel : c.ld;
    C* at = padded ? c.data + block_index(i, j, ceil_div(c.columns, kPanel), c.symmetric) * kPanel * kPanel
                   : c.data + row * c.ld + column;
    if constexpr (kHasBf16 && sizeof(T) == sizeof(float)) {
        if (p.raw != nullptr && q.raw != nullptr && p.raw[i] != nullptr && q.raw[j] != nullptr) {
            block_product<C, uint32_t>((depth + 1) / 2, p.raw[i], q.raw[j], c, row, column, at, ldc, rows, columns,
                                       padded, aside);
            return;
        }
    }
    block_product<C, T>(depth, p.values[i], q.values[j], c, row, column, at, ldc, rows, columns, padded, aside);
}

// Calls run(i0, i1, j0, j1) for blocks [i0, i1) x [j0, j1) of C. A task is 4 x 8 blocks: its four row panels of 512
// floats a unit (400 KiB) and the column panel at work (100 KiB) stay in a 1 MiB L2, and a column panel is read once
// for all four. Where that leaves too few tasks to share, they get fewer columns, and only then fewer rows: tasks that
// follow each other have the same row panels, so a column panel is still read once for four. Returns false when `poll`
// asked to stop.
template <typename C, typename Run>
bool gram_tasks(int threads, int64_t depth, const GramTarget<C>& c, const Poll* poll, const Run& run) {
    const int64_t row_blocks = ceil_div(c.rows, kPanel), column_blocks = ceil_div(c.columns, kPanel);
    if (row_blocks == 0 || column_blocks == 0 || depth == 0) return true;
    // Below about 50 microseconds of work a second thread costs more than it brings.
    if (c.rows * c.columns * depth < (int64_t{1} << 22)) threads = 1;
    int64_t task_rows = 4, task_columns = 8;
    const int64_t blocks = row_blocks * column_blocks / (c.symmetric ? 2 : 1);
    while (threads > 1 && task_rows > 1 && blocks < 16 * threads * task_rows * task_columns)
        (task_columns > 1 ? task_columns : task_rows) /= 2;
    const int64_t down = ceil_div(row_blocks, task_rows), across = ceil_div(column_blocks, task_columns);
    bool stopped = false;
    parallel_each(threads, down * across, [&](int64_t task, int worker) {
        const int64_t i0 = task / across * task_rows, j0 = task % across * task_columns;
        const int64_t i1 = min64(i0 + task_rows, row_blocks), j1 = min64(j0 + task_columns, column_blocks);
        if (c.symmetric && j1 <= i0) return;
        if (worker == 0 && poll != nullptr && (*poll)()) __atomic_store_n(&stopped, true, __ATOMIC_RELAXED);
        if (__atomic_load_n(&stopped, __ATOMIC_RELAXED)) return;
        run(i0, i1, j0, j1);
    });
    return !stopped;
}

// Calls multiply(i, j) for the blocks of C.
template <typename C, typename Multiply>
bool gram_blocks(int threads, int64_t depth, const GramTarget<C>& c, const Poll* poll, const Multiply& multiply) {
    return gram_tasks(threads, depth, c, poll, [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
        for (int64_t j = j0; j < j1; ++j) {
            const int64_t last = c.symmetric ? min64(i1, j + 1) : i1;
            for (int64_t i = i0; i < last; ++i) multiply(i, j);
        }
    });
}

// C += P^T Q over samples [0, depth). Returns false when `poll` asked to stop.
template <typename T, typename C>
bool gram_product(int threads, int64_t depth, const GramOperand<T>& p, const GramOperand<T>& q, const GramTarget<C>& c,
                  const Poll* poll = nullptr) {
    const int64_t column_blocks = ceil_div(c.columns, kPanel);
    return gram_tasks(threads, depth, c, poll, [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
        Aside<C, T> aside;
        for (int64_t j = j0; j < j1; ++j) {
            const int64_t last = c.symmetric ? min64(i1, j + 1) : i1, next = j + 1;
            if (next < column_blocks) {
                if (q.raw != nullptr && q.raw[next] != nullptr) {
                    aside.ask_for(q.raw[next], (depth + 1) / 2);
                } else {
                    aside.ask_for(q.values[next], depth);
                }
            }
            for (int64_t i = i0; i < last; ++i) gram_block(p, q, depth, i, j, c, aside);
        }
        aside.add_all();
    });
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
