// Streaming covariance: batches are packed, shifted by each unit's first mean, into panels; full panels are multiplied
// into the accumulated products. Sums and sums of squares are float64.
#include "cpu/kernels/covariance.h"

#include "cpu/kernels/fill.h"
#include "cpu/kernels/pack.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

// Largest |mean - shift| / deviation that accumulators keep: rounding errors of the products grow with 1 + its square.
constexpr double kDrift = 0.5;
// The same for bf16 samples multiplied as they are (shift 0). Errors of random samples stay near 1e-7; the worst case
// is a value that most samples share, whose products are all rounded the same way: 1e-5 is reached at a ratio of 2.
constexpr double kRawDrift = 1.5;
// Largest exponent of a spread that float32 products take without scaling: squares of sums stay far from its limits.
constexpr int kPlainExponent = 30;

// Panels that are packed together.
constexpr int64_t kStrip = 8;

template <typename T>
class Accumulator {
  public:
    Accumulator(CovarianceState& state, int threads) : s_(state), layout_(state), threads_(threads) {}

    Status update(const CovarianceSource* sources, int64_t samples) {
        if (!offsets_.allocate(layout_.models * kGramDepth)) return Status::no_memory;
        sources_ = sources;
        bool all_bf16 = true;
        for (int64_t m = 0; m < layout_.models; ++m) {
            if (!is_floating(sources[m].dtype)) return Status::unsupported;
            all_bf16 &= sources[m].dtype == Dtype::bf16;
        }
        may_be_raw_ = all_bf16 && kHasBf16 && sizeof(T) == sizeof(float);
        for (int64_t done = 0; done < samples;) {
            const int64_t take = min64(kGramDepth - s_.counts[1], samples - done);
            for (int64_t m = 0; m < layout_.models; ++m) {
                sample_offsets(sources[m], done, take, offsets_.get() + m * kGramDepth);
            }
            const int threads = layout_.panels * take < 256 ? 1 : threads_;  // too little to share
            const int64_t strip = threads == 1 ? kStrip : max64(1, min64(kStrip, layout_.panels / (4 * threads)));
            parallel_each(threads, ceil_div(layout_.panels, strip),
                          [&](int64_t at, int) { pack(at * strip, min64((at + 1) * strip, layout_.panels), take); });
            s_.counts[0] += take;
            s_.counts[1] += take;
            done += take;
            if (s_.counts[1] == kGramDepth) {
                const Status status = flush();
                if (status != Status::ok) return status;
            }
        }
        return Status::ok;
    }

    // Multiplies the pending samples into the accumulators.
    Status flush() {
        const int64_t depth = s_.counts[1];
        if (depth == 0) return Status::ok;
        Buffer<const T*> values(layout_.panels);
        Buffer<const uint32_t*> raw(layout_.panels);
        Buffer<uint8_t> was_raw(layout_.panels);
        if (!values || !raw || !was_raw) return Status::no_memory;
        if (s_.counts[0] == depth) {  // nothing accumulated yet: the best shift is still free to choose
            parallel_each(threads_, layout_.panels, [&](int64_t panel, int) { settle(panel, depth); });
        }
        int64_t raws = 0;
        for (int64_t p = 0; p < layout_.panels; ++p) raws += s_.raw[p] != 0;
        Buffer<T> expanded;
        const bool mixed = raws > 0 && (raws < layout_.panels || !kHasBf16);
        if (mixed && !expanded.allocate(raws * depth * kPanel)) return Status::no_memory;
        int64_t next = 0;
        for (int64_t p = 0; p < layout_.panels; ++p) {
            was_raw[p] = s_.raw[p];
            raw[p] = s_.raw[p] != 0 ? raw_panel(p) : nullptr;
            values[p] = panel(p);
            if (s_.raw[p] != 0 && mixed) {
                T* to = expanded.get() + next++ * depth * kPanel;
                expand(raw_panel(p), depth, to);
                values[p] = to;
            }
        }
        const int64_t from = layout_.column_panel;
        const GramOperand<T> rows{values.get(), raw.get()}, columns{values.get() + from, raw.get() + from};
        const GramTarget<double> target{s_.gram, 0, layout_.row_units, layout_.column_units, !layout_.cross};
        gram_product(threads_, depth, rows, columns, target);
        s_.counts[1] = 0;
        memset(s_.raw, 0, static_cast<size_t>(layout_.panels));
        return recentre(was_raw.get());
    }

    // Moves the accumulators to other shifts and scales: gram_ij becomes (gram_ij - s_i d_j - d_i s_j + n d_i d_j) r_i
    // r_j.
    Status rebase(const double* shift, const double* scale) {
        const int64_t units = layout_.panels * kPanel;
        Buffer<double> step(units), ratio(units);
        if (!step || !ratio) return Status::no_memory;
        for (int64_t u = 0; u < units; ++u) {
            step[u] = (shift[u] - s_.shift[u]) * s_.scale[u];
            ratio[u] = scale[u] / s_.scale[u];
        }
        move(s_, step.get(), ratio.get(), false, s_.gram);
        const double n = static_cast<double>(s_.counts[0]);
        for (int64_t u = 0; u < units; ++u) {
            s_.squares[u] = (s_.squares[u] + step[u] * (n * step[u] - 2 * s_.sums[u])) * ratio[u] * ratio[u];
            s_.sums[u] = (s_.sums[u] - n * step[u]) * ratio[u];
            s_.shift[u] = shift[u];
            s_.scale[u] = scale[u];
        }
        return Status::ok;
    }

    Status merge(const CovarianceState& other) {
        const int64_t units = layout_.panels * kPanel;
        Buffer<double> step(units), ratio(units);
        if (!step || !ratio) return Status::no_memory;
        const double n = static_cast<double>(other.counts[0]);
        for (int64_t u = 0; u < units; ++u) {
            step[u] = (s_.shift[u] - other.shift[u]) * other.scale[u];
            ratio[u] = s_.scale[u] / other.scale[u];
        }
        move(other, step.get(), ratio.get(), true, s_.gram);
        for (int64_t u = 0; u < units; ++u) {
            s_.squares[u] += (other.squares[u] + step[u] * (n * step[u] - 2 * other.sums[u])) * ratio[u] * ratio[u];
            s_.sums[u] += (other.sums[u] - n * step[u]) * ratio[u];
        }
        s_.counts[0] += other.counts[0];
        return recentre(nullptr);
    }

  private:
    static bool is_floating(Dtype d) {
        return d == Dtype::f64 || d == Dtype::f32 || d == Dtype::f16 || d == Dtype::bf16;
    }
    T* panel(int64_t p) const { return static_cast<T*>(s_.panels) + p * kGramDepth * kPanel; }
    uint32_t* raw_panel(int64_t p) const { return reinterpret_cast<uint32_t*>(panel(p)); }

    // One panel's units for samples [k0, k0 + n) of this batch, as they are.
    void fill_panel(int64_t p, int64_t k0, int64_t n, T* to) const {
        layout_.segments(p, [&](int64_t model, int64_t unit, int lane, int units) {
            const CovarianceSource& source = sources_[model];
            int64_t off[kPanel];
            for (int u = 0; u < units; ++u) off[u] = (unit + u) * source.unit_stride;
            const Columns columns{k0 + n, offsets_.get() + model * kGramDepth, nullptr, nullptr};
            fill<T>(source.dtype, source.data, off, columns, units, k0, n, to + lane);
        });
    }

    // First samples of all: the shift is their mean, the scale brings their spread into float32's range.
    void begin(int64_t p, int64_t take) const {
        T block[kPackRows * kPanel] = {};
        T none[kPanel] = {}, one[kPanel];
        double sums[kPanel] = {}, squares[kPanel] = {}, low[kPanel], high[kPanel];
        for (int u = 0; u < kPanel; ++u) {
            low[u] = high[u] = 0;
            one[u] = 1;
        }
        for (int64_t k = 0; k < take; k += kPackRows) {
            const int64_t n = min64(kPackRows, take - k);
            fill_panel(p, k, n, block);
            double ignored[kPanel] = {};
            settle_samples(block, n, none, one, ignored, ignored);  // non-finite entries to 0
            measure(block, n, sums, squares);
            for (int64_t i = 0; i < n; ++i) {
                for (int u = 0; u < kPanel; ++u) {
                    const double x = static_cast<double>(block[i * kPanel + u]);
                    low[u] = (k == 0 && i == 0) || x < low[u] ? x : low[u];
                    high[u] = (k == 0 && i == 0) || x > high[u] ? x : high[u];
                }
            }
        }
        bool raw = may_be_raw_;
        double *shift = s_.shift + p * kPanel, *scale = s_.scale + p * kPanel;
        for (int u = 0; u < kPanel; ++u) {
            const double mean = sums[u] / static_cast<double>(take);
            shift[u] = static_cast<double>(static_cast<T>(mean < low[u] ? low[u] : mean > high[u] ? high[u] : mean));
            scale[u] = 1;
            const double size = fmax(high[u], -low[u]);
            double spread = fmax(high[u] - shift[u], shift[u] - low[u]);
            if (spread == 0) spread = size;  // one sample, or equal ones: the best guess that there is
            if (sizeof(T) == sizeof(float) && spread > 0 && !plain(spread)) scale[u] = ldexp(1.0, -ilogb(spread));
            raw &= size == 0 || plain(size);
        }
        if (!raw) return;
        for (int u = 0; u < kPanel; ++u) {
            shift[u] = 0;
            scale[u] = 1;
        }
    }
    static bool plain(double x) { return x < ldexp(1.0, kPlainExponent) && x > ldexp(1.0, -kPlainExponent); }

    // May this panel's next samples be multiplied as bf16? Only while its units have no shift and small means.
    bool raw_allowed(int64_t p) const {
        if (!may_be_raw_) return false;
        const double count = static_cast<double>(s_.counts[0]);
        for (int64_t u = p * kPanel; u < (p + 1) * kPanel; ++u) {
            if (s_.shift[u] != 0 || s_.scale[u] != 1) return false;
            if (count > 0 && drifted(u, count, kRawDrift)) return false;
        }
        return true;
    }

    bool drifted(int64_t u, double count, double bound) const {
        const double mean = s_.sums[u] / count, variance = s_.squares[u] / count - mean * mean;
        return mean != 0 && mean * mean > bound * bound * fmax(variance, 0.0);
    }

    // What packing needs to know of a panel.
    struct Packing {
        T shift[kPanel], scale[kPanel];
        int64_t done = 0;                      // samples
        int64_t run_model = -1, run_unit = 0;  // set when the panel is 48 units of one model, side by side in memory
        bool full = true;                      // every lane has a unit
    };

    Packing begin_packing(int64_t p, int64_t take) const {
        const int64_t pending = s_.counts[1];
        if (s_.counts[0] == 0) begin(p, take);
        if (pending == 0) {
            s_.raw[p] = raw_allowed(p) ? 1 : 0;
        } else if (s_.raw[p] != 0 && !may_be_raw_) {
            lower(p, pending);
        }
        Packing it;
        for (int u = 0; u < kPanel; ++u) {
            it.shift[u] = static_cast<T>(s_.shift[p * kPanel + u]);
            it.scale[u] = static_cast<T>(s_.scale[p * kPanel + u]);
        }
        int filled = 0;
        layout_.segments(p, [&](int64_t model, int64_t unit, int, int units) {
            filled += units;
            if (units == kPanel && sources_[model].unit_stride == 1) it.run_model = model, it.run_unit = unit;
        });
        it.full = filled == kPanel;
        return it;
    }

    // Panels [first, last), a few samples of each in turn: side by side in memory, they are read in longer pieces.
    void pack(int64_t first, int64_t last, int64_t take) const {
        Packing panels[kStrip];
        for (int64_t p = first; p < last; ++p) panels[p - first] = begin_packing(p, take);
        for (int64_t k = 0; k < take; k += kFastRows) {
            for (int64_t p = first; p < last; ++p) {
                while (panels[p - first].done < min64(k + kFastRows, take)) pack_some(p, take, panels[p - first]);
            }
        }
    }

    void pack_some(int64_t p, int64_t take, Packing& it) const {
        const int64_t k = it.done, at = s_.counts[1] + k;
        const int64_t fast =
            it.run_model < 0 ? 0 : pack_run(p, it.run_model, it.run_unit, k, take, at, it.shift, it.scale);
        if (fast > 0) {
            it.done += fast;
            return;
        }
        const int64_t n = min64(it.run_model < 0 ? kPackRows : kFastRows, take - k);
        T block[kPackRows * kPanel];
        if (s_.raw[p] != 0 && !it.full) memset(block, 0, sizeof block);
        T* to = s_.raw[p] != 0 ? block : panel(p) + at * kPanel;
        fill_panel(p, k, n, to);
        settle_samples(to, n, it.shift, it.scale, s_.sums + p * kPanel, s_.squares + p * kPanel);
        if (s_.raw[p] != 0) store_pairs(to, n, at, raw_panel(p));
        it.done += n;
    }

    // The fast way for up to kFastRows samples; returns how many it took, 0 if it cannot take any.
    int64_t pack_run(int64_t p, int64_t model, int64_t unit, int64_t k, int64_t take, int64_t at, const T* shift,
                     const T* scale) const {
        const CovarianceSource& source = sources_[model];
        switch (sizeof(T) == sizeof(float) ? source.dtype : Dtype::f64) {
            case Dtype::f32: return pack_typed<float>(source, unit, p, model, k, take, at, shift, scale);
            case Dtype::f16: return pack_typed<f16>(source, unit, p, model, k, take, at, shift, scale);
            case Dtype::bf16: return pack_typed<bf16>(source, unit, p, model, k, take, at, shift, scale);
            default: return 0;
        }
    }

    template <typename S>
    int64_t pack_typed(const CovarianceSource& source, int64_t unit, int64_t p, int64_t model, int64_t k, int64_t take,
                       int64_t at, const T* shift, const T* scale) const {
        const S* data = static_cast<const S*>(source.data) + unit;
        const int64_t* off = offsets_.get() + model * kGramDepth + k;
        int64_t n = min64(kFastRows, take - k);
        const bool later = k + 2 * kFastRows <= take;
        double *sums = s_.sums + p * kPanel, *squares = s_.squares + p * kPanel;
        if (s_.raw[p] == 0) {
            float* to = reinterpret_cast<float*>(panel(p) + at * kPanel);
            const float *from = reinterpret_cast<const float*>(shift), *by = reinterpret_cast<const float*>(scale);
            return pack_values(data, off, n, from, by, to, sums, squares, later) ? n : 0;
        }
#if defined(__AVX512BF16__)
        n -= n % 2;
        if constexpr (sizeof(S) == sizeof(bf16)) {
            const bf16* pairs = reinterpret_cast<const bf16*>(data);
            if (n > 0 && at % 2 == 0 && pack_pairs(pairs, off, n, raw_panel(p) + at / 2 * kPanel, sums, squares, later))
                return n;
        }
#endif
        return 0;
    }

    // Pairs of bf16 to single values. Runs backwards, so that `to` may be the panel itself.
    static void expand(const uint32_t* pairs, int64_t depth, T* to) {
        for (int64_t k = depth - 1; k >= 0; --k) {
            const uint32_t* from = pairs + k / 2 * kPanel;
            uint32_t words[kPanel];
            memcpy(words, from, sizeof words);
            for (int u = 0; u < kPanel; ++u) {
                to[k * kPanel + u] =
                    static_cast<T>(bits_to_float(k % 2 == 0 ? words[u] << 16 : words[u] & 0xffff0000u));
            }
        }
    }

    // Pending bf16 pairs become plain values.
    void lower(int64_t p, int64_t depth) const {
        expand(raw_panel(p), depth, panel(p));
        s_.raw[p] = 0;
    }

    // Before the first product: pending samples are moved to their own mean where that is not where they are.
    void settle(int64_t p, int64_t depth) const {
        const double n = static_cast<double>(depth);
        T step[kPanel], one[kPanel];
        bool moves = false, too_far = false;
        for (int u = 0; u < kPanel; ++u) too_far |= drifted(p * kPanel + u, n, kRawDrift);
        if (s_.raw[p] != 0 && !too_far) return;
        if (s_.raw[p] != 0) lower(p, depth);
        for (int u = 0; u < kPanel; ++u) {
            const int64_t at = p * kPanel + u;
            one[u] = 1;
            step[u] = 0;
            if (!drifted(at, n, 0.25)) continue;
            const double target = shift_to_mean(at, n);
            step[u] = static_cast<T>((target - s_.shift[at]) * s_.scale[at]);
            s_.shift[at] = target;
            moves = true;
        }
        if (!moves) return;
        shift_and_scale(panel(p), depth, step, one);
        double sums[kPanel] = {}, squares[kPanel] = {};
        measure(panel(p), depth, sums, squares);
        for (int u = 0; u < kPanel; ++u) {
            s_.sums[p * kPanel + u] = sums[u];
            s_.squares[p * kPanel + u] = squares[u];
        }
    }

    // The unit's mean, as a shift: rounded to T.
    double shift_to_mean(int64_t u, double n) const {
        return static_cast<double>(static_cast<T>(s_.shift[u] + s_.sums[u] / n / s_.scale[u]));
    }

    // Moves shifts to the means where these have drifted away. was_raw: panels just multiplied as bf16 keep shift 0
    // longer.
    Status recentre(const uint8_t* was_raw) {
        const int64_t units = layout_.panels * kPanel;
        const double n = static_cast<double>(s_.counts[0]);
        Buffer<double> shift;
        for (int64_t u = 0; u < units; ++u) {
            const bool raw = was_raw != nullptr && was_raw[u / kPanel] != 0;
            if (!drifted(u, n, raw ? kRawDrift : kDrift) || shift_to_mean(u, n) == s_.shift[u]) continue;
            if (!shift) {
                if (!shift.allocate(units)) return Status::no_memory;
                memcpy(shift.get(), s_.shift, static_cast<size_t>(units) * sizeof(double));
            }
            shift[u] = shift_to_mean(u, n);
        }
        if (!shift) return Status::ok;
        return rebase(shift.get(), s_.scale);
    }

    // to (+)= (gram of `from`) moved by step and ratio; blocks that do not move are left alone unless they are added.
    void move(const CovarianceState& from, const double* step, const double* ratio, bool add, double* to) const {
        const int64_t units = layout_.panels * kPanel, columns_from = layout_.column_panel * kPanel;
        const double n = static_cast<double>(from.counts[0]);
        Buffer<uint8_t> moved(layout_.panels);
        for (int64_t u = 0; moved && u < units; ++u) {
            if (u % kPanel == 0) moved[u / kPanel] = 0;
            if (step[u] != 0 || ratio[u] != 1) moved[u / kPanel] = 1;
        }
        const double* source = from.gram;
        parallel_each(threads_, layout_.row_panels, [&](int64_t i, int) {
            for (int64_t j = layout_.cross ? 0 : i; j < layout_.column_panels; ++j) {
                if (!add && moved && moved[i] == 0 && moved[layout_.column_panel + j] == 0) continue;
                const int64_t block = block_index(i, j, layout_.column_panels, !layout_.cross) * kPanel * kPanel;
                const int64_t row = i * kPanel, column = columns_from + j * kPanel;
                for (int a = 0; a < kPanel; ++a) {
                    const double s = from.sums[row + a], d = step[row + a], r = ratio[row + a];
                    const double* g = source + block + a * kPanel;
                    double* t = to + block + a * kPanel;
                    for (int b = 0; b < kPanel; ++b) {
                        const double sb = from.sums[column + b], db = step[column + b];
                        const double value = (g[b] + (n * d - s) * db - d * sb) * r * ratio[column + b];
                        t[b] = add ? t[b] + value : value;
                    }
                }
            }
        });
    }

    CovarianceState& s_;
    const Layout layout_;
    const int threads_;
    const CovarianceSource* sources_ = nullptr;
    Buffer<int64_t> offsets_;
    bool may_be_raw_ = false;
};

}  // namespace

Status covariance_update(const CovarianceUpdateArgs& args);
Status covariance_update(const CovarianceUpdateArgs& args) {
    if (args.state->dtype == Dtype::f64)
        return Accumulator<double>(*args.state, args.threads).update(args.sources, args.samples);
    return Accumulator<float>(*args.state, args.threads).update(args.sources, args.samples);
}

Status covariance_flush(CovarianceState& state, int threads);
Status covariance_flush(CovarianceState& state, int threads) {
    if (state.dtype == Dtype::f64) return Accumulator<double>(state, threads).flush();
    return Accumulator<float>(state, threads).flush();
}

Status covariance_merge(const CovarianceMergeArgs& args);
Status covariance_merge(const CovarianceMergeArgs& args) {
    if (args.self->dtype == Dtype::f64) return Accumulator<double>(*args.self, args.threads).merge(*args.other);
    return Accumulator<float>(*args.self, args.threads).merge(*args.other);
}

Status covariance_rebase(CovarianceState& state, const double* shift, const double* scale, int threads);
Status covariance_rebase(CovarianceState& state, const double* shift, const double* scale, int threads) {
    if (state.dtype == Dtype::f64) return Accumulator<double>(state, threads).rebase(shift, scale);
    return Accumulator<float>(state, threads).rebase(shift, scale);
}

}  // namespace MUDSC_ISA
}  // namespace mudsc
