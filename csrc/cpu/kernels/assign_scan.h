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

// Calls fn(vector of r, first column) for a whole row; lanes past its end hold minus infinity. All entries are added to
// `sums`: what is not finite leaves it so. Sums, and as many of them, measured best: processors often add beside
// maxima.
template <bool priced, bool checked, int count, class T, class C, class Fn>
inline void for_reduced(const T* row,    // [n]
                        const C* price,  // [padded(n)], infinite in the padding
                        int n, Vec<C> (&sums)[count], const Fn& fn) {
    constexpr int lanes = Vec<C>::lanes;
    const auto run = [&](const T* s, int j) {
        for (int k = 0; k < kRun / lanes; ++k) {
            Vec<C> x = Vec<C>::load(s + k * lanes);
            if (checked) sums[k % count] = sums[k % count] + x;
            if (priced) x = x - Vec<C>::load(price + j + k * lanes);
            fn(x, j, k);
        }
    };
    int j = 0;
    for (; j + kRun <= n; j += kRun) run(row + j, j);
    if (j < n) {
        T tail[kRun];
        for (int k = 0; k < kRun; ++k) tail[k] = 0;
        memcpy(tail, row + j, static_cast<size_t>(n - j) * sizeof(T));
        run(tail, j);
    }
}

template <class T>
__attribute__((noinline, cold)) bool all_finite(const T* row, int n) {
    for (int j = 0; j < n; ++j) {
        if (!(row[j] - row[j] == 0)) return false;
    }
    return true;
}

// Whether a sum shows that all that went into it is finite. Sums of finite numbers may overflow too.
template <class C>
inline bool shows_finite(Vec<C> sum) {
    const Vec<C> nothing = Vec<C>::all(0);
    return ge(sum * nothing, nothing) == (uint64_t{1} << Vec<C>::lanes) - 1;  // only NaN is not equal to zero here
}

// The largest r of each group.
template <bool priced, bool checked, class T, class C>
inline void group_maxima(const T* row, const C* price, int n,
                         C* best,         // [kRun]
                         bool* finite) {  // set to false when the row holds NaN or an infinity
    constexpr int lanes = Vec<C>::lanes, count = kRun / lanes, few = count < 8 ? 2 : 4;
    Vec<C> top[count], sums[few];
    for (Vec<C>& x : sums) x = Vec<C>::all(0);
    for (int k = 0; k < count; ++k) top[k] = Vec<C>::all(static_cast<C>(-INFINITY));
    for_reduced<priced, checked>(row, price, n, sums, [&](Vec<C> r, int, int k) { top[k] = vmax(r, top[k]); });
    for (int k = 0; k < count; ++k) top[k].store(best + k * lanes);
    if (!checked) return;
    Vec<C> sum = sums[0] + sums[1];
    for (int k = 2; k < few; ++k) sum = sum + sums[k];
    if (!shows_finite(sum) && !all_finite(row, n)) *finite = false;
}

// Writes the columns with r >= level, or only those equal to it, in rising order from column `from` to the end of the
// row, and stops soon after `room` are found; returns how many.
template <bool equal, bool priced, class T, class C>
inline int find_columns(const T* row, const C* price, int n, C level, int from, int room,
                        int32_t* out) {  // [room + kRun]
    constexpr int lanes = Vec<C>::lanes;
    const Vec<C> least = Vec<C>::all(level);
    int found = 0;
    const auto run = [&](const T* s, int j) {
        uint64_t mask = 0;
        for (int k = 0; k < kRun / lanes; ++k) {
            Vec<C> x = Vec<C>::load(s + k * lanes);
            if (priced) x = x - Vec<C>::load(price + j + k * lanes);
            uint64_t hit = ge(x, least);
            if (equal) hit &= ge(least, x);
            mask |= hit << (k * lanes);
        }
        return mask;
    };
    int j = from / kRun * kRun;
    uint64_t wanted = ~uint64_t{0} << (from - j);
    for (; j + kRun <= n; j += kRun) {
        uint64_t mask = run(row + j, j) & wanted;
        wanted = ~uint64_t{0};
        for (; mask != 0; mask &= mask - 1) out[found++] = j + __builtin_ctzll(mask);
        if (found >= room) return found;
    }
    if (j < n) {
        T tail[kRun];
        for (int k = 0; k < kRun; ++k) tail[k] = 0;
        memcpy(tail, row + j, static_cast<size_t>(n - j) * sizeof(T));
        uint64_t mask = run(tail, j) & wanted & ((uint64_t{1} << (n - j)) - 1);
        for (; mask != 0; mask &= mask - 1) out[found++] = j + __builtin_ctzll(mask);
    }
    return found;
}

template <bool priced, class T, class C>
inline int columns_above(const T* row, const C* price, int n, C level, int from, int room, int32_t* out) {
    return find_columns<false, priced>(row, price, n, level, from, room, out);
}

// The same for equal columns, at most `room` of them.
template <bool priced, class T, class C>
inline int columns_equal(const T* row, const C* price, int n, C level, int from, int room, int32_t* out) {
    if (room <= 0) return 0;
    const int found = find_columns<true, priced>(row, price, n, level, from, room, out);
    return found < room ? found : room;
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
    const auto step = [&](Vec<double> s, int j, int k) {
        const Vec<double> length = at - (s - Vec<double>::load(v + j));
        const Vec<double> old = Vec<double>::load(key + j);
        const uint64_t shorter = gt(old, length);
        const Vec<double> best = vmin(length, old);
        best.store(key + j);
        put_where(shorter, i, from + j);
        least[k] = vmin(best, least[k]);
    };
    int j = 0;
    for (; j + 2 * lanes <= n; j += 2 * lanes) {
        step(Vec<double>::load(row + j), j, 0);
        step(Vec<double>::load(row + j + lanes), j + lanes, 1);
    }
    for (; j < n; j += lanes) {
        step(Vec<double>::load_some(row + j, n - j), j, 0);
    }
    return lowest(vmin(least[0], least[1]));
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

// The k-th largest (from 1) of `groups` maxima, after kRun of them are folded into `groups`; *top is the largest.
template <int groups, class C>
inline C kth_maximum(C* best,  // [kRun], overwritten
                     int k, C* top) {
    for (int half = kRun / 2; half >= groups; half /= 2) {
        for (int a = 0; a < half; ++a) best[a] = best[a] > best[a + half] ? best[a] : best[a + half];
    }
    int32_t above[groups];
    for (int a = 0; a < groups; ++a) above[a] = 0;
    for (int b = 0; b < groups; ++b) {
        const C x = best[b];
        for (int a = 0; a < groups; ++a) above[a] += x > best[a] ? 1 : 0;
    }
    constexpr int lanes = Vec<C>::lanes;
    C chosen[groups], other[groups];
    for (int a = 0; a < groups; ++a) {
        chosen[a] = above[a] < k ? best[a] : static_cast<C>(INFINITY);
        other[a] = -best[a];
    }
    Vec<C> least = Vec<C>::load(chosen), most = Vec<C>::load(other);
    for (int a = lanes; a < groups; a += lanes) {
        least = vmin(Vec<C>::load(chosen + a), least);
        most = vmin(Vec<C>::load(other + a), most);
    }
    *top = -lowest(most);
    return lowest(least);
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
