// Scans of one row of the matrix: reduced values r_j = s_j - v_j, their largest, and the columns above a threshold.
#pragma once

#include "cpu/common.h"
#include "cpu/kernels/assign_simd.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

// Rows are scanned in runs of this many columns; arrays beside a row are padded to a multiple of it. Column j belongs
// to group j % kRun on every instruction set, so that all of them build the same lists.
constexpr int kRun = 64;

inline int padded(int n) { return (n + kRun - 1) / kRun * kRun; }

// The largest r of each group, for prices v (infinite in the padding; null: all zero). *bad is added to: it ends
// up NaN when the row holds NaN or an infinity.
template <bool checked, class T, class C>
inline void group_maxima(const T* row,    // [n]
                         const C* price,  // [padded(n)] or null
                         int n,
                         C* best,  // [kRun]
                         C* bad) {
    constexpr int lanes = Vec<C>::lanes, count = kRun / lanes;
    const Vec<C> nothing = Vec<C>::all(0);
    Vec<C> top[count], zero[2] = {nothing, nothing};
    for (int k = 0; k < count; ++k) top[k] = Vec<C>::all(static_cast<C>(-INFINITY));
    int j = 0;
    for (; j + kRun <= n; j += kRun) {
        for (int k = 0; k < count; ++k) {
            Vec<C> x = Vec<C>::load(row + j + k * lanes);
            if (checked) zero[k % 2] = x * nothing + zero[k % 2];
            if (price != nullptr) x = x - Vec<C>::load(price + j + k * lanes);
            top[k] = vmax(x, top[k]);
        }
    }
    if (j < n) {
        T tail[kRun];
        for (int k = 0; k < kRun; ++k) tail[k] = static_cast<T>(-INFINITY);
        memcpy(tail, row + j, static_cast<size_t>(n - j) * sizeof(T));
        for (int k = 0; k < count; ++k) {
            Vec<C> x = Vec<C>::load(tail + k * lanes);
            if (price != nullptr) x = x - Vec<C>::load(price + j + k * lanes);
            top[k] = vmax(x, top[k]);
        }
        if (checked) {
            C sum = 0;
            for (; j < n; ++j) sum += static_cast<C>(row[j]) * 0;
            *bad += sum;
        }
    }
    for (int k = 0; k < count; ++k) top[k].store(best + k * lanes);
    if (checked) {
        C lane[lanes];
        (zero[0] + zero[1]).store(lane);
        for (int k = 0; k < lanes; ++k) *bad += lane[k];
    }
}

// Writes the columns with s_j - price_j >= level in rising order, returns how many.
template <class T, class C>
inline int columns_above(const T* row,    // [n]
                         const C* price,  // [padded(n)] or null
                         int n, C level,
                         int32_t* out) {  // [n]
    constexpr int lanes = Vec<C>::lanes;
    const Vec<C> least = Vec<C>::all(level);
    int found = 0;
    const auto run = [&](const T* s, int j) {
        uint64_t mask = 0;
        for (int k = 0; k < kRun / lanes; ++k) {
            Vec<C> x = Vec<C>::load(s + k * lanes);
            if (price != nullptr) x = x - Vec<C>::load(price + j + k * lanes);
            mask |= ge(x, least) << (k * lanes);
        }
        return mask;
    };
    int j = 0;
    for (; j + kRun <= n; j += kRun) {
        for (uint64_t mask = run(row + j, j); mask != 0; mask &= mask - 1) out[found++] = j + __builtin_ctzll(mask);
    }
    if (j < n) {
        T tail[kRun];
        memset(tail, 0, sizeof tail);
        memcpy(tail, row + j, static_cast<size_t>(n - j) * sizeof(T));
        uint64_t mask = run(tail, j) & ((uint64_t{1} << (n - j)) - 1);
        for (; mask != 0; mask &= mask - 1) out[found++] = j + __builtin_ctzll(mask);
    }
    return found;
}

// One step of a shortest path search over all columns: through row i column j is at level - (s_j - v_j). Lowers `key`
// and notes i in `from` where that is shorter; returns the smallest key. v is infinite where a column is out.
template <class T>
inline double shorten(const T* row, const double* v, int n, double level, int i,
                      double* key,      // [padded(n)], infinite in the padding
                      int32_t* from) {  // [padded(n)]
    constexpr int lanes = Vec<double>::lanes;
    const Vec<double> at = Vec<double>::all(level);
    Vec<double> least[2] = {Vec<double>::all(static_cast<double>(INFINITY)),
                            Vec<double>::all(static_cast<double>(INFINITY))};
    const auto step = [&](const T* s, int j, int k) {
        const Vec<double> length = at - (Vec<double>::load(s) - Vec<double>::load(v + j));
        const Vec<double> old = Vec<double>::load(key + j);
        const uint64_t shorter = gt(old, length);
        const Vec<double> best = vmin(length, old);
        best.store(key + j);
        put_where(shorter, i, from + j);
        least[k] = vmin(best, least[k]);
    };
    int j = 0;
    for (; j + 2 * lanes <= n; j += 2 * lanes) {
        step(row + j, j, 0);
        step(row + j + lanes, j + lanes, 1);
    }
    for (; j < n; j += lanes) {
        T tail[lanes];
        memset(tail, 0, sizeof tail);
        memcpy(tail, row + j, static_cast<size_t>(n - j < lanes ? n - j : lanes) * sizeof(T));
        step(tail, j, 0);
    }
    double lane[lanes], result = static_cast<double>(INFINITY);
    vmin(least[0], least[1]).store(lane);
    for (int k = 0; k < lanes; ++k) result = lane[k] < result ? lane[k] : result;
    return result;
}

// The first position of a value that is there.
inline int position_of(double value, const double* x) {
    constexpr int lanes = Vec<double>::lanes;
    const Vec<double> least = Vec<double>::all(value);
    for (int j = 0;; j += 2 * lanes) {
        const uint64_t low = ge(least, Vec<double>::load(x + j)), high = ge(least, Vec<double>::load(x + j + lanes));
        const uint64_t mask = low | high << lanes;
        if (mask != 0) return j + __builtin_ctzll(mask);
    }
}

// The k-th largest (from 1) of `groups` maxima, after kRun of them are folded into `groups`.
template <int groups, class C>
inline C kth_maximum(C* best,  // [kRun], overwritten
                     int k) {
    for (int half = kRun / 2; half >= groups; half /= 2) {
        for (int a = 0; a < half; ++a) best[a] = best[a] > best[a + half] ? best[a] : best[a + half];
    }
    int32_t above[groups];
    for (int a = 0; a < groups; ++a) above[a] = 0;
    for (int b = 0; b < groups; ++b) {
        const C x = best[b];
        for (int a = 0; a < groups; ++a) above[a] += x > best[a] ? 1 : 0;
    }
    C least = static_cast<C>(INFINITY);
    for (int a = 0; a < groups; ++a) {
        const C x = above[a] < k ? best[a] : static_cast<C>(INFINITY);
        least = x < least ? x : least;
    }
    return least;
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
