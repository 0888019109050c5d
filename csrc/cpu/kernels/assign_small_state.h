// What the two halves of the solver of few units share: the matrix, a price for each column, and who owns which column.
#pragma once

#include "cpu/kernels/assign_memory.h"
#include "cpu/kernels/assign_scan.h"
#include "cpu/parallel.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

template <class T>
struct SmallState {
    void carve(Carver& memory, int columns);
    void release_all();

    const T* row(int i) const { return s + i * stride; }
    double entry(int i, int j) const { return static_cast<double>(row(i)[j]); }
    bool is_open(int j) const { return owner[j] < 0; }
    void take(int i, int j) {
        owner[j] = i;
        open[j / 64] &= ~(uint64_t{1} << (j % 64));
    }
    template <class Fn>
    int open_among(const Fn& wanted) const;

    const T* s = nullptr;
    int64_t stride = 0;
    int n = 0;
    double* v = nullptr;       // [column, padded] prices; infinite in the padding
    double* r = nullptr;       // [column, padded] scratch
    double* price = nullptr;   // [column, padded] scratch
    int32_t* owner = nullptr;  // [column] row, or -1
    int32_t* free = nullptr;   // rows that own no column
    uint64_t* open = nullptr;  // [column / 64] bits: nobody owns it
    int free_count = 0;
};

template <class T>
void SmallState<T>::carve(Carver& memory, int columns) {
    n = columns;
    memory.take(&v, padded(n));
    memory.take(&r, padded(n));
    memory.take(&price, padded(n));
    memory.take(&owner, n);
    memory.take(&free, n);
    memory.take(&open, padded(n) / 64);
}

template <class T>
void SmallState<T>::release_all() {
    for (int j = 0; j < n; ++j) owner[j] = -1;
    for (int w = 0; w * 64 < n; ++w) open[w] = ~uint64_t{0};
    free_count = 0;
}

// A column whose bit in `wanted(first column of 64)` is set: an open one if there is one, else the first.
template <class T>
template <class Fn>
inline int SmallState<T>::open_among(const Fn& wanted) const {
    int other = 0;
    uint64_t seen = 0;
    for (int w = 0; w * 64 < n; ++w) {
        const uint64_t mask = wanted(w * 64), open_here = mask & open[w];
        if (open_here != 0) return w * 64 + __builtin_ctzll(open_here);
        if (seen == 0 && mask != 0) other = w * 64 + __builtin_ctzll(mask);
        seen |= mask;
    }
    return other;
}

template <class C>
inline uint64_t at_least(const C* x, C level) {
    constexpr int lanes = Vec<C>::lanes;
    const Vec<C> least = Vec<C>::all(level);
    uint64_t mask = 0;
    for (int k = 0; k < 64 / lanes; ++k) mask |= ge(Vec<C>::load(x + k * lanes), least) << (k * lanes);
    return mask;
}

template <class C>
inline uint64_t at_most(const C* x, Vec<C> most) {
    constexpr int lanes = Vec<C>::lanes;
    uint64_t mask = 0;
    for (int k = 0; k < 64 / lanes; ++k) mask |= ge(most, Vec<C>::load(x + k * lanes)) << (k * lanes);
    return mask;
}

// The largest s_ij - v_j of row i, exactly.
template <class T, class C>
inline double largest_reduced(const SmallState<T>& m, int i, const C* v) {
    constexpr int lanes = Vec<double>::lanes;
    const T* s = m.row(i);
    Vec<double> most[2] = {Vec<double>::all(-kFar), Vec<double>::all(-kFar)};
    int j = 0;
    for (; j + 2 * lanes <= m.n; j += 2 * lanes) {
        most[0] = vmax(Vec<double>::load(s + j) - Vec<double>::load(v + j), most[0]);
        most[1] = vmax(Vec<double>::load(s + j + lanes) - Vec<double>::load(v + j + lanes), most[1]);
    }
    for (; j < m.n; j += lanes) {
        most[0] = vmax(Vec<double>::load_some(s + j, m.n - j) - Vec<double>::load(v + j), most[0]);
    }
    return highest(vmax(most[0], most[1]));
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
