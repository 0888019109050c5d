// Greedy zip in O(n^2): every row keeps its best partner to the right, so a merge costs one row, one column and a scan
// of the rows' maxima. Rows whose best partner went away are only marked: their old maximum stays as an upper bound,
// and they are searched again when that bound comes out on top.
//
// The column is the expensive part: n writes, each to a cache line of its own. It is not written. A row takes over the
// columns that have changed only when it is needed, which for most rows is once. To make that a walk over whole cache
// lines, the merged rows of every 16 merges are transposed into a panel, and the panel is kept in the 16 rows that
// those merges freed, so that the working copy stays all the memory there is.
//
// Merges wait for each other. On several threads each takes a part of a merge's columns, with all that is kept of the
// rows of the same numbers.
#include <math.h>

#include <limits>
#include <type_traits>

#include "cpu/common.h"
#include "cpu/kernels.h"
#include "cpu/kernels/assign_simd.h"
#include "cpu/kernels/crew.h"
#include "cpu/kernels/transpose.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kTile = 64;
constexpr int64_t kGroup = 64;               // rows that share a maximum
constexpr int64_t kShare = 1024;             // columns that are worth a thread
constexpr int kMostParts = 16;               // of a merge
constexpr int64_t kLines = 128;              // of a panel that are written before the next eight columns of it
constexpr int64_t kPanel = 16;               // merges a panel
constexpr int64_t kPolled = 16;              // merges between two looks at the clock
constexpr int64_t kAhead = 8;                // panels fetched ahead: each holds one line for a row
constexpr int64_t kChunk = 256;              // positions searched again for the place of a maximum
constexpr double kSymmetryTolerance = 1e-4;  // of the largest magnitude: more is not rounding

// The largest of x(k) over k in [from, n), -inf if there is none; x.at(k) gives the Vec<T>::lanes numbers from k on.
template <typename T, typename X>
T largest(const X& x, int64_t from, int64_t n) {
    constexpr int64_t lanes = Vec<T>::lanes;
    T most = -static_cast<T>(INFINITY);
    if (n - from >= lanes) {
        Vec<T> top = x.at(n - lanes);  // the last lanes, some of them a second time
        for (; from + lanes <= n; from += lanes) top = vmax(top, x.at(from));
        return highest(top);
    }
    for (; from < n; ++from) most = x(from) > most ? x(from) : most;
    return most;
}

// The first k >= from at which x(k) is at least `least`; there has to be one below n.
template <typename T, typename X>
int64_t first_of(const X& x, T least, int64_t from, int64_t n) {
    constexpr int64_t lanes = Vec<T>::lanes;
    for (; from + lanes <= n; from += lanes) {
        const uint64_t found = ge(x.at(from), Vec<T>::all(least));
        if (found != 0) return from + __builtin_ctzll(found);
    }
    while (from < n - 1 && !(x(from) >= least)) ++from;
    return from;
}

template <typename T>
struct Plain {
    const T* x;
    T operator()(int64_t k) const { return x[k]; }
    Vec<T> at(int64_t k) const { return Vec<T>::load(x + k); }
};

template <typename T>
struct Barred {
    const T *x, *bar;
    T operator()(int64_t k) const { return x[k] + bar[k]; }
    Vec<T> at(int64_t k) const { return Vec<T>::load(x + k) + Vec<T>::load(bar + k); }
};

// The largest of row[k] + bar[k] over k in [from, n) and its first place; -inf and -1 when nothing is allowed.
template <typename T>
T first_max(const T* row, const T* bar, int64_t from, int64_t n, int64_t* place) {
    const Barred<T> entries{row, bar};
    T best = -static_cast<T>(INFINITY);
    int64_t chunk = -1;
    for (int64_t k = from; k < n; k += kChunk) {
        const T top = largest<T>(entries, k, min64(k + kChunk, n));
        if (top > best) {
            best = top;
            chunk = k;
        }
    }
    *place = chunk < 0 ? -1 : first_of(entries, best, chunk, n);
    return best;
}

template <typename T>
class Zipper {
  public:
    explicit Zipper(const ZipArgs& args)
        : a(args),
          n(args.n),
          ld(zip_stride(args.n)),
          parts(static_cast<int>(max64(1, min64(min64(args.threads, kMostParts), args.n / kShare)))) {}

    Status run() {
        if (!a.in_place && !copy.allocate(n * ld)) return Status::no_memory;
        w = a.in_place ? static_cast<T*>(const_cast<void*>(a.similarity)) : copy.get();
        if (!(gone.allocate(n) && best.allocate(n) && partner.allocate(n) && stale.allocate(n) && model.allocate(n) &&
              none.allocate(n) && seen.allocate(n) && survivor.allocate(a.merges) && loser.allocate(a.merges) &&
              highest.allocate(ceil_div(n, kGroup)))) {
            return Status::no_memory;
        }
        const Status loaded = a.in_place ? Status::ok : load();
        if (loaded != Status::ok) return loaded;
        start();
        if (stopped) return Status::interrupted;
        Status status = Status::ok;
        Crew::run(parts, [&](Crew& crew) { status = merge_all(crew); });
        return status;
    }

  private:
    // A number without its sign: as integers these are in the order of magnitude, and infinities and NaN above all.
    using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    static constexpr Bits kInfinite = sizeof(T) == 4 ? Bits{0x7f800000} : static_cast<Bits>(0x7ff0000000000000);
    using Place = Bits;  // a row's number, as wide as an entry: both are compared in one loop

    T* row(int64_t i) const { return w + i * ld; }
    static constexpr T kNone = -static_cast<T>(INFINITY);

    Status merge_all(Crew& crew) {
        *a.total = 0;
        *a.made = 0;
        for (int64_t step = 0; step < a.merges; ++step) {
            if (step % kPolled == 0 && a.poll()) return Status::interrupted;
            const int64_t i = top_row();
            if (i < 0) return Status::infeasible;
            const int64_t j = partner[i];
            *a.total += static_cast<double>(best[i]);
            ++*a.made;
            merge(crew, i, j);
        }
        return Status::ok;
    }

    // Inside tasks: whether to give up. Only the calling thread asks, the others see what it found.
    bool stop(int worker) {
        if (worker == 0 && !stopped && a.poll()) __atomic_store_n(&stopped, true, __ATOMIC_RELAXED);
        return __atomic_load_n(&stopped, __ATOMIC_RELAXED);
    }

    static Bits largest_magnitude(const T* x, int64_t count) {
        constexpr Bits unsigned_part = std::numeric_limits<Bits>::max();
        Bits lane[kLanes] = {}, most = 0;
        int64_t k = 0;
        for (; k + kLanes <= count; k += kLanes) {
            Bits bits[kLanes];
            memcpy(bits, x + k, sizeof bits);
            for (int64_t l = 0; l < kLanes; ++l) {
                const Bits b = bits[l] & unsigned_part;
                lane[l] = lane[l] > b ? lane[l] : b;
            }
        }
        for (; k < count; ++k) {
            Bits b;
            memcpy(&b, x + k, sizeof b);
            b &= unsigned_part;
            most = most > b ? most : b;
        }
        for (int64_t l = 0; l < kLanes; ++l) most = lane[l] > most ? lane[l] : most;
        return most;
    }

    // Copies the chosen rows and columns, checks them, and makes the copy exactly symmetric.
    Status load() {
        const T* s = static_cast<const T*>(a.similarity);
        bool consecutive = a.col_stride == 1;
        for (int64_t k = 1; consecutive && k < n; ++k) consecutive = a.units[k] == a.units[0] + k;
        const int64_t bands = ceil_div(n, kTile);
        Buffer<Bits> magnitude(bands);
        Buffer<T> difference(bands);
        if (!magnitude || !difference) return Status::no_memory;
        parallel_each(a.threads, bands, [&](int64_t band, int worker) {
            Bits most = 0;
            for (int64_t i = band * kTile; i < min64((band + 1) * kTile, n); ++i) {
                if (stop(worker)) return;
                const T* from = s + a.units[i] * a.row_stride;
                T* to = row(i);
                if (consecutive) {
                    memcpy(to, from + a.units[0], static_cast<size_t>(n) * sizeof(T));
                } else {
                    for (int64_t k = 0; k < n; ++k) to[k] = from[a.units[k] * a.col_stride];
                }
                to[i] = 0;
                const Bits here = largest_magnitude(to, n);
                most = here > most ? here : most;
            }
            magnitude[band] = most;
        });
        if (stopped) return Status::interrupted;
        Bits largest = 0;
        for (int64_t b = 0; b < bands; ++b) largest = magnitude[b] > largest ? magnitude[b] : largest;
        if (!a.trusted && largest >= kInfinite) return Status::not_finite;
        T most;
        memcpy(&most, &largest, sizeof most);
        parallel_each(a.threads, bands, [&](int64_t task, int worker) {
            const int64_t band = bands - 1 - task;  // what takes longest comes first
            difference[band] = mirror(band, worker);
        });
        if (stopped) return Status::interrupted;
        for (int64_t b = 0; b < bands; ++b) {
            if (static_cast<double>(difference[b]) > kSymmetryTolerance * static_cast<double>(most))
                return Status::not_symmetric;
        }
        return Status::ok;
    }

    // Copies the upper triangle's tiles of one band of columns onto the lower triangle; returns the largest difference.
    T mirror(int64_t band, int worker) {
        T largest = 0;
        const int64_t k0 = band * kTile, k1 = min64(k0 + kTile, n);
        for (int64_t i0 = 0; i0 <= k0; i0 += kTile) {
            if (stop(worker)) return 0;
            for (int64_t k = k0; k < k1; ++k) {
                T* lower = row(k);
                const int64_t end = min64(i0 + kTile, k);
                for (int64_t i = i0; i < end; ++i) {
                    const T x = row(i)[k], gap = x > lower[i] ? x - lower[i] : lower[i] - x;
                    largest = gap > largest ? gap : largest;
                    lower[i] = x;
                }
            }
        }
        return largest;
    }

    void start() {
        for (int64_t i = 0; i < n; ++i) {
            a.owner[i] = i;
            model[i] = a.model_of[i];
            seen[i] = 0;
            none[i] = gone[i] = 0;
            stale[i] = 0;
        }
        for (int m = 0; m < a.models; ++m) {
            if (spent(m)) bar_pairs_inside(m);
        }
        parallel_each(a.threads, ceil_div(n, kTile), [&](int64_t band, int worker) {
            int64_t place;
            for (int64_t i = band * kTile; i < min64((band + 1) * kTile, n); ++i) {
                if (stop(worker)) return;
                pull(i);
                best[i] = first_max(row(i), gone.get(), i + 1, n, &place);
                partner[i] = static_cast<Place>(place);
            }
        });
        for (int64_t i = 0; i < n; i += kGroup) find_highest(i);
    }

    bool spent(int m) const { return a.budget[m] <= 0 || a.block_budget[m] <= 0; }

    // The largest of the entries that are recorded of row i's group.
    void find_highest(int64_t i) {
        const int64_t first = i / kGroup * kGroup;
        highest[i / kGroup] = largest<T>(Plain<T>{best.get()}, first, min64(first + kGroup, n));
    }

    void set_best(int64_t i, T entry, int64_t place) {
        best[i] = entry;
        partner[i] = static_cast<Place>(place);
        stale[i] = 0;
        find_highest(i);
    }

    // The first row with the largest entry, or -1.
    int64_t top_row() {
        for (;;) {
            int64_t group, place;
            const T top = first_max(highest.get(), none.get(), 0, ceil_div(n, kGroup), &group);
            if (group < 0) return -1;
            const int64_t i = first_of(Plain<T>{best.get()}, top, group * kGroup, n);
            if (!stale[i]) return i;
            pull(i);
            const T entry = first_max(row(i), gone.get(), i + 1, n, &place);
            set_best(i, entry, place);
        }
    }

    void merge(Crew& crew, int64_t i, int64_t j) {
        // Neither reads an entry that the other writes: of two merged rows, the later one has the entry of both.
        crew.each(parts > 1 ? 2 : 1, [&](int part) {
            if (part == 0) pull(i);
            if (part == 1 || parts == 1) pull(j);
        });
        a.owner[j] = i;
        remove(j);
        if (model[i] == model[j]) spend(model[i]);
        if (a.attenuation <= 0) {
            remove(i);
            for (int64_t k = 0; k < j; ++k) stale[k] |= partner[k] == i || partner[k] == j;
            return;
        }
        T entry[kMostParts];
        int64_t place[kMostParts];
        crew.each(parts, [&](int part) {
            const int64_t groups = ceil_div(n, kGroup);
            const int64_t from = groups * part / parts * kGroup, to = groups * (part + 1) / parts * kGroup;
            entry[part] = merge_columns(i, j, from, min64(to, n), &place[part]);
        });
        int first = 0;
        for (int part = 1; part < parts; ++part) first = entry[part] > entry[first] ? part : first;
        set_best(i, entry[first], place[first]);
        record(crew, i, j);
    }

    // Columns [from, to) of merged row i, and what rows of these numbers know of it and of j. Returns the largest
    // entry to the right of the diagonal.
    T merge_columns(int64_t i, int64_t j, int64_t from, int64_t to, int64_t* place) {
        T* merged = row(i);
        const T* other = row(j);
        const T by = held_attenuation<T>(a.attenuation);
        for (int64_t k = from; k < to; ++k) merged[k] = (other[k] < merged[k] ? other[k] : merged[k]) * by;
        for (int64_t k = from; k < min64(i, to); k += kGroup) changed(k, min64(min64(i, to), k + kGroup), i, j, merged);
        for (int64_t k = max64(i, from); k < min64(j, to); ++k) stale[k] |= partner[k] == j;
        return first_max(merged, gone.get(), max64(i + 1, from), to, place);
    }

    // Notes that row i is new and row j free; every kPanel-th time the new rows are transposed into the free ones.
    void record(Crew& crew, int64_t i, int64_t j) {
        survivor[events] = static_cast<int32_t>(i);
        loser[events] = static_cast<int32_t>(j);
        seen[i] = static_cast<int32_t>(++events);
        if (events % kPanel != 0) return;
        const int64_t first = events - kPanel;
        const T* from[kPanel];
        for (int64_t q = 0; q < kPanel; ++q) {
            // A survivor that has been merged away since is in no allowed pair; its row may be one of those written
            // here.
            const int64_t unit = survivor[first + q];
            from[q] = gone[unit] == 0 ? row(unit) : none.get();
        }
        const int64_t rows_a_slot = ceil_div(n, kPanel);
        crew.each(parts, [&](int part) {
            for (int64_t slot = kPanel * part / parts; slot < kPanel * (part + 1) / parts; ++slot) {
                const int64_t end = min64((slot + 1) * rows_a_slot, n);
                for (int64_t k = slot * rows_a_slot; k < end; k += kLines) {
                    T* lines = panel(first / kPanel, k);
                    const T* at[kPanel];
                    for (int64_t q = 0; q < kPanel; ++q) at[q] = from[q] + k;
                    for (int64_t q = 0; q < kPanel; q += 8) {
                        transpose_8(at + q, 0, min64(kLines, end - k), lines + q, kPanel);
                    }
                }
            }
        });
    }

    // Where panel p keeps the entries of row k in its kPanel columns.
    T* panel(int64_t p, int64_t k) const {
        const int64_t rows_a_slot = ceil_div(n, kPanel);
        return row(loser[p * kPanel + k / rows_a_slot]) + k % rows_a_slot * kPanel;
    }

    // Takes over, in their order, the columns that were merged since row k last looked.
    void pull(int64_t k) {
        T* to = row(k);
        const int64_t in_panels = events / kPanel * kPanel;
        int64_t e = seen[k];
        while (e < in_panels) {
            const int64_t p = e / kPanel, end = (p + 1) * kPanel;
            if (end + kAhead * kPanel <= in_panels) __builtin_prefetch(panel(p + kAhead, k));
            const T* line = panel(p, k) - p * kPanel;
            for (; e < end; ++e) to[survivor[e]] = line[e];
        }
        for (; e < events; ++e) to[survivor[e]] = row(survivor[e])[k];
        seen[k] = static_cast<int32_t>(events);
    }

    // Rows [from, to) of one group, all below i, after their entries at i became those of row i and j went away. What
    // is recorded of a row is exact, or a bound if stale.
    void changed(int64_t from, int64_t to, int64_t i, int64_t j, const T* entries) {
        const Place at_i = static_cast<Place>(i), at_j = static_cast<Place>(j);
        Place any = 0;  // mostly nothing is to be done for any of them
        for (int64_t k = from; k < to; ++k)
            any |= (gone[k] == 0) & ((entries[k] >= best[k]) | (partner[k] == at_i) | (partner[k] == at_j));
        if (any == 0) return;
        T top = highest[from / kGroup];
        for (int64_t k = from; k < to; ++k) {
            if (gone[k] != 0) continue;
            const T x = entries[k];
            const bool lost = partner[k] == at_i || partner[k] == at_j;
            if (x > best[k] || (!stale[k] && x == best[k] && (lost || at_i < partner[k]))) {
                best[k] = x;
                partner[k] = at_i;
                stale[k] = 0;
                top = x > top ? x : top;
            } else if (lost) {
                stale[k] = 1;
            }
        }
        highest[from / kGroup] = top;
    }

    // The unit takes part in no further pair.
    void remove(int64_t unit) {
        gone[unit] = kNone;
        set_best(unit, kNone, partner[unit]);
    }

    void spend(int m) {
        --a.budget[m];
        --a.block_budget[m];
        if (!spent(m)) return;
        bar_pairs_inside(m);
        for (int64_t k = 0; k < n; ++k) {
            stale[k] |= model[k] == m && best[k] != kNone && model[partner[k]] == m;
        }
    }

    // Written into the matrix, because a barred entry also bars what it is merged with (rule 5's minimum). The rows are
    // brought up to date first, so that nothing recorded earlier is pulled over it.
    void bar_pairs_inside(int m) {
        for (int64_t i = 0; i < n; ++i) {
            if (model[i] != m || gone[i] != 0) continue;
            pull(i);
            T* entries = row(i);
            for (int64_t k = 0; k < n; ++k) entries[k] = model[k] == m ? kNone : entries[k];
        }
    }

    const ZipArgs& a;
    const int64_t n;
    const int64_t ld;
    const int parts;     // of a merge: its columns are cut into so many
    int64_t events = 0;  // merges recorded
    bool stopped = false;
    T* w = nullptr;     // [n, ld] the working similarity; its diagonal is never looked at
    Buffer<T> copy;     // of it, unless the caller gives up his
    Buffer<T> gone;     // [n] added to a row's entries: -inf for units that take part in no further pair, else 0
    Buffer<T> best;     // [n] the row's largest entry to the right of the diagonal
    Buffer<T> highest;  // [groups] the largest of best in each group of rows
    Buffer<Place> partner;
    Buffer<uint8_t> stale;
    Buffer<int32_t> model;
    Buffer<int32_t> seen;             // [n] the merges whose columns a row has taken over
    Buffer<int32_t> survivor, loser;  // [merges] by event
    Buffer<T> none;                   // [n] zeros
};

}  // namespace

Status zip(const ZipArgs& args);
Status zip(const ZipArgs& args) {
    switch (args.dtype) {
        case Dtype::f64: return Zipper<double>(args).run();
        case Dtype::f32: return Zipper<float>(args).run();
        default: return Status::unsupported;
    }
}

}  // namespace MUDSC_ISA
}  // namespace mudsc
