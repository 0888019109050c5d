// Gather and segment sum along one axis of a strided tensor. Each input element that a unit takes is read once and each
// output element written once: bytes moved = (members + units) * elements a unit * element size; the index vectors are
// shared by all rows and stay in the caches.
//   vectors: a thread makes one output vector of 16 bytes, 8 or one element along the innermost other axis.
//   lines:   the unit axis is innermost in both tensors, so that neighbours in the output come from anywhere in a line.
//            A block stages a few lines in shared memory, reads and writes memory in order, and gathers there.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/run.h"
#include "cuda/shared.h"

namespace mudsc {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksAMultiprocessor = 32;     // many waves, so that the last one weighs little
constexpr int kStagesAMultiprocessor = 8;      // four waves of two
constexpr int64_t kOfSystem = 1024;            // bytes of shared memory that each block costs beside its own
constexpr int kMostLines = 8;                  // staged at once: each index read serves as many
constexpr int64_t kNarrow = int64_t{1} << 31;  // below, indices are divided in 32 bits

struct Axis {
    int64_t shape, in, out;  // length and strides, in elements (the innermost axis of `vectors`: in vectors)
};

struct Params {
    const void* in;
    void* out;
    const int64_t* ptr;      // [units + 1], or null: one member each
    const int64_t* members;  // [ptr[units]]
    const double* scale;     // [units] or null
    int64_t total;           // vectors, or lines
    Axis unit;               // shape: of out
    int64_t length;          // of in's unit axis
    int n, unit_at;          // axes; which of them is the unit axis (lines: none)
    Axis axes[kMaxDims];     // by falling output stride
    int lines, pitch;        // lines: how many are staged at once, and elements from one to the next
};

struct alignas(16) Sixteen {
    uint64_t half[2];
};

template <typename E, int Lanes>
struct alignas(sizeof(E) * Lanes) Packet {
    E lane[Lanes];
};

// Bits are moved; a unit has at most one member and no scale.
template <typename E>
struct Move {
    using Element = E;
    using Sum = E;
    static __device__ void add(Sum* sum, E x) { *sum = x; }
    static __device__ E result(Sum sum, const double*) { return sum; }
};

__device__ float widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void narrow(float x, float* y) { *y = x; }
__device__ void narrow(double x, double* y) { *y = x; }
__device__ void narrow(float x, __half* y) { *y = __float2half_rn(x); }
__device__ void narrow(float x, __nv_bfloat16* y) { *y = __float2bfloat16_rn(x); }

template <typename E, typename Accumulator>
struct Add {
    using Element = E;
    using Sum = Accumulator;
    static __device__ void add(Sum* sum, E x) { *sum += widen(x); }
    static __device__ E result(Sum sum, const double* scale) {
        E y;
        narrow(scale != nullptr ? sum * static_cast<Sum>(*scale) : sum, &y);
        return y;
    }
};

struct Members {
    int64_t first, end;
};
__device__ Members members_of(const Params& p, int64_t unit) {
    if (p.ptr == nullptr) return Members{unit, unit + 1};
    return Members{p.ptr[unit], p.ptr[unit + 1]};
}

struct Place {
    int64_t in, out, unit;
};

template <typename Index>
__device__ Place locate(const Params& p, Index index) {
    Place place{0, 0, 0};
    for (int d = p.n - 1; d >= 0; --d) {
        const Index length = static_cast<Index>(p.axes[d].shape), rest = index / length;
        const auto i = static_cast<int64_t>(index - rest * length);
        index = rest;
        place.out += i * p.axes[d].out;
        if (d == p.unit_at) {
            place.unit = i;
        } else {
            place.in += i * p.axes[d].in;
        }
    }
    return place;
}

__device__ Place locate(const Params& p, int64_t index) {
    return p.total < kNarrow ? locate<uint32_t>(p, static_cast<uint32_t>(index)) : locate<int64_t>(p, index);
}

template <typename Policy, int Lanes>
__global__ void __launch_bounds__(kThreads) vectors_kernel(const __grid_constant__ Params p) {
    using E = typename Policy::Element;
    using Vector = Packet<E, Lanes>;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t v = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; v < p.total; v += step) {
        const Place at = locate(p, v);
        const Members own = members_of(p, at.unit);
        typename Policy::Sum sum[Lanes] = {};
        for (int64_t m = own.first; m < own.end; ++m) {
            const Vector x = static_cast<const Vector*>(p.in)[at.in + p.members[m] * p.unit.in];
#pragma unroll
            for (int l = 0; l < Lanes; ++l) Policy::add(&sum[l], x.lane[l]);
        }
        const double* scale = p.scale != nullptr ? p.scale + at.unit : nullptr;
        Vector y;
#pragma unroll
        for (int l = 0; l < Lanes; ++l) y.lane[l] = Policy::result(sum[l], scale);
        static_cast<Vector*>(p.out)[at.out] = y;
    }
}

// One unit of a staged line.
template <typename Policy>
__device__ typename Policy::Element gathered(const Params& p, const typename Policy::Element* line, int64_t unit) {
    const Members own = members_of(p, unit);
    typename Policy::Sum sum = {};
    for (int64_t m = own.first; m < own.end; ++m) Policy::add(&sum, line[p.members[m]]);
    return Policy::result(sum, p.scale != nullptr ? p.scale + unit : nullptr);
}

template <typename Policy, int Lanes>
__global__ void __launch_bounds__(kThreads, 2) lines_kernel(const __grid_constant__ Params p) {
    using E = typename Policy::Element;
    using Vector = Packet<E, Lanes>;
    E* stage = dynamic_shared<E>();
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t read = p.length / Lanes, written = p.unit.shape / Lanes;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * p.lines; first < p.total;
         first += static_cast<int64_t>(gridDim.x) * p.lines) {
        const int here = static_cast<int>(p.total - first < p.lines ? p.total - first : p.lines);
        for (int r = 0; r < here; ++r) {
            const E* line = static_cast<const E*>(p.in) + locate<int64_t>(p, first + r).in;
            E* to = stage + static_cast<int64_t>(r) * p.pitch;
#pragma unroll 4
            for (int64_t c = thread; c < read; c += kThreads)
                reinterpret_cast<Vector*>(to)[c] = reinterpret_cast<const Vector*>(line)[c];
            for (int64_t c = read * Lanes + thread; c < p.length; c += kThreads) to[c] = line[c];
        }
        __syncthreads();
        for (int r = 0; r < here; ++r) {
            const E* line = stage + static_cast<int64_t>(r) * p.pitch;
            E* to = static_cast<E*>(p.out) + locate<int64_t>(p, first + r).out;
            for (int64_t c = thread; c < written; c += kThreads) {
                Vector y;
#pragma unroll
                for (int l = 0; l < Lanes; ++l) y.lane[l] = gathered<Policy>(p, line, c * Lanes + l);
                reinterpret_cast<Vector*>(to)[c] = y;
            }
            for (int64_t j = written * Lanes + thread; j < p.unit.shape; j += kThreads)
                to[j] = gathered<Policy>(p, line, j);
        }
        __syncthreads();
    }
}

// ---- the launcher ----

// The axes by falling output stride, neighbours that lie in one piece in both tensors made one.
Params layout(const RegroupArgs& a, bool single) {
    Params p{};
    p.in = a.in;
    p.out = a.out;
    p.ptr = single ? nullptr : a.ptr;
    p.members = a.members;
    p.scale = a.scale;
    p.unit = Axis{a.shape[a.dim], a.in_strides[a.dim], a.out_strides[a.dim]};
    int order[kMaxDims] = {};
    for (int d = 0; d < a.ndim; ++d) {
        if (d != a.dim && a.shape[d] == 1) continue;
        int at = p.n++;
        for (; at > 0 && a.out_strides[order[at - 1]] < a.out_strides[d]; --at) order[at] = order[at - 1];
        order[at] = d;
    }
    int kept = 0;
    p.unit_at = -1;
    for (int k = 0; k < p.n; ++k) {
        const int d = order[k];
        const Axis axis{a.shape[d], a.in_strides[d], a.out_strides[d]};
        if (kept > 0 && d != a.dim && p.unit_at != kept - 1) {
            Axis& last = p.axes[kept - 1];
            if (last.in == axis.in * axis.shape && last.out == axis.out * axis.shape) {
                last = Axis{last.shape * axis.shape, axis.in, axis.out};
                continue;
            }
        }
        if (d == a.dim) p.unit_at = kept;
        p.axes[kept++] = axis;
    }
    p.n = kept;
    p.total = 1;
    for (int d = 0; d < p.n; ++d) p.total *= p.axes[d].shape;
    return p;
}

// Whether every step between vectors, and both addresses, are whole vectors of `lanes` elements.
bool aligned(const RegroupArgs& a, const Params& p, int lanes) {
    const uintptr_t bytes = static_cast<uintptr_t>(lanes) * static_cast<uintptr_t>(a.element_bytes);
    if (reinterpret_cast<uintptr_t>(a.in) % bytes != 0 || reinterpret_cast<uintptr_t>(a.out) % bytes != 0) return false;
    for (int d = 0; d < p.n - 1; ++d) {
        if (p.axes[d].in % lanes != 0 || p.axes[d].out % lanes != 0) return false;
    }
    return true;
}

template <typename Policy, int Lanes>
std::string run_vectors(Params p, int multiprocessors, void* stream) {
    if (Lanes > 1) {
        p.axes[p.n - 1].shape /= Lanes;
        p.total /= Lanes;
        p.unit.in /= Lanes;
        for (int d = 0; d < p.n - 1; ++d) {
            p.axes[d].in /= Lanes;
            p.axes[d].out /= Lanes;
        }
    }
    const int64_t most = static_cast<int64_t>(multiprocessors) * kBlocksAMultiprocessor;
    const Shape shape{min_of(ceil_of(p.total, kThreads), most), kThreads};
    return launch("regroup vectors_kernel", vectors_kernel<Policy, Lanes>, shape, stream, p);
}

template <typename Policy, int Lanes>
std::string run_lines(Params p, const OnDevice& on, void* stream) {
    using E = typename Policy::Element;
    p.n -= 1;  // the unit axis, the last, is the line
    p.unit_at = -1;
    p.total /= p.unit.shape;
    constexpr int64_t kWhole = 16 / static_cast<int64_t>(sizeof(E));
    const int64_t pitch = ceil_of(p.length, kWhole) * kWhole, bytes = pitch * static_cast<int64_t>(sizeof(E));
    p.pitch = static_cast<int>(pitch);
    // Two blocks share a multiprocessor, so that one loads while the other stores; a long line takes it alone.
    const int64_t stage = (on.shared_bytes() + kOfSystem) / 2 - kOfSystem, multiprocessors = on.multiprocessors();
    p.lines = static_cast<int>(max_of(1, min_of(kMostLines, stage / max_of(bytes, 1))));
    const int64_t most = multiprocessors * kStagesAMultiprocessor;
    // A few lines must not leave most multiprocessors without work.
    while (p.lines > 1 && ceil_of(p.total, p.lines) < 2 * multiprocessors) p.lines /= 2;
    Shape shape{min_of(ceil_of(p.total, p.lines), most), kThreads};
    shape.shared_bytes = static_cast<size_t>(p.lines * bytes);
    return launch("regroup lines_kernel", lines_kernel<Policy, Lanes>, shape, stream, p);
}

template <typename Policy>
std::string run(const RegroupArgs& a, int64_t length, bool single, const OnDevice& on, void* stream) {
    constexpr int kMost = 16 / static_cast<int>(sizeof(typename Policy::Element));
    Params p = layout(a, single);
    p.length = length;
    constexpr int kHalf = kMost > 2 ? kMost / 2 : 1;  // vectors of 8 bytes, where those of 16 do not fit
    const Axis& inner = p.axes[p.n - 1];
    const bool lines = p.unit_at == p.n - 1;
    if (inner.in != 1 || inner.out != 1 || (lines && (length + kMost) * a.element_bytes > on.shared_bytes()))
        return run_vectors<Policy, 1>(p, on.multiprocessors(), stream);
    const auto fits = [&](int lanes) {
        return lanes > 1 && (lines || inner.shape % lanes == 0) && aligned(a, p, lanes);
    };
    if (fits(kMost)) {
        if (lines) return run_lines<Policy, kMost>(p, on, stream);
        return run_vectors<Policy, kMost>(p, on.multiprocessors(), stream);
    }
    if (fits(kHalf)) {
        if (lines) return run_lines<Policy, kHalf>(p, on, stream);
        return run_vectors<Policy, kHalf>(p, on.multiprocessors(), stream);
    }
    if (lines) return run_lines<Policy, 1>(p, on, stream);
    return run_vectors<Policy, 1>(p, on.multiprocessors(), stream);
}

}  // namespace

// At most one member a unit and no scale is the caller's promise where the dtype is not one of the four that can be
// summed. One member and no scale moves bits whatever the dtype.
std::string regroup(const RegroupArgs& a, int64_t length, bool single, int device, void* stream) {
    for (int d = 0; d < a.ndim; ++d) {
        if (a.shape[d] == 0) return {};
    }
    const OnDevice on(device);
    if (!on.error().empty()) return "regroup: " + on.error();
    if (!single || a.scale != nullptr) {
        switch (a.dtype) {
            case Dtype::f64: return run<Add<double, double>>(a, length, single, on, stream);
            case Dtype::f32: return run<Add<float, float>>(a, length, single, on, stream);
            case Dtype::f16: return run<Add<__half, float>>(a, length, single, on, stream);
            case Dtype::bf16: return run<Add<__nv_bfloat16, float>>(a, length, single, on, stream);
            default: break;
        }
    }
    switch (a.element_bytes) {
        case 1: return run<Move<uint8_t>>(a, length, single, on, stream);
        case 2: return run<Move<uint16_t>>(a, length, single, on, stream);
        case 4: return run<Move<uint32_t>>(a, length, single, on, stream);
        case 8: return run<Move<uint64_t>>(a, length, single, on, stream);
        case 16: return run<Move<Sixteen>>(a, length, single, on, stream);
        default: return "regroup: unsupported element size";
    }
}

}  // namespace cuda
}  // namespace mudsc
