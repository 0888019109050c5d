// What regroup's parts share: how the axes of a tensor lie in memory, and copies of runs that bypass the cache.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/common.h"
#include "cpu/kernels.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

constexpr int64_t kShort = 192;         // bytes copied as a few steps
constexpr int64_t kUncalled = 4 << 10;  // bytes copied without a call where all of it is near

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
        const int64_t i = d > 0 ? index % l.shape[d] : index;  // a division takes as long as a few units
        if (d > 0) index /= l.shape[d];
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

#if defined(__SSE2__)
// Stores a cache line past the cache; `out` is aligned to one.
inline void stream_line(char* out, const char* in) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(in));
#elif defined(__AVX__)
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
    const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), x);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out + 32), y);
#else
    for (int64_t part = 0; part < kCacheLine; part += 16) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + part));
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + part), x);
    }
#endif
}

#if defined(__AVX512F__)
constexpr __mmask16 kAll = 0xffff;  // GCC 12 takes what instructions without a mask leave open for a mistake
#endif
#if defined(__AVX512BF16__)
constexpr int kSubnormal = 0x20;  // what vfpclassps is asked for
#endif
#endif

// Copies a run of contiguous bytes; past the cache when `stream`, a whole line at a time where the registers allow.
// `next` is where the following run will be read: the hardware does not foresee a jump, so what comes kAhead bytes
// later is asked for here, into the second cache. Null: nothing is, since all of it is near.
inline void copy_run(char* out, const char* in, int64_t bytes, bool stream, const char* next) {
    if (bytes <= kShort) {
        copy_short(out, in, bytes);
        return;
    }
    constexpr int64_t kAhead = 2048;
    const int64_t head = (kCacheLine - (reinterpret_cast<uintptr_t>(out) & 63)) & 63, last = bytes - kCacheLine;
    const auto ask = [&](int64_t i) { __builtin_prefetch(i < bytes ? in + i : next + (i - bytes), 0, 2); };
    if (next == nullptr && bytes > kUncalled) {
        memcpy(out, in, static_cast<size_t>(bytes));
        return;
    }
    if (next == nullptr) {
        for (int64_t i = 0; i < last; i += kCacheLine) memcpy(out + i, in + i, kCacheLine);
        memcpy(out + last, in + last, kCacheLine);
        return;
    }
    int64_t i = head;
    memcpy(out, in, kCacheLine);
#if defined(__SSE2__)
    if (stream) {
        for (; i <= last; i += kCacheLine) {
            ask(i + kAhead);
            stream_line(out + i, in + i);
        }
        memcpy(out + i, in + i, static_cast<size_t>(bytes - i));
        return;
    }
#endif
    (void)stream;
    for (; i <= last; i += kCacheLine) {
        ask(i + kAhead);
        memcpy(out + i, in + i, kCacheLine);
    }
    memcpy(out + last, in + last, kCacheLine);
}

// Asks for what short runs need soon, a group of units at a time: neither what is read in any order nor what is written
// in pieces is foreseen by the hardware. Into the second cache: the first has not enough open misses.
struct Ahead {
    static constexpr int64_t kGroup = 16, kWritten = 4096;  // units; bytes from what is written to what is asked for
    const char* from;                                       // in what is read after this row
    int64_t in_lines;                                       // of it for each group
    int64_t out_lines;                                      // that a group fills

    // The next group begins, and is written from `to` on.
    void ask(const void* to) {
        for (int64_t i = 0; i < in_lines; ++i) __builtin_prefetch(from + i * kCacheLine, 0, 2);
        from += in_lines * kCacheLine;
        const char* at = static_cast<const char*>(to) + kWritten;
        for (int64_t i = 0; i < out_lines; ++i) __builtin_prefetch(at + i * kCacheLine, 0, 2);
    }
    // The same for a group of as many lines as are known here: a loop takes longer than what it asks for.
    template <int64_t In, int64_t Out>
    void ask(const void* to) {
        const char* at = static_cast<const char*>(to) + kWritten;
#pragma GCC unroll 32
        for (int64_t i = 0; i < In; ++i) __builtin_prefetch(from + i * kCacheLine, 0, 2);
#pragma GCC unroll 32
        for (int64_t i = 0; i < Out; ++i) __builtin_prefetch(at + i * kCacheLine, 0, 2);
        from += In * kCacheLine;
    }
    // Lines of `units` units of so many bytes.
    static constexpr int64_t lines(int64_t units, int64_t bytes) { return ceil_div(units * bytes, kCacheLine); }
    // Whether the next row has `members` times as many units as this one fills.
    bool usual(int64_t bytes, int64_t members) const { return in_lines == lines(kGroup * members, bytes); }
};

void fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// What the tiles of regroup_tile.h need besides.
struct Tiling {
    int64_t in_units = 0;            // positions on the unit axis that are read; 0: no tiles
    const int32_t* at = nullptr;     // byte offsets of lines: for gathers [units, rounded up], for sums [members]
    const uint8_t* pairs = nullptr;  // for sums: whether each unit of a whole vector of them has two members
};

// What a worker needs besides the arguments: where each member lies on the unit axis, in elements.
struct Plan {
    const RegroupArgs& a;
    const Layout& l;
    const int64_t* at;  // [members]
    const int32_t*
        near;  // [members] the same where it fits, for rows of units and for packed ones: half the cache; or null
    const float* scale;         // [units] the factors of sums, as floats
    const double* exact_scale;  // [units] and as doubles
    int64_t in_units;           // positions of the unit axis that are read
    int64_t reach;              // elements from the first outer index of `in` to its last
    bool packed;                // each unit's run begins where the one before ends, on both sides
    bool full;                  // every unit has one member exactly, so unit j's is at[j]
    bool alike;                 // every unit is a sum of two members, by one factor
    bool stream;
    bool far;  // larger than what the second cache and its surroundings hold
};

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
