#include "toys.h"

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "cuda/run.h"
#include "cuda/shared.h"

namespace {

using mudsc::cuda::dynamic_shared;
using mudsc::cuda::Shape;

constexpr unsigned kAll = 0xffffffffu;

// ---- right: 64 or 128 threads, results in memory ----

__global__ void collectives(int* memory) {
    const int t = static_cast<int>(threadIdx.x), lane = t % 32;
    int* out = memory + t * 16;
    out[0] = __shfl_sync(kAll, t, 5);
    out[1] = __shfl_up_sync(kAll, t, 1);
    out[2] = __shfl_down_sync(kAll, t, 2);
    out[3] = __shfl_xor_sync(kAll, t, 7);
    out[4] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
    out[5] = __any_sync(kAll, lane == 31);
    out[6] = __all_sync(kAll, lane < 31);
    out[7] = static_cast<int>(__reduce_add_sync(kAll, static_cast<unsigned>(lane)));
    out[8] = static_cast<int>(__reduce_max_sync(kAll, static_cast<unsigned>(t)));
    out[9] = __reduce_min_sync(kAll, -t);
    out[10] = __popc(static_cast<unsigned>(t));
    const double wide = __shfl_xor_sync(kAll, static_cast<double>(t) / 3, 1);
    out[11] = static_cast<int>(wide * 3 + 0.5);
    if (lane < 16) {
        out[12] = __shfl_xor_sync(0xffffu, t, 8);
    } else {
        out[12] = __shfl_xor_sync(0xffff0000u, t, 4);
    }
    out[13] = __ffs(t);
    out[14] = __clz(t);
}

__global__ void neighbours(int* memory) {
    int* shared = dynamic_shared<int>();
    const int t = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
    for (int round = 0; round < 4; ++round) {
        shared[t] = t + round;
        __syncthreads();
        atomicAdd(memory + t, shared[(t + 1) % n]);
        __syncthreads();
    }
}

__global__ void whole_grid(int* memory) {
    const int t = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    const int n = static_cast<int>(gridDim.x * blockDim.x);
    memory[t] = t;
    cooperative_groups::this_grid().sync();
    const int next = memory[(t + 65) % n];
    cooperative_groups::this_grid().sync();
    memory[t] = next;
}

// ---- wrong, each in its own way ----

__global__ void divergent_barrier(int*) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

__global__ void early_return(int*) {
    if (threadIdx.x == 3) return;
    __syncthreads();
}

__global__ void absent_lane(int*) {
    if (threadIdx.x % 32 == 3) return;
    __syncwarp();
}

__global__ void mask_without_self(int*) { __syncwarp(0xfffffffeu); }

__global__ void mixed_waits(int*) {
    if (threadIdx.x % 32 == 0) {
        __syncwarp();
    } else {
        __syncthreads();
    }
}

__global__ void grid_barrier_of_one_block(int*) { cooperative_groups::this_grid().sync(); }

__global__ void beyond_shared(int* memory) {
    int* shared = dynamic_shared<int>();
    memory[threadIdx.x] = shared[threadIdx.x + blockDim.x];
}

__global__ void misaligned(int* memory) {
    struct alignas(16) Four {
        int x[4];
    };
    memory[threadIdx.x] = reinterpret_cast<Four*>(memory + 1)->x[0];
}

__global__ void beyond_memory(int* memory) { memory[threadIdx.x] = memory[16 * blockDim.x + threadIdx.x]; }

// The value is right under every schedule here; only the order is missing.
__global__ void silent_race(int* memory) {
    int* shared = dynamic_shared<int>();
    if (threadIdx.x == 0) shared[0] = 7;
    if (threadIdx.x == 63) memory[0] = shared[0] / 8;  // 0 of 7 and of the garbage before it, which is -1
}

__global__ void race_between_blocks(int* memory) {
    if (threadIdx.x == 0) memory[0] = 5;
}

}  // namespace

std::string run_toy(int number, int* memory) {
    Shape one{1, 64, 64 * sizeof(int)}, three{3, 64};
    three.cooperative = true;
    const auto go = [&](void (*kernel)(int*), const Shape& shape) {
        return mudsc::cuda::launch("toy", kernel, shape, nullptr, memory);
    };
    switch (number) {
        case 0: return go(collectives, one);
        case 1: return go(neighbours, one);
        case 2: return go(whole_grid, three);
        case 3: return go(divergent_barrier, one);
        case 4: return go(early_return, one);
        case 5: return go(absent_lane, one);
        case 6: return go(mask_without_self, one);
        case 7: return go(mixed_waits, one);
        case 8: return go(grid_barrier_of_one_block, one);
        case 9: return go(beyond_shared, one);
        case 10: return go(misaligned, one);
        case 11: return go(beyond_memory, one);
        case 12: return go(silent_race, one);
        case 13: return go(race_between_blocks, Shape{2, 64});
        case 14: three.blocks = 100; return go(whole_grid, three);
        case 15: one.threads = 2048; return go(neighbours, one);
        case 16: one.shared_bytes = 300 * 1024; return go(neighbours, one);
        default: return "no such toy";
    }
}
