// Gather and segment sum along one axis of a strided tensor. Limited by memory: every element is read once and written
// once, in runs as long as the strides allow; large results bypass the cache, which saves reading what is overwritten.
#if defined(__linux__)
#include <unistd.h>
#endif

#include "cpu/kernels/regroup_nines.h"
#include "cpu/kernels/regroup_short.h"
#include "cpu/kernels/regroup_tile.h"
#include "cpu/short_buffer.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

constexpr int64_t kTaskBytes = 256 << 10;
constexpr int64_t kStreamFromBytes = 8 << 20;  // at least; see cache_bytes
constexpr int64_t kFarBytes = 1 << 20;         // from here on runs are asked for before they are read
constexpr int64_t kBlockBytes = 2048;          // of a row, gathered in L1 before it is stored in whole lines
constexpr int64_t kRowsInCache = 16 << 10;     // rows gathered at once must leave room in L1 for the index
constexpr int64_t kTileUnits = 64 << 10;       // of an axis that is regrouped in tiles
constexpr int64_t kRun = 512;  // elements summed in registers and L1 before they are converted and stored

// Results of this size would not leave room for their source in the last cache.
int64_t cache_bytes() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
    return min64(max64(sysconf(_SC_LEVEL3_CACHE_SIZE) / 2, kStreamFromBytes), 2 * kStreamFromBytes);
#else
    return kStreamFromBytes;
#endif
}

// Elements that are only moved.
template <typename T>
struct Mover {
    using Element = T;
    static constexpr bool kSums = false;
    const Plan& p;

    // Runs of inner elements that are contiguous on both sides.
    void contiguous(T* out, const T* in, int64_t j0, int64_t j1, Ahead ahead) const {
        const int64_t size = static_cast<int64_t>(sizeof(T)), bytes = p.l.inner * size;
        if (p.packed && p.near != nullptr && bytes <= 128) {
            if (p.full) {
                const int64_t before = (in - static_cast<const T*>(p.a.in)) * size, behind = p.reach * size - before;
                const bool pairs = before >= kPairMargin && behind >= kPairMargin;
#if defined(__AVX512BW__)
                if constexpr (sizeof(T) == 2) {
                    if (p.l.inner == kNine && j1 - j0 >= kThree && behind >= (kNinesRead - kNine) * size)
                        return move_row_of_nines(out + j0 * kNine, in, p.near + j0, j1 - j0, ahead);
                }
#endif
                switch (bytes) {  // kernels of 3 x 3 and 5 x 5
                    case 9: return move_exact<9>(out, in, p.near, j0, j1, pairs, ahead);
                    case 18: return move_exact<18>(out, in, p.near, j0, j1, pairs, ahead);
                    case 25: return move_exact<25>(out, in, p.near, j0, j1, pairs, ahead);
                    case 36: return move_exact<36>(out, in, p.near, j0, j1, pairs, ahead);
                    case 50: return move_exact<50>(out, in, p.near, j0, j1, pairs, ahead);
                    case 72: return move_exact<72>(out, in, p.near, j0, j1, pairs, ahead);
                    case 100: return move_exact<100>(out, in, p.near, j0, j1, pairs, ahead);
                    default: break;
                }
            }
            const int64_t readable = p.in_units * p.l.inner;
            const auto move = bytes <= 16   ? move_short<16, T>
                              : bytes <= 32 ? move_short<32, T>
                              : bytes <= 48 ? move_short<48, T>
                              : bytes <= 64 ? move_short<64, T>
                                            : move_short<128, T>;
            move(out, in, p.a.ptr, p.near, p.full, p.l.inner, readable, j0, j1, ahead);
            return;
        }
        for (int64_t j = j0; j < j1; ++j) {
            char* to = reinterpret_cast<char*>(out + j * p.l.unit_out);
            const int64_t first = p.full ? j : p.a.ptr[j];
            if (!p.full && first == p.a.ptr[j + 1]) {
                memset(to, 0, static_cast<size_t>(bytes));
                continue;
            }
            const char* from = reinterpret_cast<const char*>(in + p.at[first]);
            if (bytes <= kShort) {
                if ((j - j0) % Ahead::kGroup == 0) ahead.ask(to);
                copy_short(to, from, bytes);
            } else {
                const bool more = first + 1 < p.a.ptr[p.l.units];
                const char* next = more ? reinterpret_cast<const char*>(in + p.at[first + 1]) : from;
                copy_run(to, from, bytes, p.stream, p.far ? next : nullptr);
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
    static constexpr bool kSums = true;
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
    const Acc* factors() const {
        if constexpr (sizeof(Acc) == 8) {
            return p.exact_scale;
        } else {
            return p.scale;
        }
    }
    Acc factor(int64_t j) const { return factors()[j]; }

    void contiguous(T* out, const T* in, int64_t j0, int64_t j1, Ahead ahead) const {
        if (p.packed && p.near != nullptr && p.l.inner <= kWide) {
            const int64_t readable = p.in_units * p.l.inner;
#if defined(__AVX512BF16__)
            if constexpr (kBf16<T>) {
                const int64_t behind = p.reach - (in - static_cast<const T*>(p.a.in));
                if (p.alike && p.l.inner == kNine && j1 - j0 >= kThree && behind >= kNinesRead - kNine)
                    return sum_row_of_nines(out + j0 * kNine, in, p.near + 2 * j0, factor(j0), j1 - j0, ahead);
            }
#endif
            const auto by = [this](int64_t j) { return factor(j); };
            sum_short<T>(out, in, p.a.ptr, p.near, by, p.l.inner, readable, j0, j1, ahead);
            return;
        }
        for (int64_t j = j0; j < j1; ++j) run(out + j * p.l.unit_out, in, j);
    }

    static auto pair(const T* x, const T* y) {
        Sum<T, kLong<T>* static_cast<int>(sizeof(T))> sum;
        sum.start(x);
        sum.add(y);
        return sum;
    }

    void run(T* out, const T* in, int64_t j) const {
        const Acc by = factor(j);
        const int64_t first = p.a.ptr[j], last = p.a.ptr[j + 1];
        if (last - first == 2) {
            // The usual zip, one unit of each model or two of one: no detour through a buffer.
            const T *x = in + p.at[first], *y = in + p.at[first + 1];
            const int64_t whole = p.l.inner / kLong<T> * kLong<T>;
            int64_t k = 0;
            bool again = false;
            for (; k < whole; k += kLong<T>) again |= pair(x + k, y + k).quick(out + k, by);
            for (int64_t i = 0; again && i < whole; i += kLong<T>) pair(x + i, y + i).exact(out + i, by);
            for (; k < p.l.inner; ++k) out[k] = narrow((widen(x[k]) + widen(y[k])) * by);
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

#if defined(MUDSC_TILES)
    // Units [j, j + n) of a tile, each as a line.
    void lines(const char* from, const int32_t* at, int64_t j, int64_t n, Vector* to) const {
        int64_t m = p.a.ptr[j];
        for (int64_t k = 0; k < n; ++k) {
            Sum<T, kVector> sum;
            for (const int64_t end = p.a.ptr[j + k + 1]; m < end; ++m) sum.add(from + at[m]);
            store_sum(sum, to + k, factor(j + k));
        }
    }
#endif

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
        int64_t next_at, ignored;
        offsets(l, min64(o + 1, l.outer - 1), &next_at, &ignored);
        const int64_t size = static_cast<int64_t>(sizeof(T)), bytes = l.inner * size;
        const int64_t row = work.p.in_units * llabs(l.unit_in) * size, groups = ceil_div(l.units, Ahead::kGroup);
        const int64_t in_lines = min64(ceil_div(row, groups * kCacheLine), 64);
        const char* next = reinterpret_cast<const char*>(static_cast<const T*>(work.p.a.in) + next_at);
        next += j0 / Ahead::kGroup * in_lines * kCacheLine;
        work.contiguous(out, in, j0, j1, Ahead{next, in_lines, ceil_div(Ahead::kGroup * bytes, kCacheLine)});
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
        if (p.near != nullptr && l.unit_out == 1) {
            for (; o + 4 <= o1 && 4 * row_bytes <= kRowsInCache; o += 4) unit_rows<Worker, 4>(work, o, j0, j1);
            for (; o < o1; ++o) unit_rows<Worker, 1>(work, o, j0, j1);
        }
        for (; o < o1; ++o) strided(work, o, j0, j1);
        if (p.stream) fence();
    });
}

#if defined(MUDSC_TILES)
// Rows of units in tiles. False where the layout is another one, there are too few rows to fill a tile, or no memory.
template <typename Worker>
bool run_tiles(const Plan& p) {
    using T = typename Worker::Element;
    constexpr int64_t R = kTileRows<T>, size = static_cast<int64_t>(sizeof(T)), in_vector = kVector / size;
    const Layout& l = p.l;
    if (l.unit_in != 1 || l.unit_out != 1 || l.outer < R / 2 || l.units < in_vector) return false;
    const int64_t members = p.a.ptr[l.units];
    Tiling t;
    t.in_units = p.in_units;
    if (t.in_units > kTileUnits || t.in_units < in_vector / 2) return false;
    const int64_t padded = ceil_div(l.units, in_vector) * in_vector;
    ShortBuffer<int32_t> at(Worker::kSums ? members : padded);
    if (!at) return false;
    ShortBuffer<uint8_t> pairs(Worker::kSums ? padded / in_vector : 0);
    if (!pairs) return false;
    if (Worker::kSums) {
        for (int64_t m = 0; m < members; ++m) at[m] = line_of<T>(p.a.members[m]);
        for (int64_t j = 0; j < padded; j += in_vector) {
            bool all = j + in_vector <= l.units;
            for (int64_t k = j; all && k < j + in_vector; ++k) all = p.a.ptr[k + 1] - p.a.ptr[k] == 2;
            pairs[j / in_vector] = all;
        }
    } else {
        const auto nothing = static_cast<int32_t>(lines_bytes<T>(t.in_units));
        for (int64_t j = 0; j < padded; ++j) {
            const bool some = j < l.units && p.a.ptr[j] < p.a.ptr[j + 1];
            at[j] = some ? line_of<T>(p.a.members[p.a.ptr[j]]) : nothing;
        }
    }
    t.at = at.get();
    t.pairs = pairs.get();
    const Worker work{p};
    const int64_t row_bytes = max64(l.units, t.in_units) * size;
    const int64_t tiles_a_task = max64(1, kTaskBytes / (row_bytes * R));
    const int64_t tasks = ceil_div(l.outer, tiles_a_task * R);
    const int workers = static_cast<int>(min64(max64(1, p.a.threads), tasks));
    const int64_t line_bytes = lines_bytes<T>(t.in_units) + kCacheLine;
    Buffer<char> lines(workers * line_bytes);
    if (!lines) return false;
    parallel_each(workers, tasks, [&](int64_t task, int worker) {
        const int64_t end = min64((task + 1) * tiles_a_task * R, l.outer);
        char* mine = lines.get() + worker * line_bytes;
        for (int64_t o = task * tiles_a_task * R; o < end; o += R) tile(work, t, mine, o, min64(R, end - o));
        if (p.stream) fence();
    });
    return true;
}
#else
template <typename Worker>
bool run_tiles(const Plan&) {
    return false;
}
#endif

template <typename Worker>
void run_best(const Plan& p) {
    if (!run_tiles<Worker>(p)) run<Worker>(p);
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
    ShortBuffer<int64_t> at(members);
    if (!at) return Status::no_memory;
    for (int64_t m = 0; m < members; ++m) at[m] = a.members[m] * l.unit_in;
    const bool packed = l.unit_in == l.inner && l.unit_out == l.inner;
    const bool rows_of_units = l.unit_out == 1, nearby = rows_of_units || packed;
    ShortBuffer<int32_t> near(nearby ? members : 0);
    if (!near) return Status::no_memory;
    bool fits = nearby;
    for (int64_t m = 0; m < members && fits; ++m) {
        fits = llabs(at[m]) <= INT32_MAX;
        near[m] = static_cast<int32_t>(at[m]);
    }
    bool single = a.scale == nullptr, full = single && members == l.units;
    for (int64_t j = 0; single && j < l.units; ++j) {
        single = a.ptr[j + 1] - a.ptr[j] <= 1;
        full = full && a.ptr[j] == j;
    }
    int64_t in_units = 0;
    for (int64_t m = 0; m < members; ++m) in_units = max64(in_units, a.members[m] + 1);
    const int64_t bytes = l.outer * l.units * l.inner * a.element_bytes;
    ShortBuffer<float> scale(single ? 0 : l.units);
    ShortBuffer<double> ones(single || a.scale != nullptr ? 0 : l.units);
    if (!scale || !ones) return Status::no_memory;
    for (int64_t j = 0; !single && j < l.units; ++j) scale[j] = a.scale != nullptr ? static_cast<float>(a.scale[j]) : 1;
    for (int64_t j = 0; !single && a.scale == nullptr && j < l.units; ++j) ones[j] = 1;
    bool alike = !single;
    for (int64_t j = 0; j < l.units && alike; ++j)
        alike = a.ptr[j + 1] - a.ptr[j] == 2 && (a.scale == nullptr || a.scale[j] == a.scale[0]);
    int64_t reach = 0;
    for (int d = 0; d < l.n; ++d) reach += max64(0, (l.shape[d] - 1) * l.in[d]);
    const Plan plan{a,
                    l,
                    at.get(),
                    fits ? near.get() : nullptr,
                    scale.get(),
                    a.scale != nullptr ? a.scale : ones.get(),
                    in_units,
                    reach,
                    packed,
                    full,
                    alike,
                    bytes >= cache_bytes(),
                    bytes > kFarBytes};
    if (single) {
        switch (a.element_bytes) {
            case 1: run_best<Mover<uint8_t>>(plan); return Status::ok;
            case 2: run_best<Mover<uint16_t>>(plan); return Status::ok;
            case 4: run_best<Mover<uint32_t>>(plan); return Status::ok;
            case 8: run_best<Mover<uint64_t>>(plan); return Status::ok;
            case 16: run<Mover<Wide>>(plan); return Status::ok;
            default: return Status::unsupported;
        }
    }
    switch (a.dtype) {
        case Dtype::f64: run_best<Summer<double, double>>(plan); return Status::ok;
        case Dtype::f32: run_best<Summer<float, float>>(plan); return Status::ok;
        case Dtype::f16: run_best<Summer<f16, float>>(plan); return Status::ok;
        case Dtype::bf16: run_best<Summer<bf16, float>>(plan); return Status::ok;
        default: return Status::unsupported;
    }
}

}  // namespace MUDSC_ISA
}  // namespace mudsc
