// What every launcher does: the device set and put back, one checked launch on the caller's stream, errors as text that
// names the kernel.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <string>

namespace mudsc {
namespace cuda {

inline std::string describe(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return {};
    std::string text = std::string(what) + ": " + cudaGetErrorString(error);
    if (error == cudaErrorInsufficientDriver) {
        text += "; update the NVIDIA driver, or build mudsc_fast with a CUDA toolkit that the driver supports";
    } else if (error == cudaErrorNoKernelImageForDevice) {
        text += "; build mudsc_fast with this GPU's architecture in MUDSC_FAST_CUDA_ARCHS";
    }
    return text;
}

// Makes a device the current one for as long as it lives.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        error_ = cudaGetDevice(&before_);
        if (error_ == cudaSuccess) error_ = cudaSetDevice(device);
        changed_ = error_ == cudaSuccess;
        if (changed_) error_ = cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device);
        if (error_ == cudaSuccess)
            error_ = cudaDeviceGetAttribute(&shared_bytes_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    std::string error() const { return describe(error_, "device"); }
    int multiprocessors() const { return multiprocessors_; }
    int64_t shared_bytes() const { return shared_bytes_; }  // that one block may have

  private:
    cudaError_t error_;
    int before_ = 0, multiprocessors_ = 0, shared_bytes_ = 0;
    bool changed_ = false;
};

struct Shape {
    int64_t blocks;
    int threads;
    size_t shared_bytes = 0;  // dynamic
    bool cooperative = false;
};

template <typename... P, typename... A>
std::string launch(const char* name, void (*kernel)(P...), const Shape& shape, void* stream, const A&... arguments) {
    if (shape.shared_bytes > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(shape.shared_bytes));
        if (error != cudaSuccess) return describe(error, name);
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = shape.cooperative ? 1 : 0;
    const cudaError_t launched = cudaLaunchKernelEx(&config, kernel, arguments...);
    const cudaError_t pending = cudaGetLastError();  // cleared, so that nobody else is blamed for it
    return describe(launched != cudaSuccess ? launched : pending, name);
}

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cuda
}  // namespace mudsc
