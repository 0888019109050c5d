// Gather and segment sum along one axis of a strided tensor: one thread an output vector of up to 16 bytes.
// Moves each input element and each output element once; index vectors are shared by all rows and stay in L2.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/launch.h"

namespace mudsc {
namespace cuda {
namespace {

constexpr int kThreads = 256;

struct Params {
    const void* in;
    void* out;
    const int64_t* ptr;      // [units + 1]
    const int64_t* members;  // [ptr[units]]
    const double* scale;     // [units] or null
    int64_t vectors;         // output vectors to write
    int64_t units, unit_in, unit_out;
    int n;  // other axes, innermost last; the innermost counts in vectors
    int64_t shape[kMaxDims], in_strides[kMaxDims], out_strides[kMaxDims];
};

template <int Bytes>
struct alignas(Bytes) Packet {
    unsigned char bytes[Bytes];
};

// Splits a vector's index into the unit and the offsets of the other axes, the innermost fastest.
__device__ int64_t locate(const Params& p, int64_t index, int64_t* in, int64_t* out) {
    *in = 0;
    *out = 0;
    int64_t unit = 0;
    for (int d = p.n - 1; d >= 0; --d) {
        const int64_t i = index % p.shape[d];
        index /= p.shape[d];
        *in += i * p.in_strides[d];
        *out += i * p.out_strides[d];
        if (d == p.n - 1) {
            unit = index % p.units;
            index /= p.units;
        }
    }
    if (p.n == 0) unit = index;
    return unit;
}

template <int Bytes>
__global__ void __launch_bounds__(kThreads) move_kernel(const Params p) {
    using V = Packet<Bytes>;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t v = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; v < p.vectors; v += step) {
        int64_t in, out;
        const int64_t j = locate(p, v, &in, &out);
        V value = {};
        if (p.ptr[j] < p.ptr[j + 1]) value = static_cast<const V*>(p.in)[in + p.members[p.ptr[j]] * p.unit_in];
        static_cast<V*>(p.out)[out + j * p.unit_out] = value;
    }
}

__device__ float widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void narrow(float x, float* y) { *y = x; }
__device__ void narrow(double x, double* y) { *y = x; }
__device__ void narrow(float x, __half* y) { *y = __float2half_rn(x); }
__device__ void narrow(float x, __nv_bfloat16* y) { *y = __float2bfloat16_rn(x); }

template <typename T, typename Acc, int Lanes>
__global__ void __launch_bounds__(kThreads) sum_kernel(const Params p) {
    struct alignas(sizeof(T) * Lanes) V {
        T lane[Lanes];
    };
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t v = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; v < p.vectors; v += step) {
        int64_t in, out;
        const int64_t j = locate(p, v, &in, &out);
        Acc sum[Lanes] = {};
        for (int64_t m = p.ptr[j]; m < p.ptr[j + 1]; ++m) {
            const V x = static_cast<const V*>(p.in)[in + p.members[m] * p.unit_in];
#pragma unroll
            for (int k = 0; k < Lanes; ++k) sum[k] += widen(x.lane[k]);
        }
        const Acc by = p.scale != nullptr ? static_cast<Acc>(p.scale[j]) : Acc{1};
        V value;
#pragma unroll
        for (int k = 0; k < Lanes; ++k) narrow(sum[k] * by, &value.lane[k]);
        static_cast<V*>(p.out)[out + j * p.unit_out] = value;
    }
}

// Sorts the other axes by the output's strides, innermost last, and counts strides and the inner axis in vectors of
// `lanes` elements. False when some stride, length or address is not a multiple.
bool layout(const RegroupArgs& a, int lanes, Params* p) {
    *p = Params{};
    p->in = a.in;
    p->out = a.out;
    p->ptr = a.ptr;
    p->members = a.members;
    p->scale = a.scale;
    p->units = a.shape[a.dim];
    p->unit_in = a.in_strides[a.dim];
    p->unit_out = a.out_strides[a.dim];
    for (int d = 0; d < a.ndim; ++d) {
        if (d == a.dim || a.shape[d] == 1) continue;
        int at = p->n++;
        for (; at > 0 && p->out_strides[at - 1] < a.out_strides[d]; --at) {
            p->shape[at] = p->shape[at - 1];
            p->in_strides[at] = p->in_strides[at - 1];
            p->out_strides[at] = p->out_strides[at - 1];
        }
        p->shape[at] = a.shape[d];
        p->in_strides[at] = a.in_strides[d];
        p->out_strides[at] = a.out_strides[d];
    }
    p->vectors = p->units;
    for (int d = 0; d < p->n; ++d) p->vectors *= p->shape[d];
    if (lanes == 1) return true;
    const int inner = p->n - 1;
    if (inner < 0 || p->in_strides[inner] != 1 || p->out_strides[inner] != 1 || p->shape[inner] % lanes != 0)
        return false;
    const uintptr_t bytes = static_cast<uintptr_t>(lanes) * static_cast<uintptr_t>(a.element_bytes);
    if (reinterpret_cast<uintptr_t>(a.in) % bytes != 0 || reinterpret_cast<uintptr_t>(a.out) % bytes != 0) return false;
    if (p->unit_in % lanes != 0 || p->unit_out % lanes != 0) return false;
    for (int d = 0; d < inner; ++d) {
        if (p->in_strides[d] % lanes != 0 || p->out_strides[d] % lanes != 0) return false;
    }
    p->shape[inner] /= lanes;
    p->vectors /= lanes;
    p->unit_in /= lanes;
    p->unit_out /= lanes;
    for (int d = 0; d < inner; ++d) {
        p->in_strides[d] /= lanes;
        p->out_strides[d] /= lanes;
    }
    return true;
}

template <typename Kernel>
void launch(Kernel kernel, const Params& p, int sms, cudaStream_t stream) {
    const int64_t wanted = (p.vectors + kThreads - 1) / kThreads, most = static_cast<int64_t>(sms) * 32;
    kernel<<<static_cast<unsigned>(wanted < most ? wanted : most), kThreads, 0, stream>>>(p);
}

bool launch_move(const RegroupArgs& a, int sms, cudaStream_t stream) {
    Params p;
    int lanes = 16 / a.element_bytes;
    while (!layout(a, lanes, &p)) lanes /= 2;
    switch (lanes * a.element_bytes) {
        case 1: launch(move_kernel<1>, p, sms, stream); return true;
        case 2: launch(move_kernel<2>, p, sms, stream); return true;
        case 4: launch(move_kernel<4>, p, sms, stream); return true;
        case 8: launch(move_kernel<8>, p, sms, stream); return true;
        case 16: launch(move_kernel<16>, p, sms, stream); return true;
        default: return false;
    }
}

template <typename T, typename Acc>
void launch_sum(const RegroupArgs& a, int sms, cudaStream_t stream) {
    constexpr int kLanes = 16 / static_cast<int>(sizeof(T));
    Params p;
    if (layout(a, kLanes, &p)) {
        launch(sum_kernel<T, Acc, kLanes>, p, sms, stream);
    } else {
        layout(a, 1, &p);
        launch(sum_kernel<T, Acc, 1>, p, sms, stream);
    }
}

}  // namespace

// Every unit with at most one member and no scale is the caller's promise when the dtype is not one of the four that
// can be summed; for those the sum of one member is that member.
std::string regroup(const RegroupArgs& a, int device, void* stream_ptr) {
    for (int d = 0; d < a.ndim; ++d) {
        if (a.shape[d] == 0) return {};
    }
    int before = 0, sms = 0;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    const auto stream = static_cast<cudaStream_t>(stream_ptr);
    bool launched = true;
    switch (a.dtype) {
        case Dtype::f64: launch_sum<double, double>(a, sms, stream); break;
        case Dtype::f32: launch_sum<float, float>(a, sms, stream); break;
        case Dtype::f16: launch_sum<__half, float>(a, sms, stream); break;
        case Dtype::bf16: launch_sum<__nv_bfloat16, float>(a, sms, stream); break;
        default: launched = launch_move(a, sms, stream); break;
    }
    error = cudaGetLastError();
    cudaSetDevice(before);
    if (!launched) return "unsupported element size";
    return error == cudaSuccess ? std::string() : std::string(cudaGetErrorString(error));
}

}  // namespace cuda
}  // namespace mudsc
