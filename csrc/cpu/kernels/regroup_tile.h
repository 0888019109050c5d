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

// Lines are of 32 bytes also where there are registers of 64, whose shuffles run at half the rate.
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
    // Lane `lane` of both, a's first.
    template <int lane>
    static Vector meet(Vector a, Vector b) {
        return {lane == 0 ? _mm256_inserti128_si256(a.v, _mm256_castsi256_si128(b.v), 1)
                          : _mm256_permute2x128_si256(a.v, b.v, 0x31)};
    }
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
    template <int lane>
    static Vector meet(Vector a, Vector) {
        return a;
    }
    void store(char* to) const { _mm_store_si128(reinterpret_cast<__m128i*>(to), v); }
    MUDSC_INTERLEAVE(Vector, low, _mm, lo, )
    MUDSC_INTERLEAVE(Vector, high, _mm, hi, )
};
#endif

#if defined(MUDSC_TILES)

constexpr int64_t kVector = 16 * Vector::kLanes;  // bytes of a line
constexpr int64_t kStage = 256;  // bytes of each output row that are put together before they are stored
constexpr int64_t kTurn = 256;   // bytes of each row that are read in turn
constexpr int64_t kPage = 4096;
constexpr int64_t kManyRows = 16;  // from here on
// Bytes of each row that are asked for before they are read.
constexpr int64_t forward(int64_t rows) { return rows >= kManyRows ? 1024 : 512; }

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
    // Lines from the lanes of their first rows and those of their last ones.
    static void weave(Long a, Long b, char* to) {
        const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        const __m512i back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        _mm512_storeu_si512(to, _mm512_permutex2var_epi64(a.v, front, b.v));
        _mm512_storeu_si512(to + kCacheLine, _mm512_permutex2var_epi64(a.v, back, b.v));
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
    static void weave(Long a, Long b, char* to) {
        meet<0>(a, b).store(to);
        if (kLanes > 1) meet<kLanes - 1>(a, b).store(to + kVector);
    }
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

// A tile as lines: line_of(unit) is where a unit's first lane lies, of the tile's first rows. Its next one follows, or
// lies kVector bytes further, in the same cache line, where it takes more registers than there are to put lines
// together. Units are in the order in which the transposition leaves them.
template <typename T>
constexpr int64_t kBlock = kInLane<T> * Long::kLanes;  // units of a row that are read at once
template <typename T>
constexpr bool kWhole = kTileRows<T> <= 16;  // whether a unit's lanes follow each other
template <typename T>
inline int32_t line_of(int64_t unit) {
    constexpr uint32_t n = kInLane<T>, lanes = Vector::kLanes, block = kBlock<T>, line = kVector;
    const auto u = static_cast<uint32_t>(unit);
    const uint32_t first = u / block * block + u % n * Long::kLanes, lane = u / n % Long::kLanes;
    return static_cast<int32_t>(kWhole<T> ? (first + lane) * line
                                          : (first + lane / lanes * lanes) * line + lane % lanes * 16);
}
template <typename T>
inline int64_t lines_bytes(int64_t units) {
    return ceil_div(units, kBlock<T>) * (kBlock<T> * kVector);
}

// One block of units of all rows: row(r) is where row r of the tile begins.
template <typename T, typename Row>
inline void spread_block(const Row& row, char* lines) {
    constexpr int n = kInLane<T>, parts = Vector::kLanes;
    constexpr int64_t apart = Long::kLanes * kVector;
    Long x[parts][n];
#pragma GCC unroll 2
    for (int part = 0; part < parts; ++part) {
        forget(lines);
#pragma GCC unroll 16
        for (int e = 0; e < n; ++e) x[part][e] = Long::load(row(part * n + e));
        transpose_lanes<T>(x[part]);
#pragma GCC unroll 16
        for (int k = 0; k < n && !kWhole<T>; ++k) x[part][k].store(lines + k * apart + part * kVector, parts * kVector);
    }
#pragma GCC unroll 16
    for (int k = 0; k < n && kWhole<T>; ++k) Long::weave(x[0][k], x[parts - 1][k], lines + k * apart);
}

// Rows are asked for a little ahead, and not the next tile's while this one is stored: memory is quickest so, and L2
// keeps this tile's lines. Many rows are read a few lines of each in turn, which are put together first: by single
// lines the hardware would have more rows to foresee than it can.
template <typename T>
void spread(const T* const* rows, int64_t units, char* lines) {
    constexpr int64_t R = kTileRows<T>, size = static_cast<int64_t>(sizeof(T)), bytes = kBlock<T> * size;
    const auto row = [&](int64_t r, int64_t u) { return reinterpret_cast<const char*>(rows[r] + u); };
    int64_t u = 0;
    if constexpr (R >= kManyRows) {
        constexpr int64_t turn = kTurn / size;
        alignas(64) char near[R * kTurn];
        for (; u + turn <= units; u += turn) {
            for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 4
                for (int64_t b = 0; b < kTurn; b += kCacheLine) {
                    __builtin_prefetch(row(r, u) + forward(R) + b, 0, 2);
                    memcpy(near + r * kTurn + b, row(r, u) + b, kCacheLine);
                }
            }
            for (int64_t k = 0; k < turn; k += kBlock<T>)
                spread_block<T>([&](int r) { return near + r * kTurn + k * size; }, lines + (u + k) * kVector);
        }
    }
    for (; u + kBlock<T> <= units; u += kBlock<T>) {
        if (u * size % kCacheLine == 0) {
#pragma GCC unroll 32
            for (int64_t r = 0; r < R; ++r) __builtin_prefetch(row(r, u) + forward(R), 0, 2);
        }
        spread_block<T>([&](int r) { return row(r, u); }, lines + u * kVector);
    }
    if (u == units) return;
    alignas(64) char rest[R * bytes] = {};
    for (int64_t r = 0; r < R; ++r) memcpy(rest + r * bytes, row(r, u), static_cast<size_t>((units - u) * size));
    spread_block<T>([&](int r) { return rest + r * bytes; }, lines + u * kVector);
}

// One vector of every row of a part, from one of as many units each: each lane of x from another n of them.
template <typename T>
inline void put_part(Vector (&x)[kInLane<T>], int part, char* stage, int64_t stage_row) {
    constexpr int n = kInLane<T>;
    transpose_lanes<T>(x);
#pragma GCC unroll 16
    for (int k = 0; k < n; ++k) x[k].store(stage + (part * n + k) * stage_row);
}

// One vector of every row, from the lines of as many units.
template <typename T>
inline void put_rows(const Vector* line, char* stage, int64_t stage_row) {
    constexpr int n = kInLane<T>, last = Vector::kLanes - 1;
    Vector x[n];
#pragma GCC unroll 16
    for (int e = 0; e < n; ++e) x[e] = Vector::meet<0>(line[e], line[last * n + e]);
    put_part<T>(x, 0, stage, stage_row);
    if (last == 0) return;
#pragma GCC unroll 16
    for (int e = 0; e < n; ++e) x[e] = Vector::meet<last>(line[e], line[last * n + e]);
    put_part<T>(x, last, stage, stage_row);
}

// Units that are moved, from the lines at `at`.
template <typename T>
inline void collect_lines(const char* lines, const int32_t* at, char* stage, int64_t stage_row) {
    constexpr int n = kInLane<T>, units = n * Vector::kLanes;
    if constexpr (kWhole<T>) {
        Vector line[units];
#pragma GCC unroll 16
        for (int e = 0; e < units; ++e) line[e] = Vector::load(lines + at[e]);
        put_rows<T>(line, stage, stage_row);
    } else {
#pragma GCC unroll 1
        for (int part = 0; part < Vector::kLanes; ++part) {
            Vector x[n];
            forget(at);
#pragma GCC unroll 16
            for (int e = 0; e < n; ++e)
                x[e] = Vector::lanes([&](int lane) { return lines + at[lane * n + e] + part * kVector; });
            put_part<T>(x, part, stage, stage_row);
        }
    }
}

// Units of two members each, whose lines are at at[0] and at[1], at[2] and at[3] and so on.
template <typename T, typename Acc>
inline void collect_pairs(const char* lines, const int32_t* at, const Acc* factor, char* stage, int64_t stage_row) {
    constexpr int units = kInLane<T> * Vector::kLanes;
    Vector line[units];
    const auto sum_of = [&](int e) {
        Sum<T, kVector> sum;
        sum.start(lines + at[2 * e]);
        sum.add(lines + at[2 * e + 1]);
        return sum;
    };
    bool again = false;
    forget(at);
#pragma GCC unroll 16
    for (int e = 0; e < units; ++e) again |= sum_of(e).quick(&line[e], factor[e]);
    for (int e = 0; again && e < units; ++e) sum_of(e).exact(&line[e], factor[e]);
    put_rows<T>(line, stage, stage_row);
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
        for (int64_t b = 0; b < forward(R); b += kCacheLine)
            __builtin_prefetch(reinterpret_cast<const char*>(next[r]) + b, 0, 2);
    }
    memset(lines + lines_bytes<T>(t.in_units), 0, kCacheLine);  // of units without members
    constexpr int64_t stage_row = kStage + kCacheLine;
    alignas(64) char stage[R * stage_row];
    Vector sums[in_vector];
    const int64_t stages = ceil_div(p.l.units, in_stage);
    for (int64_t s = 0; s < stages; ++s) {
        const int64_t j = s * in_stage, n = min64(in_stage, p.l.units - j);
        if constexpr (R >=
                      kManyRows) {  // a look at each page of the next tile: the hardware does not go from page to page
            const int64_t row = t.in_units * size, end = row * (s + 1) / stages;
            for (int64_t b = ceil_div(row * s / stages, kPage) * kPage; b < end; b += kPage) {
                for (int r = 0; r < R; ++r) __builtin_prefetch(reinterpret_cast<const char*>(next[r]) + b, 0, 2);
            }
        }
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
                    collect_pairs<T>(lines, t.at + p.a.ptr[unit], work.factors() + unit, to, stage_row);
                } else {
                    work.lines(lines, t.at, unit, min64(in_vector, n - k), sums);
                    put_rows<T>(sums, to, stage_row);
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
