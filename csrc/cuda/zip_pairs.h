// Entries of a similarity and which of two is better; the best of a warp.
#pragma once

#include <cuda_runtime.h>
#include <math.h>

namespace mudsc {
namespace cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kNobody = 0x7fffffff;

// An entry of the matrix. Better is larger, then the first in row-major order.
template <typename T>
struct Pair {
    T value;
    int row, column;
};

template <typename T>
__device__ T nothing() {
    return -static_cast<T>(INFINITY);
}

template <typename T>
__device__ Pair<T> no_pair() {
    return Pair<T>{nothing<T>(), kNobody, kNobody};
}

template <typename T>
__device__ bool better(const Pair<T>& a, const Pair<T>& b) {
    if (a.value != b.value) return a.value > b.value;
    return a.row != b.row ? a.row < b.row : a.column < b.column;
}

template <typename T>
__device__ Pair<T> best_of_warp(Pair<T> mine) {
    for (int by = 16; by > 0; by /= 2) {
        Pair<T> other;
        other.value = __shfl_xor_sync(kAll, mine.value, by);
        other.row = __shfl_xor_sync(kAll, mine.row, by);
        other.column = __shfl_xor_sync(kAll, mine.column, by);
        if (better(other, mine)) mine = other;
    }
    return mine;
}

}  // namespace
}  // namespace cuda
}  // namespace mudsc
