// The launchers of the CUDA kernels. Each sets the device, runs on the caller's stream, allocates nothing, and returns
// an empty string or what went wrong, with the kernel's name. All pointers are device memory but for shapes and
// strides.
#pragma once

#include <string>

#include "cpu/kernels.h"

namespace mudsc {
namespace cuda {

// The same arguments as on the CPU. length: of in's unit axis. single: every unit has exactly one member, so that ptr
// is not read.
std::string regroup(const RegroupArgs& args, int64_t length, bool single, int device, void* stream);

enum ZipStatus : int32_t { kZipOk, kZipNotFinite, kZipNotSymmetric, kZipInfeasible };

// Problems of one size over one similarity. Of `zip`, units, model_of, budget, block_budget, owner, total and made hold
// one piece a problem, one after another; threads and poll are not used.
struct ZipCudaArgs {
    ZipArgs zip;
    int64_t problems;
    int32_t* status;  // [problems] out: a ZipStatus
    void* scratch;    // aligned to 256 bytes
    int64_t scratch_bytes;
    int64_t steps_a_launch = 0;  // merges; 0: the launcher's choice
};
int64_t zip_scratch_bytes(const ZipCudaArgs& args);
std::string zip(const ZipCudaArgs& args, int device, void* stream);

constexpr int64_t kSmallAssign = 256;  // the largest n of assign
enum AssignStatus : int32_t { kAssignOk, kAssignNotFinite, kAssignNotConverged };

// The same arguments as on the CPU, threads and poll aside.
std::string assign(const AssignArgs& args, int32_t* status, int device, void* stream);  // status: [problems] out

}  // namespace cuda
}  // namespace mudsc
