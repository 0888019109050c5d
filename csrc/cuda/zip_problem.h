// What a launch of the zip works on: inputs, results, scratch memory, and how many blocks and threads share it.
#pragma once

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/run.h"
#include "cuda/zip_check.h"
#include "cuda/zip_pairs.h"

namespace mudsc {
namespace cuda {
namespace {

constexpr int kMostThreads = 512;
constexpr int kMostWarps = kMostThreads / 32;
constexpr int64_t kStepsALaunch = 256;  // milliseconds; starting one costs some microseconds
constexpr int kTile = 32;               // of the matrix, and a chunk of rows

template <typename T>
struct alignas(16) Packet {
    T lane[16 / sizeof(T)];
};

template <typename T>
struct Params {
    const T* similarity;
    int64_t row_stride, col_stride;
    const int64_t* units;     // [problems, n]
    const int32_t* model_of;  // [problems, n]
    int n, models, merges;
    int first_step, end_step;  // of this launch
    int64_t ld;                // of work: n rounded up to a tile
    T attenuation;
    int64_t* budget;        // [problems, models]
    int64_t* block_budget;  // [problems, models]
    int64_t* owner;         // [problems, n]
    double* total;          // [problems]
    int64_t* made;          // [problems]
    int32_t* status;        // [problems]
    // scratch
    T* work;             // [problems, n, ld]
    T* best;             // [problems, n] the row's largest entry right of the diagonal
    int* partner;        // [problems, n] and its column
    int* alive;          // [problems, n]
    Pair<T>* published;  // [problems, 2, team blocks, 2]
    int64_t* left;       // [blocks, models] merges left inside each model, in each block's own copy
    Check* check;        // [problems] zeroed
};

struct Plan {
    int threads;
    int64_t team;  // blocks a problem
};

// A merge is mostly waiting: enough threads to search a row in a few rounds, and no more blocks than have rows to own.
Plan plan_of(int64_t n, int64_t problems, int multiprocessors) {
    const int threads = n <= 256 ? 64 : n <= 1024 ? 128 : n <= 4096 ? 256 : kMostThreads;
    const int64_t team = problems > 1 ? 1 : max_of(1, min_of(multiprocessors, ceil_of(n, 2 * kTile)));
    return Plan{threads, team};
}

int64_t aligned(int64_t bytes) { return ceil_of(bytes, 256) * 256; }

// Lays the scratch out, or only adds it up when there is none.
template <typename T>
int64_t carve(const ZipCudaArgs& a, int64_t blocks, Params<T>* p, char* memory) {
    int64_t used = 0;
    const auto take = [&](auto** pointer, int64_t count) {
        *pointer = reinterpret_cast<std::remove_reference_t<decltype(**pointer)>*>(memory + used);
        used += aligned(count * static_cast<int64_t>(sizeof(**pointer)));
    };
    const int64_t n = a.zip.n, rows = a.problems * n;
    p->ld = ceil_of(n, kTile) * kTile;
    take(&p->check, a.problems);
    take(&p->work, rows * p->ld);
    take(&p->best, rows);
    take(&p->partner, rows);
    take(&p->alive, rows);
    take(&p->published, 4 * blocks);
    take(&p->left, blocks * a.zip.models);
    return used;
}

}  // namespace
}  // namespace cuda
}  // namespace mudsc
