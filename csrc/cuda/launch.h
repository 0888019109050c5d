// The launchers of the CUDA kernels. Each sets the device, runs on the caller's stream, and returns an empty string or
// what went wrong.
#pragma once

#include <string>

#include "cpu/kernels.h"

namespace mudsc {
namespace cuda {

// The same arguments as on the CPU; in, out, ptr, members and scale are device memory, shape and strides host memory.
std::string regroup(const RegroupArgs& args, int device, void* stream);

}  // namespace cuda
}  // namespace mudsc
