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

// Units of a size that is known here, each with one member: moved as the fewest vectors that make it up, with nothing
// read or written past their ends.
template <int Bytes, typename T>
void move_exact(T* out, const T* in, const int32_t* at, int64_t j0, int64_t j1, Ahead ahead) {
    constexpr int64_t size = static_cast<int64_t>(sizeof(T));
    char* to = reinterpret_cast<char*>(out) + j0 * Bytes;
    for (int64_t j = j0; j < j1;) {
        ahead.ask();
        for (const int64_t stop = min64(j + Ahead::kGroup, j1); j < stop; ++j, to += Bytes)
            memcpy(to, reinterpret_cast<const char*>(in) + at[j] * size, Bytes);
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
    T part[kWide] = {};
    T* to = out + j0 * inner;
    int64_t m = ptr[j0];
    for (int64_t j = j0; j < j1;) {
        ahead.ask();
        if (j + Ahead::kGroup <= safe && plain_pairs(ptr, at, j, last)) {  // the usual zip
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
