// Units that are a few elements each, as the 3 x 3 kernels of a convolution's input channels. A run is moved or added
// up as one wide vector that goes past its end: what it writes there is overwritten by the next run.
#pragma once

#include "cpu/kernels/regroup_sums.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

constexpr int kWide = 16;  // elements that are added up at once

// As many as are added up at once where a run is long.
template <typename T>
constexpr int kLong = 16;
template <>
constexpr int kLong<bf16> = 32;

// Units [j0, j1) of one outer index, each `inner` elements of at most Width bytes and next to the one before, on both
// sides. `at` is where each member lies; reads of up to `readable` elements from `in` on are allowed.
template <int Width, typename T>
void move_short(T* out, const T* in, const int64_t* ptr, const int32_t* at, bool full, int64_t inner, int64_t readable,
                int64_t j0, int64_t j1, Ahead ahead) {
    constexpr int64_t size = static_cast<int64_t>(sizeof(T)), kElements = (Width + size - 1) / size;
    const int64_t safe = max64(j0, j1 - ceil_div(Width, inner * size));  // from here on a vector reaches past j1
    const int64_t last = readable - kElements, bytes = inner * size;
    T* to = out + j0 * inner;
    const auto move = [&](int64_t from, bool inside) {
        if (inside && from <= last) {
            memcpy(to, in + from, Width);
        } else {
            copy_short(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(in + from), bytes);
        }
        to += inner;
    };
    if (full) {
        int64_t j = j0;
        for (; j + Ahead::kGroup <= safe;) {
            ahead.ask(to);
            for (const int64_t stop = j + Ahead::kGroup; j < stop; ++j) move(at[j], true);
        }
        for (; j < j1; ++j) move(at[j], j < safe);
        return;
    }
    for (int64_t j = j0; j < j1; ++j) {
        if ((j - j0) % Ahead::kGroup == 0) ahead.ask(to);
        if (ptr[j] < ptr[j + 1]) {
            move(at[ptr[j]], j < safe);
        } else {
            memset(to, 0, static_cast<size_t>(bytes));
            to += inner;
        }
    }
}

// How far a pair of units reads past what it moves, to either side.
constexpr int64_t kPairMargin = 32;

// Two units of a size that is known here, as if they were one run: what would be a store for the end of each is one of
// whole vectors, the one where they meet put together from both.
template <int Bytes>
inline void move_pair(char* to, const char* a, const char* b) {
#if defined(__AVX2__)
    constexpr int vector = 32, whole = 2 * Bytes / vector * vector;
    if constexpr (whole > Bytes) {
        const auto load = [](const char* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); };
#pragma GCC unroll 8
        for (int v = 0; v < whole; v += vector) {
            __m256i x = load(v < Bytes ? a + v : b + (v - Bytes));
            if (v < Bytes && v + vector > Bytes) {
                const __m256i place = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18,
                                                       19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
                const __m256i second = _mm256_cmpgt_epi8(place, _mm256_set1_epi8(static_cast<char>(Bytes - v - 1)));
                x = _mm256_blendv_epi8(x, load(b + (v - Bytes)), second);
            }
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + v), x);
        }
        memcpy(to + whole, b + (whole - Bytes), 2 * Bytes - whole);
        return;
    }
#endif
    memcpy(to, a, Bytes);
    memcpy(to + Bytes, b, Bytes);
}

// Units of a size that is known here, each with one member: moved in pairs where kPairMargin bytes on both sides of the
// row may be read, else with nothing read or written past their ends.
template <int Bytes, typename T>
void move_exact(T* out, const T* in, const int32_t* at, int64_t j0, int64_t j1, bool pairs, Ahead ahead) {
    constexpr int64_t size = static_cast<int64_t>(sizeof(T));
    char* to = reinterpret_cast<char*>(out) + j0 * Bytes;
    const auto unit = [&](int64_t j) { return reinterpret_cast<const char*>(in) + at[j] * size; };
    int64_t j = j0;
    constexpr int64_t lines = Ahead::lines(Ahead::kGroup, Bytes);
    const bool usual = ahead.usual(Bytes, 1);
    for (; pairs && j + Ahead::kGroup <= j1;) {
        usual ? ahead.ask<lines, lines>(to) : ahead.ask(to);
        for (const int64_t stop = j + Ahead::kGroup; j < stop; j += 2, to += 2 * Bytes)
            move_pair<Bytes>(to, unit(j), unit(j + 1));
    }
    while (j < j1) {
        ahead.ask(to);
        for (const int64_t stop = min64(j + Ahead::kGroup, j1); j < stop; ++j, to += Bytes) memcpy(to, unit(j), Bytes);
    }
}

// Whether each unit of the group from j on has two members, none of them beyond `last`.
inline bool plain_pairs(const int64_t* ptr, const int32_t* at, int64_t j, int64_t last) {
    const int64_t first = ptr[j];
    int64_t uneven = 0;
    for (int64_t k = 1; k <= Ahead::kGroup; ++k) uneven |= ptr[j + k] - first - 2 * k;
    if (uneven != 0) return false;
    int32_t most = 0;
    for (int64_t k = 0; k < 2 * Ahead::kGroup; ++k) most = at[first + k] > most ? at[first + k] : most;
    return most <= last;
}

// A group of units of two members each; `Nine`: of nine elements each. Returns whether the group is to be summed again,
// exactly: rarely enough that nobody looks at each unit.
template <typename T, bool Nine, bool Exact, typename Factor>
inline bool sum_pairs(T* to, const T* in, const int32_t* at, const Factor& factor, int64_t inner, int64_t j) {
    constexpr bool tail = Nine && sizeof(T) >= 4;  // eight elements and one
    bool again = false;
    for (int64_t k = 0; k < Ahead::kGroup; ++k, to += Nine ? 9 : inner) {
        const T *x = in + at[2 * k], *y = in + at[2 * k + 1];
        const auto by = factor(j + k);
        Sum<T, (tail ? 8 : kWide) * static_cast<int>(sizeof(T))> sum;
        sum.start(x);
        sum.add(y);
        if (Exact) {
            sum.exact(to, by);
        } else {
            again |= sum.quick(to, by);
        }
        if constexpr (tail) to[8] = (x[8] + y[8]) * by;
    }
    return again;
}

// The same as move_short, summed and scaled, for units of at most kWide elements.
template <typename T, typename Factor>
void sum_short(T* out, const T* in, const int64_t* ptr, const int32_t* at, const Factor& factor, int64_t inner,
               int64_t readable, int64_t j0, int64_t j1, Ahead ahead) {
    const int64_t safe = max64(j0, j1 - ceil_div(kWide, inner)), last = readable - kWide;
    const size_t bytes = static_cast<size_t>(inner) * sizeof(T);
    const bool usual = inner == 9 && ahead.usual(static_cast<int64_t>(bytes), 2);
    T part[kWide] = {};
    T* to = out + j0 * inner;
    int64_t m = ptr[j0];
    for (int64_t j = j0; j < j1;) {
        const bool pairs = j + Ahead::kGroup <= safe && plain_pairs(ptr, at, j, last);  // the usual zip
        if (pairs && usual) {
            constexpr int64_t nine = 9 * static_cast<int64_t>(sizeof(T));
            ahead.ask<Ahead::lines(Ahead::kGroup * 2, nine), Ahead::lines(Ahead::kGroup, nine)>(to);
        } else {
            ahead.ask(to);
        }
        if (pairs) {
            if (inner == 9) {
                if (sum_pairs<T, true, false>(to, in, at + m, factor, inner, j))
                    sum_pairs<T, true, true>(to, in, at + m, factor, inner, j);
            } else {
                if (sum_pairs<T, false, false>(to, in, at + m, factor, inner, j))
                    sum_pairs<T, false, true>(to, in, at + m, factor, inner, j);
            }
            j += Ahead::kGroup;
            m += 2 * Ahead::kGroup;
            to += Ahead::kGroup * inner;
            continue;
        }
        for (const int64_t stop = min64(j + Ahead::kGroup, j1); j < stop; ++j, to += inner) {
            Sum<T, kWide* static_cast<int>(sizeof(T))> sum;
            for (const int64_t end = ptr[j + 1]; m < end; ++m) {
                if (at[m] <= last) {
                    sum.add(in + at[m]);
                } else {
                    memcpy(part, in + at[m], bytes);
                    sum.add(part);
                }
            }
            const auto by = factor(j);
            if (j < safe) {
                store_sum(sum, to, by);
            } else {
                store_sum(sum, part, by);
                memcpy(to, part, bytes);
            }
        }
    }
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
