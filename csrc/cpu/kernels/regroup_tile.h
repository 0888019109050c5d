// Regrouping where the units lie side by side, as on the last axis of a usual tensor. Taken element by element it costs
// a load and a store for each; here rows are transposed in tiles, so that one unit of all of a tile's rows is a line of
// vector width, to be moved or added up as a whole, and transposed back on the way out.
#pragma once

#include "cpu/kernels/regroup_layout.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

// ---- vectors: 16-byte lanes, as wide as the instruction set has them ----

// 32 bytes also where there are registers of 64: these take twice as long to shuffle on the machines measured, and a
// line of four lanes costs more loads than two of two.
#if defined(__AVX2__)
#define MUDSC_UNPACK(which, x, y)                    \
    if constexpr (Bytes == 1) {                      \
        return {_mm256_unpack##which##_epi8(x, y)};  \
    } else if constexpr (Bytes == 2) {               \
        return {_mm256_unpack##which##_epi16(x, y)}; \
    } else if constexpr (Bytes == 4) {               \
        return {_mm256_unpack##which##_epi32(x, y)}; \
    } else {                                         \
        return {_mm256_unpack##which##_epi64(x, y)}; \
    }
struct Vector {
    __m256i v;
    static constexpr int kLanes = 2;
    template <typename At>
    static Vector lanes(const At& at) {
        const __m256i x = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at(0))));
        return {_mm256_inserti128_si256(x, _mm_loadu_si128(reinterpret_cast<const __m128i*>(at(1))), 1)};
    }
    void store(char* to) const { _mm256_store_si256(reinterpret_cast<__m256i*>(to), v); }
    template <int Bytes>
    static Vector low(Vector a, Vector b) {
        MUDSC_UNPACK(lo, a.v, b.v)
    }
    template <int Bytes>
    static Vector high(Vector a, Vector b) {
        MUDSC_UNPACK(hi, a.v, b.v)
    }
};
#elif defined(__SSE2__)
#define MUDSC_UNPACK(which, x, y)                 \
    if constexpr (Bytes == 1) {                   \
        return {_mm_unpack##which##_epi8(x, y)};  \
    } else if constexpr (Bytes == 2) {            \
        return {_mm_unpack##which##_epi16(x, y)}; \
    } else if constexpr (Bytes == 4) {            \
        return {_mm_unpack##which##_epi32(x, y)}; \
    } else {                                      \
        return {_mm_unpack##which##_epi64(x, y)}; \
    }
struct Vector {
    __m128i v;
    static constexpr int kLanes = 1;
    template <typename At>
    static Vector lanes(const At& at) {
        return {_mm_loadu_si128(reinterpret_cast<const __m128i*>(at(0)))};
    }
    void store(char* to) const { _mm_store_si128(reinterpret_cast<__m128i*>(to), v); }
    template <int Bytes>
    static Vector low(Vector a, Vector b) {
        MUDSC_UNPACK(lo, a.v, b.v)
    }
    template <int Bytes>
    static Vector high(Vector a, Vector b) {
        MUDSC_UNPACK(hi, a.v, b.v)
    }
};
#endif

#if defined(MUDSC_UNPACK)
#undef MUDSC_UNPACK
#define MUDSC_TILES 1

constexpr int64_t kVector = 16 * Vector::kLanes;  // bytes of a line
constexpr int64_t kStage = 512;  // bytes of each output row that are put together before they are stored

#if defined(__AVX2__)
#define MUDSC_MM(name) _mm256_##name
using Floats = __m256;
using Doubles = __m256d;
using Bits = __m256i;
inline Bits load_bits(const void* p) { return _mm256_load_si256(static_cast<const Bits*>(p)); }
inline Bits both(Bits a, Bits b) { return _mm256_and_si256(a, b); }
inline Bits either(Bits a, Bits b) { return _mm256_or_si256(a, b); }
inline bool any_nan(Floats a, Floats b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)) != 0; }
inline Bits bits_of(Floats x) { return _mm256_castps_si256(x); }
inline Floats floats_of(Bits x) { return _mm256_castsi256_ps(x); }
#else
#define MUDSC_MM(name) _mm_##name
using Floats = __m128;
using Doubles = __m128d;
using Bits = __m128i;
inline Bits load_bits(const void* p) { return _mm_load_si128(static_cast<const Bits*>(p)); }
inline Bits both(Bits a, Bits b) { return _mm_and_si128(a, b); }
inline Bits either(Bits a, Bits b) { return _mm_or_si128(a, b); }
inline bool any_nan(Floats a, Floats b) { return _mm_movemask_ps(_mm_cmpunord_ps(a, b)) != 0; }
inline Bits bits_of(Floats x) { return _mm_castps_si128(x); }
inline Floats floats_of(Bits x) { return _mm_castsi128_ps(x); }
#endif

// The sum of lines, in registers.
template <typename T>
struct LineSum;

template <>
struct LineSum<float> {
    Floats sum = MUDSC_MM(setzero_ps)();
    void add(const char* line) { sum = MUDSC_MM(add_ps)(sum, MUDSC_MM(load_ps)(reinterpret_cast<const float*>(line))); }
    void store(char* to, float by) const {
        MUDSC_MM(store_ps)(reinterpret_cast<float*>(to), MUDSC_MM(mul_ps)(sum, MUDSC_MM(set1_ps)(by)));
    }
};

template <>
struct LineSum<double> {
    Doubles sum = MUDSC_MM(setzero_pd)();
    void add(const char* line) {
        sum = MUDSC_MM(add_pd)(sum, MUDSC_MM(load_pd)(reinterpret_cast<const double*>(line)));
    }
    void store(char* to, double by) const {
        MUDSC_MM(store_pd)(reinterpret_cast<double*>(to), MUDSC_MM(mul_pd)(sum, MUDSC_MM(set1_pd)(by)));
    }
};

// A bfloat16 is the upper half of a float: of each pair, the even one is shifted there and the odd one stands there.
template <>
struct LineSum<bf16> {
    Floats even = MUDSC_MM(setzero_ps)(), odd = MUDSC_MM(setzero_ps)();
    static Bits upper(Bits x) { return both(x, MUDSC_MM(set1_epi32)(static_cast<int>(0xffff0000u))); }
    void add(const char* line) {
        const Bits x = load_bits(line);
        even = MUDSC_MM(add_ps)(even, floats_of(MUDSC_MM(slli_epi32)(x, 16)));
        odd = MUDSC_MM(add_ps)(odd, floats_of(upper(x)));
    }
    void store(char* to, float by) const {
        const Floats a = MUDSC_MM(mul_ps)(even, MUDSC_MM(set1_ps)(by)),
                     b = MUDSC_MM(mul_ps)(odd, MUDSC_MM(set1_ps)(by));
#if defined(__AVX512BF16__)
        // The instruction takes subnormal numbers for zero, and is right about NaN.
        if ((_mm256_fpclass_ps_mask(a, kSubnormal) | _mm256_fpclass_ps_mask(b, kSubnormal)) == 0) {
            const __m256i pairs = _mm256_set_epi16(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
            const __m256i x = reinterpret_cast<__m256i>(_mm256_cvtne2ps_pbh(b, a));
            _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_permutexvar_epi16(pairs, x));
            return;
        }
#else
        if (!any_nan(a, b)) {
            const Bits x = MUDSC_MM(srli_epi32)(rounded(a), 16), y = upper(rounded(b));
            const Bits pairs = either(x, y);
            memcpy(to, &pairs, sizeof pairs);
            return;
        }
#endif
        float each[2][kVector / 4];
        memcpy(each[0], &a, sizeof a);
        memcpy(each[1], &b, sizeof b);
        for (int r = 0; r < kVector / 2; ++r) reinterpret_cast<bf16*>(to)[r] = from_f32<bf16>(each[r % 2][r / 2]);
    }
#if !defined(__AVX512BF16__)
    // As from_f32 rounds; the lower half is to be dropped.
    static Bits rounded(Floats x) {
        const Bits bits = bits_of(x);
        const Bits odd_bit = both(MUDSC_MM(srli_epi32)(bits, 16), MUDSC_MM(set1_epi32)(1));
        return MUDSC_MM(add_epi32)(bits, MUDSC_MM(add_epi32)(odd_bit, MUDSC_MM(set1_epi32)(0x7fff)));
    }
#endif
};

template <>
struct LineSum<f16> {
#if defined(__F16C__)
    Floats low = MUDSC_MM(setzero_ps)(), high = MUDSC_MM(setzero_ps)();
    void add(const char* line) {
        const __m128i* x = reinterpret_cast<const __m128i*>(line);
        low = _mm256_add_ps(low, _mm256_cvtph_ps(_mm_load_si128(x)));
        high = _mm256_add_ps(high, _mm256_cvtph_ps(_mm_load_si128(x + 1)));
    }
    void store(char* to, float by) const {
        const Floats f = _mm256_set1_ps(by);
        __m128i* x = reinterpret_cast<__m128i*>(to);
        _mm_store_si128(x, _mm256_cvtps_ph(_mm256_mul_ps(low, f), _MM_FROUND_TO_NEAREST_INT));
        _mm_store_si128(x + 1, _mm256_cvtps_ph(_mm256_mul_ps(high, f), _MM_FROUND_TO_NEAREST_INT));
    }
#else
    float sum[kVector / 2] = {};
    void add(const char* line) {
        for (int r = 0; r < kVector / 2; ++r) sum[r] += to_f32(reinterpret_cast<const f16*>(line)[r]);
    }
    void store(char* to, float by) const {
        for (int r = 0; r < kVector / 2; ++r) reinterpret_cast<f16*>(to)[r] = from_f32<f16>(sum[r] * by);
    }
#endif
};

#undef MUDSC_MM

// Elements in a lane, rows of a tile.
template <typename T>
constexpr int kInLane = 16 / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kTileRows = Vector::kLanes * kInLane<T>;

// Inside each lane, element k of vector e becomes element e of vector k: interleaving halves once for every bit of k.
template <typename T>
inline void transpose_lanes(Vector (&x)[kInLane<T>]) {
    constexpr int n = kInLane<T>, bytes = static_cast<int>(sizeof(T));
#pragma GCC unroll 4
    for (int width = 1; width < n; width *= 2) {
        Vector y[n];
#pragma GCC unroll 8
        for (int i = 0; i < n / 2; ++i) {
            y[2 * i] = Vector::low<bytes>(x[i], x[i + n / 2]);
            y[2 * i + 1] = Vector::high<bytes>(x[i], x[i + n / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) x[i] = y[i];
    }
}

// Offsets stay where they are, to be loaded when they are used: there are more of them than registers, and
// the compiler would carry them in vector registers, at the cost of a move for each.
inline void forget(const void* table) {
#if defined(__GNUC__)
    __asm__ volatile("" : : "r"(table) : "memory");
#else
    (void)table;
#endif
}

// lines[u] = unit u of all rows. A few lines of each row are brought together first: rows that begin a power of two
// apart share their places in L1 and would push each other out.
template <typename T>
void spread(const T* const* rows, int64_t units, char* lines) {
    constexpr int n = kInLane<T>, R = kTileRows<T>;
    constexpr int64_t size = static_cast<int64_t>(sizeof(T)), kNear = 256, pitch = kNear + kCacheLine;
    alignas(64) char near[R * pitch];
    for (int64_t u = 0; u < units; u += kNear / size) {
        const int64_t here = min64(kNear / size, units - u);
        for (int r = 0; r < R; ++r) {
            if (here == kNear / size) {
                memcpy(near + r * pitch, rows[r] + u, kNear);
            } else {
                memcpy(near + r * pitch, rows[r] + u, static_cast<size_t>(here * size));
            }
        }
        for (int64_t k = 0; k < here; k += n) {
            const char* from = near + k * size;
            char* to = lines + (u + k) * kVector;
            Vector x[n];
#pragma GCC unroll 16
            for (int e = 0; e < n; ++e) x[e] = Vector::lanes([&](int lane) { return from + (lane * n + e) * pitch; });
            transpose_lanes<T>(x);
#pragma GCC unroll 16
            for (int e = 0; e < n; ++e) x[e].store(to + e * kVector);
        }
    }
}

// One vector of every row: element k is in the line at base + at[k], or in the k-th one where `at` is null.
template <typename T, bool InOrder>
inline void collect(const char* base, const int32_t* at, char* stage, int64_t stage_row) {
    constexpr int n = kInLane<T>;
    const auto line = [&](int k) { return base + (InOrder ? k * kVector : at[k]); };
#pragma GCC unroll 1
    for (int c = 0; c < Vector::kLanes; ++c) {
        forget(at);
        Vector x[n];
#pragma GCC unroll 16
        for (int e = 0; e < n; ++e) x[e] = Vector::lanes([&](int lane) { return line(lane * n + e) + 16 * c; });
        transpose_lanes<T>(x);
#pragma GCC unroll 16
        for (int k = 0; k < n; ++k) x[k].store(stage + (c * n + k) * stage_row);
    }
}

// Stores the staged bytes of one row. `stage` holds kStage of them behind a line that is kept from the stage before:
// results that bypass the cache are stored in whole lines wherever a row begins.
inline void put(char* out, char* stage, int64_t bytes, bool stream, bool first, bool last) {
    const char* fresh = stage + kCacheLine;
    if (!stream) {
        if (bytes == kStage) {
            memcpy(out, fresh, kStage);
        } else {
            memcpy(out, fresh, static_cast<size_t>(bytes));
        }
        return;
    }
    const int64_t phase = reinterpret_cast<uintptr_t>(out) & (kCacheLine - 1);
    int64_t done = -phase;  // of the fresh bytes
    if (first && phase != 0) {
        const int64_t head = min64(kCacheLine - phase, bytes);
        memcpy(out, fresh, static_cast<size_t>(head));
        done = head;
    }
    for (; done + kCacheLine <= bytes; done += kCacheLine) stream_line(out + done, fresh + done);
    if (last) {
        if (done < bytes) memcpy(out + done, fresh + done, static_cast<size_t>(bytes - done));
    } else {
        memcpy(stage, stage + kStage, kCacheLine);
    }
}

// All units of kTileRows rows from outer index o on; of the last tile the rows past `rows` repeat the last one and are
// not stored.
template <typename Worker>
void tile(const Worker& work, const Tiling& t, char* lines, int64_t o, int64_t rows) {
    using T = typename Worker::Element;
    constexpr int R = kTileRows<T>;
    constexpr int64_t size = static_cast<int64_t>(sizeof(T)), in_vector = kVector / size, in_stage = kStage / size;
    const Plan& p = work.p;
    const T *in[R], *next[R];
    T* out[R];
    for (int r = 0; r < R; ++r) {
        int64_t in_at, out_at;
        offsets(p.l, min64(o + R + r, p.l.outer - 1), &in_at, &out_at);
        next[r] = static_cast<const T*>(p.a.in) + in_at;
        offsets(p.l, min64(o + r, o + rows - 1), &in_at, &out_at);
        in[r] = static_cast<const T*>(p.a.in) + in_at;
        out[r] = static_cast<T*>(p.a.out) + out_at;
    }
    spread<T>(in, t.in_units, lines);
    memset(lines + t.in_units * kVector, 0, kVector);
    constexpr int64_t stage_row = kStage + kCacheLine;
    alignas(64) char stage[R * stage_row];
    alignas(64) char sums[in_vector * kVector];
    const int64_t stages = ceil_div(p.l.units, in_stage);
    const int64_t ahead = ceil_div(ceil_div(t.in_units * size, stages), kCacheLine) * kCacheLine;
    for (int64_t s = 0; s < stages; ++s) {
        const int64_t j = s * in_stage, n = min64(in_stage, p.l.units - j);
        if (!p.stream && s + 1 < stages) {
            for (int r = 0; r < R; ++r) {
                const char* to = reinterpret_cast<const char*>(out[r] + j + in_stage);
                for (int64_t b = 0; b < kStage; b += kCacheLine) __builtin_prefetch(to + b, 1, 2);
            }
        }
        int64_t asked = 0;
        for (int64_t k = 0; k < n; k += in_vector) {
            char* to = stage + kCacheLine + k * size;
            // The next tile's rows, in equal shares: asked for all at once they keep the loads of this tile waiting.
            for (const int64_t due = (k + in_vector) * R / in_stage; asked < due && o + R < p.l.outer; ++asked) {
                const char* from = reinterpret_cast<const char*>(next[asked]) + s * ahead;
                for (int64_t b = 0; b < ahead; b += kCacheLine) __builtin_prefetch(from + b, 0, 2);
            }
            if constexpr (Worker::kSums) {
                work.lines(lines, t.at, j + k, min64(in_vector, n - k), sums);
                collect<T, true>(sums, nullptr, to, stage_row);
            } else {
                collect<T, false>(lines, t.at + j + k, to, stage_row);
            }
        }
        for (int r = 0; r < rows; ++r)
            put(reinterpret_cast<char*>(out[r] + j), stage + r * stage_row, n * size, p.stream, s == 0,
                s + 1 == stages);
    }
}

#endif  // MUDSC_UNPACK

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
