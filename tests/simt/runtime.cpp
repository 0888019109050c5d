// Launches, and the part of the CUDA runtime that launchers use.
#include <stdlib.h>
#include <string.h>

#include "emulator.h"

namespace simt {
namespace {
int device_in_use = 0;
}

const Launch* launching;
Block* blocks;
int n_blocks, grid_arrived, grid_line, grid_barriers;
bool grid_left;
char grid_tag[2], start_tag, launch_tag;

namespace {

struct Limit {
    const void* kernel;
    int bytes;
};
Limit limits[64];
int n_limits;

}  // namespace

int dynamic_limit(const void* kernel) {
    for (int i = 0; i < n_limits; ++i) {
        if (limits[i].kernel == kernel) return limits[i].bytes;
    }
    return static_cast<int>(kSharedWithoutAsking);
}

int injected(const char* call) {
    return options().fail_call != nullptr && strcmp(options().fail_call, call) == 0 ? options().fail_code : 0;
}

int launch(const Launch& l) {
    if (const int code = injected("cudaLaunchKernelEx")) return code;
    if (l.grid.x == 0 || l.block.x == 0 || l.block.x > kMaxThreads || l.block.x % kLanes != 0)
        return cudaErrorInvalidConfiguration;
    if (l.grid.y * l.grid.z * l.block.y * l.block.z != 1) return cudaErrorInvalidConfiguration;
    if (l.shared_bytes > static_cast<size_t>(dynamic_limit(l.kernel))) return cudaErrorInvalidValue;
    int room = 0;
    simtOccupancy(&room, l.kernel, static_cast<int>(l.block.x), l.shared_bytes);
    const int resident = room * options().multiprocessors;
    if (resident == 0) return cudaErrorLaunchOutOfResources;
    if (l.cooperative && static_cast<int64_t>(l.grid.x) > resident) return cudaErrorCooperativeLaunchTooLarge;
    if (device_in_use != options().device) fail("a launch on device %d instead of %d", device_in_use, options().device);
    launching = &l;
    switches_before = switches;
    n_blocks = static_cast<int>(l.grid.x);
    blocks = static_cast<Block*>(calloc(static_cast<size_t>(n_blocks), sizeof(Block)));
    seed_schedule();
    int started = 0, ended = 0;
    grid_arrived = grid_barriers = 0;
    grid_left = false;
#ifdef SIMT_TSAN
    main_fiber.tsan = __tsan_get_current_fiber();
    forget_shared_memory();
    if (static_cast<size_t>(n_blocks) * l.block.x > kMostFibers) fail("too many threads for TSan");
#endif
    int* order = static_cast<int*>(malloc(static_cast<size_t>(n_blocks) * sizeof(int)));
    for (int i = 0; i < n_blocks; ++i) {
        const int j = static_cast<int>(random_bits() % static_cast<uint64_t>(i + 1));
        order[i] = order[j];
        order[j] = i;
    }
    while (ended < n_blocks) {
        while (started < n_blocks && started - ended < resident) start_block(order[started++]);
        Fiber* next = next_ready();
        if (next == nullptr) report_deadlock();
        switch_to(next);
        for (int i = 0; i < n_blocks; ++i) {
            Block& b = blocks[i];
            if (b.fibers == nullptr || b.gone != b.threads || b.threads == 0) continue;
            b.gone = b.threads + 1;
            ++ended;
            end_block(b, false);
        }
    }
    acquire(&launch_tag);
    for (int i = 0; i < n_blocks; ++i) end_block(blocks[i], true);
    free(order);
    free(blocks);
    launching = nullptr;
    return cudaSuccess;
}

}  // namespace simt

// ---- the runtime ----

namespace {
constexpr int kDevices = 2;
}

cudaError_t cudaGetDevice(int* device) {
    if (const int code = simt::injected("cudaGetDevice")) return static_cast<cudaError_t>(code);
    *device = simt::device_in_use;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    if (const int code = simt::injected("cudaSetDevice")) return static_cast<cudaError_t>(code);
    if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
    simt::device_in_use = device;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    if (const int code = simt::injected("cudaDeviceGetAttribute")) return static_cast<cudaError_t>(code);
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = simt::options().multiprocessors; break;
        case cudaDevAttrCooperativeLaunch: *value = 1; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(simt::kSharedMost); break;
    }
    return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return static_cast<cudaError_t>(simt::injected("cudaStreamSynchronize"));  // launches have ended when they return
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
    if (const int code = simt::injected("cudaMemsetAsync")) return static_cast<cudaError_t>(code);
    memset(memory, value, bytes);
    return cudaSuccess;
}
cudaError_t simtFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
    if (const int code = simt::injected("cudaFuncSetAttribute")) return static_cast<cudaError_t>(code);
    if (value > static_cast<int>(simt::kSharedMost)) return cudaErrorInvalidValue;
    if (simt::n_limits == 64) simt::fail("more than 64 kernels with a limit of their own");
    for (int i = 0; i < simt::n_limits; ++i) {
        if (simt::limits[i].kernel != kernel) continue;
        simt::limits[i].bytes = value;
        return cudaSuccess;
    }
    simt::limits[simt::n_limits++] = {kernel, value};
    return cudaSuccess;
}
// Two blocks a multiprocessor where shared memory and 2048 threads allow it: few enough to emulate.
cudaError_t simtOccupancy(int* blocks, const void*, int threads, size_t shared) {
    if (const int code = simt::injected("cudaOccupancyMaxActiveBlocksPerMultiprocessor"))
        return static_cast<cudaError_t>(code);
    *blocks = threads <= 1024 && 2 * shared <= simt::kSharedMost ? 2 : 1;
    return cudaSuccess;
}
