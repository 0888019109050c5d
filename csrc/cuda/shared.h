// Shared memory is taken through these two functions alone, so that the emulator of the tests can give each block its
// own.
#pragma once

namespace mudsc {
namespace cuda {

// One T for each block; a kernel that calls this twice with one T gets the same.
template <typename T>
__device__ T& static_shared() {
    __shared__ T memory;
    return memory;
}

// The bytes that the launch asked for, aligned to 16.
template <typename T>
__device__ T* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char memory[];
    return reinterpret_cast<T*>(memory);
}

}  // namespace cuda
}  // namespace mudsc
