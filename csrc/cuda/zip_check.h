// What a zip's similarity is checked for while it is loaded: entries that are not finite, halves that are not alike.
#pragma once

#include <cuda_runtime.h>
#include <math.h>

#include "cuda/launch.h"
#include "cuda/zip_pairs.h"

namespace mudsc {
namespace cuda {
namespace {

constexpr double kSymmetryTolerance = 1e-4;  // of the largest magnitude: more is not rounding

// What the loading of one problem found, as bits of doubles that are >= 0, so that they order as integers; and, between
// two launches, the row merged last.
struct Check {
    unsigned long long largest, difference;
    unsigned bad;
    int last;
};

// What one thread found.
struct Seen {
    double largest = 0, difference = 0;
    unsigned bad = 0;

    template <typename T>
    __device__ void note(T x) {
        const T magnitude = x < 0 ? -x : x;
        if (!(magnitude < static_cast<T>(INFINITY))) bad = 1;  // NaN compares false
        if (static_cast<double>(magnitude) > largest) largest = static_cast<double>(magnitude);
    }

    template <typename T>
    __device__ void compare(T upper, T lower) {
        const T gap = upper > lower ? upper - lower : lower - upper;
        if (static_cast<double>(gap) > difference) difference = static_cast<double>(gap);
    }

    // All threads of a warp together.
    __device__ void add_to(Check* check, int thread) {
        for (int by = 16; by > 0; by /= 2) {
            const double l = __shfl_xor_sync(kAll, largest, by);
            const double d = __shfl_xor_sync(kAll, difference, by);
            const unsigned b = __shfl_xor_sync(kAll, bad, by);
            largest = l > largest ? l : largest;
            difference = d > difference ? d : difference;
            bad |= b;
        }
        if (thread % 32 != 0) return;
        atomicMax(&check->largest, static_cast<unsigned long long>(__double_as_longlong(largest)));
        atomicMax(&check->difference, static_cast<unsigned long long>(__double_as_longlong(difference)));
        atomicOr(&check->bad, bad);
    }
};

// Whether the zip begins, once all threads have added what they found.
__device__ int verdict(const Check& check) {
    const double largest = __longlong_as_double(static_cast<long long>(check.largest));
    const double difference = __longlong_as_double(static_cast<long long>(check.difference));
    if (check.bad != 0) return kZipNotFinite;
    return difference > kSymmetryTolerance * largest ? kZipNotSymmetric : kZipOk;
}

}  // namespace
}  // namespace cuda
}  // namespace mudsc
