// Greedy zip in O(n^2): every row keeps its best partner to the right, so a merge costs one row, one column and a scan of
// the rows' maxima. Rows whose best partner went away are only marked: their old maximum stays as an upper bound, and
// they are searched again when that bound comes out on top.
#include <math.h>

#include "cpu/common.h"
#include "cpu/kernels.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kTile = 64;
constexpr int64_t kChunk = 256;                // positions searched again for the place of a maximum
constexpr double kSymmetryTolerance = 1e-4;    // of the largest magnitude: more is not rounding

// The largest of row[k] + bar[k] over k in [from, n) and its first place; -inf and -1 when nothing is allowed.
template <typename T>
T first_max(const T* row, const T* bar, int64_t from, int64_t n, int64_t* place) {
    T best = -static_cast<T>(INFINITY);
    int64_t chunk = -1;
    for (int64_t k = from; k < n; k += kChunk) {
        const int64_t end = min64(k + kChunk, n);
        T lane[kLanes];
        for (int64_t l = 0; l < kLanes; ++l) lane[l] = -static_cast<T>(INFINITY);
        int64_t c = k;
        for (; c + kLanes <= end; c += kLanes) {
            for (int64_t l = 0; l < kLanes; ++l) {
                const T x = row[c + l] + bar[c + l];
                lane[l] = x > lane[l] ? x : lane[l];
            }
        }
        for (; c < end; ++c) {
            const T x = row[c] + bar[c];
            lane[0] = x > lane[0] ? x : lane[0];
        }
        T top = lane[0];
        for (int64_t l = 1; l < kLanes; ++l) top = lane[l] > top ? lane[l] : top;
        if (top > best) {
            best = top;
            chunk = k;
        }
    }
    *place = -1;
    for (int64_t k = chunk; chunk >= 0 && k < n; ++k) {
        if (row[k] + bar[k] == best) {
            *place = k;
            break;
        }
    }
    return best;
}

template <typename T>
class Zipper {
  public:
    explicit Zipper(const ZipArgs& args) : a(args), n(args.n), ld(ceil_div(args.n, kLanes) * kLanes) {}

    Status run() {
        if (!(w.allocate(n * ld) && gone.allocate(n) && best.allocate(n) && partner.allocate(n) &&
              stale.allocate(n) && model.allocate(n) && alive.allocate(n) && none.allocate(n))) {
            return Status::no_memory;
        }
        const Status loaded = load();
        if (loaded != Status::ok) return loaded;
        start();
        *a.total = 0;
        *a.made = 0;
        for (int64_t step = 0; step < a.merges; ++step) {
            if (step % 16 == 0 && a.poll()) return Status::interrupted;
            const int64_t i = top_row();
            if (i < 0) return Status::infeasible;
            const int64_t j = partner[i];
            *a.total += static_cast<double>(best[i]);
            ++*a.made;
            merge(i, j);
        }
        return Status::ok;
    }

  private:
    T* row(int64_t i) const { return w.get() + i * ld; }
    static constexpr T kNone = -static_cast<T>(INFINITY);

    // Copies the chosen rows and columns, checks them, and makes the copy exactly symmetric.
    Status load() {
        const T* s = static_cast<const T*>(a.similarity);
        bool consecutive = a.col_stride == 1;
        for (int64_t k = 1; consecutive && k < n; ++k) consecutive = a.units[k] == a.units[0] + k;
        const int64_t bands = ceil_div(n, kTile);
        Buffer<T> magnitude(bands), difference(bands);
        Buffer<uint8_t> bad(bands);
        if (!magnitude || !difference || !bad) return Status::no_memory;
        parallel_each(a.threads, bands, [&](int64_t band, int) {
            T most = 0;
            bool broken = false;
            for (int64_t i = band * kTile; i < min64((band + 1) * kTile, n); ++i) {
                const T* from = s + a.units[i] * a.row_stride;
                T* to = row(i);
                if (consecutive) {
                    memcpy(to, from + a.units[0], static_cast<size_t>(n) * sizeof(T));
                } else {
                    for (int64_t k = 0; k < n; ++k) to[k] = from[a.units[k] * a.col_stride];
                }
                to[i] = 0;
                T lane[kLanes] = {};
                int64_t k = 0;
                for (; k + kLanes <= n; k += kLanes) {
                    // Written so that NaN stays: it compares false with everything.
                    for (int64_t l = 0; l < kLanes; ++l) {
                        const T x = to[k + l] < 0 ? -to[k + l] : to[k + l];
                        lane[l] = x <= lane[l] ? lane[l] : x;
                    }
                    for (int64_t l = 0; l < kLanes; ++l) broken |= !(lane[l] < static_cast<T>(INFINITY));
                }
                for (; k < n; ++k) {
                    const T x = to[k] < 0 ? -to[k] : to[k];
                    broken |= !(x < static_cast<T>(INFINITY));
                    lane[0] = x <= lane[0] ? lane[0] : x;
                }
                for (int64_t l = 0; l < kLanes; ++l) most = lane[l] > most ? lane[l] : most;
            }
            bad[band] = broken;
            magnitude[band] = most;
        });
        T most = 0;
        for (int64_t b = 0; b < bands; ++b) {
            if (bad[b]) return Status::not_finite;
            most = magnitude[b] > most ? magnitude[b] : most;
        }
        parallel_each(a.threads, bands, [&](int64_t band, int) { difference[band] = mirror(band); });
        for (int64_t b = 0; b < bands; ++b) {
            if (static_cast<double>(difference[b]) > kSymmetryTolerance * static_cast<double>(most)) return Status::not_symmetric;
        }
        return Status::ok;
    }

    // Copies the upper triangle's tiles of one band of columns onto the lower triangle; returns the largest difference.
    T mirror(int64_t band) {
        T largest = 0;
        const int64_t k0 = band * kTile, k1 = min64(k0 + kTile, n);
        for (int64_t i0 = 0; i0 <= k0; i0 += kTile) {
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
            alive[i] = static_cast<int32_t>(i);
            none[i] = gone[i] = 0;
            stale[i] = 0;
        }
        n_alive = n;
        for (int m = 0; m < a.models; ++m) {
            if (spent(m)) bar_pairs_inside(m);
        }
        parallel_each(a.threads, ceil_div(n, kTile), [&](int64_t band, int) {
            for (int64_t i = band * kTile; i < min64((band + 1) * kTile, n); ++i) search(i);
        });
    }

    bool spent(int m) const { return a.budget[m] <= 0 || a.block_budget[m] <= 0; }

    void search(int64_t i) {
        best[i] = first_max(row(i), gone.get(), i + 1, n, &partner[i]);
        stale[i] = 0;
    }

    // The first row with the largest entry, or -1.
    int64_t top_row() {
        for (;;) {
            int64_t i;
            const T top = first_max(best.get(), none.get(), 0, n, &i);
            if (i < 0 || top == kNone) return -1;
            if (!stale[i]) return i;
            search(i);
        }
    }

    void merge(int64_t i, int64_t j) {
        a.owner[j] = i;
        remove(j);
        if (model[i] == model[j]) spend(model[i]);
        if (a.attenuation <= 0) {
            remove(i);
            for (int64_t k = 0; k < j; ++k) stale[k] |= partner[k] == i || partner[k] == j;
            return;
        }
        T* to = row(i);
        const T* other = row(j);
        const T by = static_cast<T>(a.attenuation);
        for (int64_t k = 0; k < n; ++k) to[k] = (other[k] < to[k] ? other[k] : to[k]) * by;
        int64_t at = 0;
        for (; at < n_alive && alive[at] < i; ++at) {
            const int64_t k = alive[at];
            row(k)[i] = to[k];
            changed(k, i, j, to[k]);
        }
        for (; at < n_alive; ++at) {
            const int64_t k = alive[at];
            row(k)[i] = to[k];
            stale[k] |= partner[k] == j;
        }
        search(i);
    }

    // Row k < i after its entry at i became x and j went away. Its recorded maximum is exact, or a bound if stale.
    void changed(int64_t k, int64_t i, int64_t j, T x) {
        const bool lost = partner[k] == i || partner[k] == j;
        if (x > best[k] || (!stale[k] && x == best[k] && (lost || i < partner[k]))) {
            best[k] = x;
            partner[k] = i;
            stale[k] = 0;
        } else if (lost) {
            stale[k] = 1;
        }
    }

    // The unit takes part in no further pair.
    void remove(int64_t unit) {
        gone[unit] = kNone;
        best[unit] = kNone;
        stale[unit] = 0;
        for (int64_t at = 0; at < n_alive; ++at) {
            if (alive[at] != unit) continue;
            memmove(&alive[at], &alive[at + 1], static_cast<size_t>(n_alive - at - 1) * sizeof(int32_t));
            --n_alive;
            break;
        }
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

    // Written into the matrix, because a barred entry also bars what it is merged with (rule 5's minimum).
    void bar_pairs_inside(int m) {
        for (int64_t i = 0; i < n; ++i) {
            if (model[i] != m) continue;
            T* entries = row(i);
            for (int64_t k = 0; k < n; ++k) entries[k] = model[k] == m ? kNone : entries[k];
        }
    }

    const ZipArgs& a;
    const int64_t n, ld;
    int64_t n_alive = 0;
    Buffer<T> w;         // [n, ld] the working similarity; its diagonal is never looked at
    Buffer<T> gone;      // [n] added to a row's entries: -inf for units that take part in no further pair, else 0
    Buffer<T> best;      // [n] the row's largest entry to the right of the diagonal
    Buffer<int64_t> partner;
    Buffer<uint8_t> stale;
    Buffer<int32_t> model, alive;
    Buffer<T> none;      // [n] zeros
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
