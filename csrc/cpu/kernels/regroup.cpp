// Gather and segment sum along one axis of a strided tensor. Limited by memory: every element is read once and written
// once, in runs as long as the strides allow; large results bypass the cache, which saves reading what is overwritten.
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/common.h"
#include "cpu/kernels.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

constexpr int64_t kTaskBytes = 256 << 10;
constexpr int64_t kStreamFromBytes = 8 << 20;  // results beyond this would not stay in a core's cache anyway
constexpr int64_t kRun = 512;  // elements summed in registers and L1 before they are converted and stored

// The other axes, sorted so that the last is walked innermost, with neighbours merged where strides allow.
struct Layout {
    int n = 0;  // without the unit axis
    int64_t shape[kMaxDims], in[kMaxDims], out[kMaxDims];
    int64_t units, unit_in, unit_out;
    int64_t inner = 1, inner_in = 0, inner_out = 0;  // the last axis, taken off the list
    int64_t outer = 1;                               // product of the rest
};

Layout canonical(const RegroupArgs& a) {
    Layout l;
    l.units = a.shape[a.dim];
    l.unit_in = a.in_strides[a.dim];
    l.unit_out = a.out_strides[a.dim];
    for (int d = 0; d < a.ndim; ++d) {
        if (d == a.dim || a.shape[d] == 1) continue;
        int at = l.n++;
        for (; at > 0 && llabs(l.out[at - 1]) < llabs(a.out_strides[d]); --at) {
            l.shape[at] = l.shape[at - 1];
            l.in[at] = l.in[at - 1];
            l.out[at] = l.out[at - 1];
        }
        l.shape[at] = a.shape[d];
        l.in[at] = a.in_strides[d];
        l.out[at] = a.out_strides[d];
    }
    for (int d = l.n - 2; d >= 0; --d) {
        if (l.in[d] != l.in[d + 1] * l.shape[d + 1] || l.out[d] != l.out[d + 1] * l.shape[d + 1]) continue;
        l.shape[d] *= l.shape[d + 1];
        l.in[d] = l.in[d + 1];
        l.out[d] = l.out[d + 1];
        for (int e = d + 1; e + 1 < l.n; ++e) {
            l.shape[e] = l.shape[e + 1];
            l.in[e] = l.in[e + 1];
            l.out[e] = l.out[e + 1];
        }
        --l.n;
    }
    if (l.n > 0) {
        --l.n;
        l.inner = l.shape[l.n];
        l.inner_in = l.in[l.n];
        l.inner_out = l.out[l.n];
    }
    for (int d = 0; d < l.n; ++d) l.outer *= l.shape[d];
    return l;
}

void offsets(const Layout& l, int64_t index, int64_t* in, int64_t* out) {
    *in = *out = 0;
    for (int d = l.n - 1; d >= 0; --d) {
        const int64_t i = index % l.shape[d];
        index /= l.shape[d];
        *in += i * l.in[d];
        *out += i * l.out[d];
    }
}

// Copies a run of contiguous bytes; past the cache when `stream`, a whole line at a time where the registers allow.
void copy_run(char* out, const char* in, int64_t bytes, bool stream) {
#if defined(__SSE2__)
    if (stream && bytes >= 256) {
        const int64_t head = (kCacheLine - (reinterpret_cast<uintptr_t>(out) & 63)) & 63;
        memcpy(out, in, static_cast<size_t>(head));
        int64_t i = head;
        for (; i + kCacheLine <= bytes; i += kCacheLine) {
#if defined(__AVX512F__)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), _mm512_loadu_si512(in + i));
#else
            for (int64_t part = i; part < i + kCacheLine; part += 16) {
                const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + part));
                _mm_stream_si128(reinterpret_cast<__m128i*>(out + part), x);
            }
#endif
        }
        memcpy(out + i, in + i, static_cast<size_t>(bytes - i));
        return;
    }
#else
    (void)stream;
#endif
    memcpy(out, in, static_cast<size_t>(bytes));
}

void fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// One task: units [j0, j1) at one outer index, for element type T, which is only moved.
template <typename T>
struct Mover {
    const RegroupArgs& a;
    const Layout& l;
    bool stream;

    void operator()(int64_t o, int64_t j0, int64_t j1) const {
        int64_t in_at, out_at;
        offsets(l, o, &in_at, &out_at);
        const T* in = static_cast<const T*>(a.in) + in_at;
        T* out = static_cast<T*>(a.out) + out_at;
        if (l.inner_in == 1 && l.inner_out == 1) {
            for (int64_t j = j0; j < j1; ++j) contiguous(out + j * l.unit_out, in, j);
        } else if (l.unit_out == 1) {
            for (int64_t i = 0; i < l.inner; ++i) gather(out + i * l.inner_out, in + i * l.inner_in, j0, j1);
        } else {
            for (int64_t j = j0; j < j1; ++j) {
                T* row = out + j * l.unit_out;
                const bool some = a.ptr[j] < a.ptr[j + 1];
                const T* from = in + (some ? a.members[a.ptr[j]] * l.unit_in : 0);
                for (int64_t i = 0; i < l.inner; ++i) row[i * l.inner_out] = some ? from[i * l.inner_in] : T{};
            }
        }
    }

    void contiguous(T* out, const T* in, int64_t j) const {
        const int64_t bytes = l.inner * static_cast<int64_t>(sizeof(T));
        if (a.ptr[j] == a.ptr[j + 1]) {
            memset(static_cast<void*>(out), 0, static_cast<size_t>(bytes));
        } else {
            const T* from = in + a.members[a.ptr[j]] * l.unit_in;
            copy_run(reinterpret_cast<char*>(out), reinterpret_cast<const char*>(from), bytes, stream);
        }
    }

    void gather(T* out, const T* in, int64_t j0, int64_t j1) const {
        T block[4096 / sizeof(T)];
        for (int64_t j = j0; j < j1;) {
            const int64_t n = min64(j1 - j, static_cast<int64_t>(sizeof block / sizeof(T)));
            // When every unit has one member, ptr is the identity and need not be read.
            if (a.ptr[j] == j && a.ptr[j + n] == j + n) {
                for (int64_t k = 0; k < n; ++k) block[k] = in[a.members[j + k] * l.unit_in];
            } else {
                for (int64_t k = 0; k < n; ++k) {
                    block[k] = a.ptr[j + k] < a.ptr[j + k + 1] ? in[a.members[a.ptr[j + k]] * l.unit_in] : T{};
                }
            }
            copy_run(reinterpret_cast<char*>(out + j), reinterpret_cast<const char*>(block),
                     n * static_cast<int64_t>(sizeof(T)), stream);
            j += n;
        }
    }
};

// The same for sums, in float for 32- and 16-bit types and in double for double.
template <typename T, typename Acc>
struct Summer {
    const RegroupArgs& a;
    const Layout& l;
    bool stream;

    static Acc widen(T x) {
        if constexpr (sizeof(Acc) == 8) {
            return static_cast<Acc>(x);
        } else {
            return to_f32(x);
        }
    }
    static T narrow(Acc x) {
        if constexpr (sizeof(Acc) == 8) {
            return static_cast<T>(x);
        } else {
            return from_f32<T>(x);
        }
    }
    Acc factor(int64_t j) const { return a.scale != nullptr ? static_cast<Acc>(a.scale[j]) : Acc{1}; }

    void operator()(int64_t o, int64_t j0, int64_t j1) const {
        int64_t in_at, out_at;
        offsets(l, o, &in_at, &out_at);
        const T* in = static_cast<const T*>(a.in) + in_at;
        T* out = static_cast<T*>(a.out) + out_at;
        if (l.inner_in == 1 && l.inner_out == 1) {
            for (int64_t j = j0; j < j1; ++j) contiguous(out + j * l.unit_out, in, j);
            return;
        }
        for (int64_t i = 0; i < l.inner; ++i) {
            for (int64_t j = j0; j < j1; ++j) {
                Acc sum{0};
                for (int64_t p = a.ptr[j]; p < a.ptr[j + 1]; ++p) {
                    sum += widen(in[a.members[p] * l.unit_in + i * l.inner_in]);
                }
                out[j * l.unit_out + i * l.inner_out] = narrow(sum * factor(j));
            }
        }
    }

    void contiguous(T* out, const T* in, int64_t j) const {
        Acc sum[kRun];
        T block[kRun];
        const Acc by = factor(j);
        for (int64_t i = 0; i < l.inner; i += kRun) {
            const int64_t n = min64(kRun, l.inner - i);
            for (int64_t k = 0; k < n; ++k) sum[k] = 0;
            for (int64_t p = a.ptr[j]; p < a.ptr[j + 1]; ++p) {
                const T* from = in + a.members[p] * l.unit_in + i;
                for (int64_t k = 0; k < n; ++k) sum[k] += widen(from[k]);
            }
            for (int64_t k = 0; k < n; ++k) block[k] = narrow(sum[k] * by);
            copy_run(reinterpret_cast<char*>(out + i), reinterpret_cast<const char*>(block),
                     n * static_cast<int64_t>(sizeof(T)), stream);
        }
    }
};

template <typename Worker>
void run(const RegroupArgs& a, const Layout& l) {
    const int64_t bytes_a_unit = max64(1, l.inner * a.element_bytes);
    const bool stream = l.outer * l.units * bytes_a_unit >= kStreamFromBytes;
    const Worker work{a, l, stream};
    // Tasks are runs of (outer, unit) pairs, cut so that each is about kTaskBytes.
    const int64_t units_a_task = min64(max64(1, kTaskBytes / bytes_a_unit), max64(1, l.units));
    const int64_t cuts = ceil_div(l.units, units_a_task);
    const int64_t outers_a_task = cuts > 1 ? 1 : max64(1, kTaskBytes / (bytes_a_unit * max64(1, l.units)));
    parallel_each(a.threads, ceil_div(l.outer, outers_a_task) * cuts, [&](int64_t task, int) {
        const int64_t o0 = task / cuts * outers_a_task, j0 = task % cuts * units_a_task;
        for (int64_t o = o0; o < min64(o0 + outers_a_task, l.outer); ++o)
            work(o, j0, min64(j0 + units_a_task, l.units));
        if (stream) fence();
    });
}

struct Wide {
    uint64_t half[2];
};

}  // namespace

Status regroup(const RegroupArgs& a);
Status regroup(const RegroupArgs& a) {
    for (int d = 0; d < a.ndim; ++d) {
        if (a.shape[d] == 0) return Status::ok;
    }
    const Layout l = canonical(a);
    bool single = a.scale == nullptr;
    for (int64_t j = 0; single && j < l.units; ++j) single = a.ptr[j + 1] - a.ptr[j] <= 1;
    if (single) {
        switch (a.element_bytes) {
            case 1: run<Mover<uint8_t>>(a, l); return Status::ok;
            case 2: run<Mover<uint16_t>>(a, l); return Status::ok;
            case 4: run<Mover<uint32_t>>(a, l); return Status::ok;
            case 8: run<Mover<uint64_t>>(a, l); return Status::ok;
            case 16: run<Mover<Wide>>(a, l); return Status::ok;
            default: return Status::unsupported;
        }
    }
    switch (a.dtype) {
        case Dtype::f64: run<Summer<double, double>>(a, l); return Status::ok;
        case Dtype::f32: run<Summer<float, float>>(a, l); return Status::ok;
        case Dtype::f16: run<Summer<f16, float>>(a, l); return Status::ok;
        case Dtype::bf16: run<Summer<bf16, float>>(a, l); return Status::ok;
        default: return Status::unsupported;
    }
}

}  // namespace MUDSC_ISA
}  // namespace mudsc
