// The part of the CUDA runtime that the kernels of this package use, on the emulator. Unknown names do not compile.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <tuple>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace simt {
template <Index Self::* What, unsigned Index::* Axis>
struct Component {
    operator unsigned() const { return self().*What.*Axis; }
};
template <Index Self::* What>
struct Position {
    Component<What, &Index::x> x;
    Component<What, &Index::y> y;
    Component<What, &Index::z> z;
};
}  // namespace simt
inline constexpr simt::Position<&simt::Self::thread> threadIdx{};
inline constexpr simt::Position<&simt::Self::block> blockIdx{};
inline constexpr simt::Position<&simt::Self::block_size> blockDim{};
inline constexpr simt::Position<&simt::Self::grid_size> gridDim{};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

// ---- runtime ----

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorLaunchOutOfResources = 701,
    cudaErrorCooperativeLaunchTooLarge = 720
};
inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
        case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
        case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
    }
    return "unknown error";
}

using cudaStream_t = struct Stream*;

enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrCooperativeLaunch,
    cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int cooperative;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream);
cudaError_t simtFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t simtOccupancy(int* blocks, const void* kernel, int threads, size_t shared);

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
    return simtFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel* kernel, int threads, size_t shared) {
    return simtOccupancy(blocks, reinterpret_cast<const void*>(kernel), threads, shared);
}

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
    struct Call {
        void (*kernel)(P...);
        std::tuple<P...> arguments;
    };
    const Call call{kernel, std::tuple<P...>(arguments...)};
    simt::Launch launch{};
    launch.name = __PRETTY_FUNCTION__;
    launch.kernel = reinterpret_cast<const void*>(kernel);
    launch.grid = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
    launch.block = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
    launch.shared_bytes = config->dynamicSmemBytes;
    for (unsigned i = 0; i < config->numAttrs; ++i) launch.cooperative |= config->attrs[i].val.cooperative != 0;
    launch.run = [](const void* self) {
        const Call& c = *static_cast<const Call*>(self);
        std::apply(c.kernel, c.arguments);
    };
    launch.arguments = &call;
    return static_cast<cudaError_t>(simt::launch(launch));
}

// ---- barriers and warp collectives ----

inline void __syncthreads(int line = __builtin_LINE()) { simt::block_barrier(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    simt::warp_collective(simt::Op::sync, mask, 0, 0, line);
}

namespace simt {
template <typename T>
T shuffle(Op op, unsigned mask, T value, int argument, int line) {
    static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = warp_collective(op, mask, bits, argument, line);
    memcpy(&value, &bits, sizeof(T));
    return value;
}
}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int line = __builtin_LINE()) {
    return simt::shuffle(simt::Op::index, mask, value, lane, line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int by, int line = __builtin_LINE()) {
    return simt::shuffle(simt::Op::up, mask, value, by, line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int by, int line = __builtin_LINE()) {
    return simt::shuffle(simt::Op::down, mask, value, by, line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int by, int line = __builtin_LINE()) {
    return simt::shuffle(simt::Op::exclusive_or, mask, value, by, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return static_cast<unsigned>(simt::warp_collective(simt::Op::ballot, mask, predicate != 0, 0, line));
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return static_cast<int>(simt::warp_collective(simt::Op::any, mask, predicate != 0, 0, line));
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return static_cast<int>(simt::warp_collective(simt::Op::all, mask, predicate != 0, 0, line));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
    return static_cast<unsigned>(simt::warp_collective(simt::Op::add, mask, value, 0, line));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
    return static_cast<unsigned>(simt::warp_collective(simt::Op::minimum, mask, value, 0, line));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
    return static_cast<unsigned>(simt::warp_collective(simt::Op::maximum, mask, value, 0, line));
}
inline int __reduce_min_sync(unsigned mask, int value, int line = __builtin_LINE()) {
    return static_cast<int>(
        simt::warp_collective(simt::Op::minimum_signed, mask, static_cast<unsigned>(value), 0, line));
}
inline int __reduce_max_sync(unsigned mask, int value, int line = __builtin_LINE()) {
    return static_cast<int>(
        simt::warp_collective(simt::Op::maximum_signed, mask, static_cast<unsigned>(value), 0, line));
}

// ---- atomics: relaxed, as on the device, so that they order nothing else ----

template <typename T>
T atomicAdd(T* address, T value) {
    simt::pause();
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicOr(T* address, T value) {
    simt::pause();
    return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicExch(T* address, T value) {
    simt::pause();
    return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
    simt::pause();
    __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}
template <typename T>
T atomicMax(T* address, T value) {
    simt::pause();
    T before = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (before < value &&
           !__atomic_compare_exchange_n(address, &before, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return before;
}
template <typename T>
T atomicMin(T* address, T value) {
    simt::pause();
    T before = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (value < before &&
           !__atomic_compare_exchange_n(address, &before, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return before;
}

// ---- bits ----

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline long long __double_as_longlong(double x) {
    long long bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}
inline double __longlong_as_double(long long bits) {
    double x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}
