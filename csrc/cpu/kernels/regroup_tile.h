// Regrouping where the units lie side by side, as on the last axis of a usual tensor. Taken element by element it costs
// a load and a store for each; here rows are transposed in tiles, so that one unit of all of a tile's rows is a line of
// vector width, to be moved or added up as a whole, and transposed back on the way out.
#pragma once

#include "cpu/kernels/regroup_sums.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

// ---- vectors: 16-byte lanes, as wide as the instruction set has them ----

// `mm` is the part of the instructions' names in front of "unpack", `all` what comes before the operands.
#define MUDSC_INTERLEAVE(Type, name, mm, which, all)           \
    template <int Bytes>                                       \
    static Type name(Type a, Type b) {                         \
        if constexpr (Bytes == 1) {                            \
            return {mm##_unpack##which##_epi8(all a.v, b.v)};  \
        } else if constexpr (Bytes == 2) {                     \
            return {mm##_unpack##which##_epi16(all a.v, b.v)}; \
        } else if constexpr (Bytes == 4) {                     \
            return {mm##_unpack##which##_epi32(all a.v, b.v)}; \
        } else {                                               \
            return {mm##_unpack##which##_epi64(all a.v, b.v)}; \
        }                                                      \
    }

// Lines are of 32 bytes also where there are registers of 64: a line of four lanes costs more loads than two of two.
#if defined(__AVX2__)
#define MUDSC_TILES 1
struct Vector {
    __m256i v;
    static constexpr int kLanes = 2;
    template <typename At>
    static Vector lanes(const At& at) {
        const __m256i x = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at(0))));
        return {_mm256_inserti128_si256(x, _mm_loadu_si128(reinterpret_cast<const __m128i*>(at(1))), 1)};
    }
    static Vector load(const char* from) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))}; }
    void store(char* to) const { _mm256_store_si256(reinterpret_cast<__m256i*>(to), v); }
    MUDSC_INTERLEAVE(Vector, low, _mm256, lo, )
    MUDSC_INTERLEAVE(Vector, high, _mm256, hi, )
};
#elif defined(__SSE2__)
#define MUDSC_TILES 1
struct Vector {
    __m128i v;
    static constexpr int kLanes = 1;
    template <typename At>
    static Vector lanes(const At& at) {
        return {_mm_loadu_si128(reinterpret_cast<const __m128i*>(at(0)))};
    }
    static Vector load(const char* from) {
        return lanes([&](int) { return from; });
    }
    void store(char* to) const { _mm_store_si128(reinterpret_cast<__m128i*>(to), v); }
    MUDSC_INTERLEAVE(Vector, low, _mm, lo, )
    MUDSC_INTERLEAVE(Vector, high, _mm, hi, )
};
#endif

#if defined(MUDSC_TILES)

constexpr int64_t kVector = 16 * Vector::kLanes;  // bytes of a line
constexpr int64_t kStage = 256;    // bytes of each output row that are put together before they are stored
constexpr int64_t kForward = 512;  // bytes of each row that are asked for before they are read

// What a row is read in: as much of it as a cache line at once, where there is such a register.
#if defined(__AVX512BW__)
struct Long {
    __m512i v;
    static constexpr int kLanes = 4;
    // Once: the compiler would load it again for every use.
    static Long load(const char* from) {
        __m512i x = _mm512_loadu_si512(from);
#if defined(__GNUC__)
        __asm__("" : "+v"(x));
#endif
        return {x};
    }
    // Each half of it as a vector, `apart` bytes from the other.
    void store(char* to, int64_t apart) const {
        memcpy(to, &v, kVector);
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + apart), _mm512_maskz_extracti64x4_epi64(0xff, v, 1));
    }
    // With a mask of all elements: GCC 12 takes what the instructions without one leave open for a mistake.
#define MUDSC_ALL (~uint64_t{0} >> (64 - 64 / Bytes)),
    MUDSC_INTERLEAVE(Long, low, _mm512_maskz, lo, MUDSC_ALL)
    MUDSC_INTERLEAVE(Long, high, _mm512_maskz, hi, MUDSC_ALL)
#undef MUDSC_ALL
};
#else
struct Long : Vector {
    Long() = default;
    Long(Vector x) : Vector(x) {}
    static Long load(const char* from) { return Vector::load(from); }
    void store(char* to, int64_t) const { Vector::store(to); }
};
#endif
#undef MUDSC_INTERLEAVE

// Elements in a lane, rows of a tile.
template <typename T>
constexpr int kInLane = 16 / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kTileRows = Vector::kLanes * kInLane<T>;

// Inside each lane, element k of vector e becomes element e of vector k: interleaving halves once for every bit of k.
template <typename T, typename V>
inline void transpose_lanes(V (&x)[kInLane<T>]) {
    constexpr int n = kInLane<T>, bytes = static_cast<int>(sizeof(T));
#pragma GCC unroll 4
    for (int width = 1; width < n; width *= 2) {
        V y[n];
#pragma GCC unroll 8
        for (int i = 0; i < n / 2; ++i) {
            y[2 * i] = V::template low<bytes>(x[i], x[i + n / 2]);
            y[2 * i + 1] = V::template high<bytes>(x[i], x[i + n / 2]);
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

// A tile as lines: a unit's first lane, of the tile's first rows, lies at line_of(unit), its next one kVector bytes
// further, in the same cache line. Units are in the order in which the transposition leaves them.
template <typename T>
constexpr int64_t kBlock = kInLane<T> * Long::kLanes;  // units of a row that are read at once
template <typename T>
inline int32_t line_of(int64_t unit) {
    constexpr uint32_t n = kInLane<T>, lanes = Vector::kLanes, block = kBlock<T>, line = kVector;
    const auto u = static_cast<uint32_t>(unit);
    const uint32_t lane = u / n % Long::kLanes;
    return static_cast<int32_t>(u / block * (block * line) + u % n * (Long::kLanes * line) +
                                lane / lanes * (lanes * line) + lane % lanes * 16);
}
template <typename T>
inline int64_t lines_bytes(int64_t units) {
    return ceil_div(units, kBlock<T>) * (kBlock<T> * kVector);
}

// One block of units of all rows: row(r) is where row r of the tile begins.
template <typename T, typename Row>
inline void spread_block(const Row& row, char* lines) {
    constexpr int n = kInLane<T>;
#pragma GCC unroll 2
    for (int part = 0; part < Vector::kLanes; ++part) {
        forget(lines);
        Long x[n];
#pragma GCC unroll 16
        for (int e = 0; e < n; ++e) x[e] = Long::load(row(part * n + e));
        transpose_lanes<T>(x);
#pragma GCC unroll 16
        for (int k = 0; k < n; ++k)
            x[k].store(lines + k * Long::kLanes * kVector + part * kVector, Vector::kLanes * kVector);
    }
}

// Rows are asked for a little ahead, a line of every row in turn, and not the next tile's while this one is stored:
// memory is quickest so, and L2 keeps this tile's lines.
template <typename T>
void spread(const T* const* rows, int64_t units, char* lines) {
    constexpr int64_t R = kTileRows<T>, size = static_cast<int64_t>(sizeof(T)), bytes = kBlock<T> * size;
    int64_t u = 0;
    for (; u + kBlock<T> <= units; u += kBlock<T>) {
        if (u * size % kCacheLine == 0) {
#pragma GCC unroll 32
            for (int r = 0; r < R; ++r) __builtin_prefetch(reinterpret_cast<const char*>(rows[r] + u) + kForward, 0, 2);
        }
        spread_block<T>([&](int r) { return reinterpret_cast<const char*>(rows[r] + u); }, lines + u * kVector);
    }
    if (u == units) return;
    alignas(64) char rest[R * bytes] = {};
    for (int r = 0; r < R; ++r) memcpy(rest + r * bytes, rows[r] + u, static_cast<size_t>((units - u) * size));
    spread_block<T>([&](int r) { return rest + r * bytes; }, lines + u * kVector);
}

// One vector of every row from as many units: units(x, part) loads the lanes of a part of the rows.
template <typename T, typename Units>
inline void collect(const Units& units, char* stage, int64_t stage_row) {
    constexpr int n = kInLane<T>;
#pragma GCC unroll 1
    for (int part = 0; part < Vector::kLanes; ++part) {
        Vector x[n];
        units(x, part);
        transpose_lanes<T>(x);
#pragma GCC unroll 16
        for (int k = 0; k < n; ++k) x[k].store(stage + (part * n + k) * stage_row);
    }
}

// The lanes of a line, added to a sum or its first.
template <typename T, typename At>
inline void start_lanes(Sum<T, kVector>& sum, const At& at) {
    const Vector x = Vector::lanes(at);
    sum.start(&x);
}
template <typename T, typename At>
inline void add_lanes(Sum<T, kVector>& sum, const At& at) {
    const Vector x = Vector::lanes(at);
    sum.add(&x);
}
#if defined(__F16C__)
template <typename At>
inline void start_lanes(Sum<f16, kVector>& sum, const At& at) {
    for (int lane = 0; lane < Vector::kLanes; ++lane) sum.start_part(at(lane), lane);
}
template <typename At>
inline void add_lanes(Sum<f16, kVector>& sum, const At& at) {
    for (int lane = 0; lane < Vector::kLanes; ++lane) sum.add_part(at(lane), lane);
}
#endif

// Units that are moved, from the lines at `at`.
template <typename T>
inline void collect_lines(const char* lines, const int32_t* at, char* stage, int64_t stage_row) {
    collect<T>(
        [&](Vector* x, int part) {
            constexpr int n = kInLane<T>;
            forget(at);
#pragma GCC unroll 16
            for (int e = 0; e < n; ++e)
                x[e] = Vector::lanes([&](int lane) { return lines + at[lane * n + e] + part * kVector; });
        },
        stage, stage_row);
}

// Units of two members each, whose lines are at at[0] and at[1], at[2] and at[3] and so on.
template <typename T, typename Factor>
inline void collect_pairs(const char* lines, const int32_t* at, const Factor& factor, char* stage, int64_t stage_row) {
    collect<T>(
        [&](Vector* x, int part) {
            constexpr int n = kInLane<T>;
            const auto sum_of = [&](int e) {
                Sum<T, kVector> sum;
                const auto member = [&](int m, int lane) {
                    return lines + at[2 * (lane * n + e) + m] + part * kVector;
                };
                start_lanes(sum, [&](int lane) { return member(0, lane); });
                add_lanes(sum, [&](int lane) { return member(1, lane); });
                return sum;
            };
            const auto by = [&](int e) {
                if constexpr (Vector::kLanes == 1) {
                    return factor(e);
                } else {
                    return Halves<decltype(factor(0))>{factor(e), factor(n + e)};
                }
            };
            bool again = false;
            forget(at);
#pragma GCC unroll 16
            for (int e = 0; e < n; ++e) again |= sum_of(e).quick(&x[e], by(e));
            if (!again) return;
            for (int e = 0; e < n; ++e) sum_of(e).exact(&x[e], by(e));
        },
        stage, stage_row);
}

// Sums that were made line by line and lie one after the other.
template <typename T>
inline void collect_sums(const char* sums, char* stage, int64_t stage_row) {
    collect<T>(
        [&](Vector* x, int part) {
            constexpr int n = kInLane<T>;
#pragma GCC unroll 16
            for (int e = 0; e < n; ++e)
                x[e] = Vector::lanes([&](int lane) { return sums + (lane * n + e) * kVector + 16 * part; });
        },
        stage, stage_row);
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
    } else if (phase != 0) {
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
    for (int r = 0; r < R; ++r) {
        for (int64_t b = 0; b < kForward; b += kCacheLine)
            __builtin_prefetch(reinterpret_cast<const char*>(next[r]) + b, 0, 2);
    }
    memset(lines + lines_bytes<T>(t.in_units), 0, kCacheLine);  // of units without members
    constexpr int64_t stage_row = kStage + kCacheLine;
    alignas(64) char stage[R * stage_row];
    alignas(64) char sums[in_vector * kVector];
    const int64_t stages = ceil_div(p.l.units, in_stage);
    for (int64_t s = 0; s < stages; ++s) {
        const int64_t j = s * in_stage, n = min64(in_stage, p.l.units - j);
        if (!p.stream && s + 1 < stages) {
            for (int r = 0; r < R; ++r) {
                const char* to = reinterpret_cast<const char*>(out[r] + j + in_stage);
                for (int64_t b = 0; b < kStage; b += kCacheLine) __builtin_prefetch(to + b, 1, 2);
            }
        }
        for (int64_t k = 0; k < n; k += in_vector) {
            char* to = stage + kCacheLine + k * size;
            if constexpr (Worker::kSums) {
                const int64_t unit = j + k;
                if (t.pairs[unit / in_vector] != 0) {
                    const auto by = [&](int e) { return work.factor(unit + e); };
                    collect_pairs<T>(lines, t.at + p.a.ptr[unit], by, to, stage_row);
                } else {
                    work.lines(lines, t.at, unit, min64(in_vector, n - k), sums);
                    collect_sums<T>(sums, to, stage_row);
                }
            } else {
                collect_lines<T>(lines, t.at + j + k, to, stage_row);
            }
        }
        for (int r = 0; r < rows; ++r)
            put(reinterpret_cast<char*>(out[r] + j), stage + r * stage_row, n * size, p.stream, s == 0,
                s + 1 == stages);
    }
}

#endif  // MUDSC_TILES

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
