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
constexpr int64_t kShort = 192;                // bytes copied without a call
constexpr int64_t kBlockBytes = 2048;          // of a row, gathered in L1 before it is stored in whole lines
constexpr int64_t kRowsInCache = 16 << 10;     // rows gathered at once must leave room in L1 for the index
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
    // Where the units themselves lie side by side, a row of units is the run, and every other axis is walked outside
    // it.
    if (l.n > 0 && l.unit_out != 1) {
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

// Copies a few bytes without a call: whole steps, then one that ends where the run ends.
template <int Step>
inline void copy_steps(char* out, const char* in, int64_t bytes) {
    for (int64_t i = 0; i + Step <= bytes; i += Step) memcpy(out + i, in + i, Step);
    memcpy(out + bytes - Step, in + bytes - Step, Step);
}

inline void copy_short(char* out, const char* in, int64_t bytes) {
    if (bytes >= 16) {
        copy_steps<16>(out, in, bytes);
    } else if (bytes >= 4) {
        copy_steps<4>(out, in, bytes);
    } else {
        for (int64_t i = 0; i < bytes; ++i) out[i] = in[i];
    }
}

// Copies a run of contiguous bytes; past the cache when `stream`, a whole line at a time where the registers allow.
// `next` is where the following run will be read: the hardware does not foresee a jump, so its lines are asked for
// here.
inline void copy_run(char* out, const char* in, int64_t bytes, bool stream, const char* next) {
    if (bytes <= kShort) {
        copy_short(out, in, bytes);
        return;
    }
#if defined(__SSE2__)
    if (stream) {
        const int64_t head = (kCacheLine - (reinterpret_cast<uintptr_t>(out) & 63)) & 63;
        memcpy(out, in, static_cast<size_t>(head));
        int64_t i = head;
        for (; i + kCacheLine <= bytes; i += kCacheLine) {
            __builtin_prefetch(next + i);
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
#endif
    (void)stream;
    (void)next;
    memcpy(out, in, static_cast<size_t>(bytes));
}

void fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// What a worker needs besides the arguments: where each member lies on the unit axis, in elements.
struct Plan {
    const RegroupArgs& a;
    const Layout& l;
    const int64_t* at;    // [members]
    const int32_t* near;  // [members] the same where rows of units are gathered: half the cache
    bool full;            // every unit has one member exactly, so unit j's is at[j]
    bool stream;
};

// Elements that are only moved.
template <typename T>
struct Mover {
    using Element = T;
    const Plan& p;

    // Runs of inner elements that are contiguous on both sides.
    void contiguous(T* out, const T* in, int64_t j0, int64_t j1) const {
        const int64_t bytes = p.l.inner * static_cast<int64_t>(sizeof(T));
        for (int64_t j = j0; j < j1; ++j) {
            char* to = reinterpret_cast<char*>(out + j * p.l.unit_out);
            const int64_t first = p.full ? j : p.a.ptr[j];
            if (!p.full && first == p.a.ptr[j + 1]) {
                memset(to, 0, static_cast<size_t>(bytes));
                continue;
            }
            const char* from = reinterpret_cast<const char*>(in + p.at[first]);
            if (bytes <= kShort) {
                copy_short(to, from, bytes);
            } else {
                const bool more = first + 1 < p.a.ptr[p.l.units];
                copy_run(to, from, bytes, p.stream, more ? reinterpret_cast<const char*>(in + p.at[first + 1]) : from);
            }
        }
    }

    // Units [j, j + n) of several rows at once, so that a member's place is read once for all of them.
    template <int Rows>
    void block(T (*to)[kBlockBytes / sizeof(T)], const T* const* in, int64_t j, int64_t n) const {
        const int64_t* ptr = p.a.ptr + j;
        for (int64_t k = 0; k < n; ++k) {
            const bool some = p.full || ptr[k] < ptr[k + 1];
            const int64_t place = some ? p.near[p.full ? j + k : ptr[k]] : 0;
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) to[r][k] = some ? in[r][place] : T{};
        }
    }

    T single(const T* in, int64_t j) const { return p.a.ptr[j] < p.a.ptr[j + 1] ? in[p.at[p.a.ptr[j]]] : T{}; }
};

// Elements that are added up: in float for 32- and 16-bit types, in double for double.
template <typename T, typename Acc>
struct Summer {
    using Element = T;
    const Plan& p;

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
    Acc factor(int64_t j) const { return p.a.scale != nullptr ? static_cast<Acc>(p.a.scale[j]) : Acc{1}; }

    void contiguous(T* out, const T* in, int64_t j0, int64_t j1) const {
        for (int64_t j = j0; j < j1; ++j) run(out + j * p.l.unit_out, in, j);
    }

    void run(T* out, const T* in, int64_t j) const {
        const Acc by = factor(j);
        const int64_t first = p.a.ptr[j], last = p.a.ptr[j + 1];
        if (last - first == 2) {
            // The usual zip, one unit of each model or two of one: no detour through a buffer.
            const T *x = in + p.at[first], *y = in + p.at[first + 1];
            for (int64_t k = 0; k < p.l.inner; ++k) out[k] = narrow((widen(x[k]) + widen(y[k])) * by);
            return;
        }
        Acc sum[kRun];
        for (int64_t i = 0; i < p.l.inner; i += kRun) {
            const int64_t n = min64(kRun, p.l.inner - i);
            for (int64_t k = 0; k < n; ++k) sum[k] = 0;
            for (int64_t m = first; m < last; ++m) {
                const T* from = in + p.at[m] + i;
                for (int64_t k = 0; k < n; ++k) sum[k] += widen(from[k]);
            }
            for (int64_t k = 0; k < n; ++k) out[i + k] = narrow(sum[k] * by);
        }
    }

    template <int Rows>
    void block(T (*to)[kBlockBytes / sizeof(T)], const T* const* in, int64_t j, int64_t n) const {
        int64_t m = p.a.ptr[j];
        for (int64_t k = 0; k < n; ++k) {
            Acc sum[Rows] = {};
            for (const int64_t end = p.a.ptr[j + k + 1]; m < end; ++m) {
#pragma GCC unroll 4
                for (int r = 0; r < Rows; ++r) sum[r] += widen(in[r][p.near[m]]);
            }
            const Acc by = factor(j + k);
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r) to[r][k] = narrow(sum[r] * by);
        }
    }

    T single(const T* in, int64_t j) const {
        Acc sum{0};
        for (int64_t m = p.a.ptr[j]; m < p.a.ptr[j + 1]; ++m) sum += widen(in[p.at[m]]);
        return narrow(sum * factor(j));
    }
};

// Rows in which the units themselves lie side by side: `Rows` outer indices from o on, units [j0, j1). Rows are read in
// any order, which the hardware cannot foresee: while they are, the rows that come next are asked for from end to end.
template <typename Worker, int Rows>
void unit_rows(const Worker& work, int64_t o, int64_t j0, int64_t j1) {
    using T = typename Worker::Element;
    const Plan& p = work.p;
    const T *in[Rows], *next[Rows];
    T* out[Rows];
    for (int r = 0; r < Rows; ++r) {
        int64_t in_at, out_at, ignored;
        offsets(p.l, min64(o + Rows + r, p.l.outer - 1), &in_at, &ignored);
        next[r] = static_cast<const T*>(p.a.in) + in_at;
        offsets(p.l, o + r, &in_at, &out_at);
        in[r] = static_cast<const T*>(p.a.in) + in_at;
        out[r] = static_cast<T*>(p.a.out) + out_at;
    }
    constexpr int64_t kBlock = kBlockBytes / static_cast<int64_t>(sizeof(T));
    constexpr int64_t kLine = max64(1, kCacheLine / static_cast<int64_t>(sizeof(T)));
    T block[Rows][kBlock];
    for (int64_t j = j0; j < j1;) {
        const int64_t n = min64(j1 - j, kBlock);
        for (int r = 0; r < Rows; ++r) {
            for (int64_t k = 0; k < n && p.l.unit_in == 1; k += kLine) __builtin_prefetch(next[r] + j + k, 0, 2);
        }
        work.template block<Rows>(block, in, j, n);
        for (int r = 0; r < Rows; ++r) {
            const char* from = reinterpret_cast<const char*>(block[r]);
            copy_run(reinterpret_cast<char*>(out[r] + j), from, n * static_cast<int64_t>(sizeof(T)), p.stream, from);
        }
        j += n;
    }
}

// Any other layout, one outer index.
template <typename Worker>
void strided(const Worker& work, int64_t o, int64_t j0, int64_t j1) {
    using T = typename Worker::Element;
    const Layout& l = work.p.l;
    int64_t in_at, out_at;
    offsets(l, o, &in_at, &out_at);
    const T* in = static_cast<const T*>(work.p.a.in) + in_at;
    T* out = static_cast<T*>(work.p.a.out) + out_at;
    if (l.inner_in == 1 && l.inner_out == 1) {
        if (l.inner * static_cast<int64_t>(sizeof(T)) <= kShort && o + 1 < l.outer) {
            int64_t next_at, ignored;
            offsets(l, o + 1, &next_at, &ignored);
            const T* next = static_cast<const T*>(work.p.a.in) + next_at;
            constexpr int64_t kGroup = 64;
            for (int64_t j = j0; j < j1; j += kGroup) {
                const int64_t end = min64(j + kGroup, j1);
                const char* line = reinterpret_cast<const char*>(next + j * l.unit_in);
                const char* stop = reinterpret_cast<const char*>(next + end * l.unit_in);
                for (; line < stop; line += kCacheLine) __builtin_prefetch(line, 0, 2);
                work.contiguous(out, in, j, end);
            }
        } else {
            work.contiguous(out, in, j0, j1);
        }
        return;
    }
    for (int64_t j = j0; j < j1; ++j) {
        for (int64_t i = 0; i < l.inner; ++i)
            out[j * l.unit_out + i * l.inner_out] = work.single(in + i * l.inner_in, j);
    }
}

template <typename Worker>
void run(const Plan& p) {
    const Worker work{p};
    const Layout& l = p.l;
    // Tasks are runs of (outer, unit) pairs, cut so that each is about kTaskBytes.
    const int64_t bytes_a_unit = max64(1, l.inner * p.a.element_bytes);
    const int64_t row_bytes = l.units * p.a.element_bytes;
    const int64_t units_a_task = min64(max64(1, kTaskBytes / bytes_a_unit), max64(1, l.units));
    const int64_t cuts = ceil_div(l.units, units_a_task);
    const int64_t outers_a_task = cuts > 1 ? 4 : max64(4, kTaskBytes / (bytes_a_unit * max64(1, l.units)));
    parallel_each(p.a.threads, ceil_div(l.outer, outers_a_task) * cuts, [&](int64_t task, int) {
        const int64_t o1 = min64((task / cuts + 1) * outers_a_task, l.outer);
        const int64_t j0 = task % cuts * units_a_task, j1 = min64(j0 + units_a_task, l.units);
        int64_t o = task / cuts * outers_a_task;
        if (p.near != nullptr) {
            for (; o + 4 <= o1 && 4 * row_bytes <= kRowsInCache; o += 4) unit_rows<Worker, 4>(work, o, j0, j1);
            for (; o < o1; ++o) unit_rows<Worker, 1>(work, o, j0, j1);
        }
        for (; o < o1; ++o) strided(work, o, j0, j1);
        if (p.stream) fence();
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
    const int64_t members = a.ptr[l.units];
    Buffer<int64_t> at(members);
    if (!at) return Status::no_memory;
    for (int64_t m = 0; m < members; ++m) at[m] = a.members[m] * l.unit_in;
    const bool rows_of_units = l.unit_out == 1;
    Buffer<int32_t> near(rows_of_units ? members : 0);
    if (!near) return Status::no_memory;
    bool fits = rows_of_units;
    for (int64_t m = 0; m < members && fits; ++m) {
        fits = llabs(at[m]) <= INT32_MAX;
        near[m] = static_cast<int32_t>(at[m]);
    }
    bool single = a.scale == nullptr, full = single && members == l.units;
    for (int64_t j = 0; single && j < l.units; ++j) {
        single = a.ptr[j + 1] - a.ptr[j] <= 1;
        full = full && a.ptr[j] == j;
    }
    const int64_t bytes = l.outer * l.units * l.inner * a.element_bytes;
    const Plan plan{a, l, at.get(), fits ? near.get() : nullptr, full, bytes >= kStreamFromBytes};
    if (single) {
        switch (a.element_bytes) {
            case 1: run<Mover<uint8_t>>(plan); return Status::ok;
            case 2: run<Mover<uint16_t>>(plan); return Status::ok;
            case 4: run<Mover<uint32_t>>(plan); return Status::ok;
            case 8: run<Mover<uint64_t>>(plan); return Status::ok;
            case 16: run<Mover<Wide>>(plan); return Status::ok;
            default: return Status::unsupported;
        }
    }
    switch (a.dtype) {
        case Dtype::f64: run<Summer<double, double>>(plan); return Status::ok;
        case Dtype::f32: run<Summer<float, float>>(plan); return Status::ok;
        case Dtype::f16: run<Summer<f16, float>>(plan); return Status::ok;
        case Dtype::bf16: run<Summer<bf16, float>>(plan); return Status::ok;
        default: return Status::unsupported;
    }
}

}  // namespace MUDSC_ISA
}  // namespace mudsc
