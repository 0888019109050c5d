// Similarity of units: correlation of their weights, accumulated term after term straight into the result, and its
// blend with the correlation of their activations, read from a covariance's accumulators.
#include "cpu/kernels/covariance.h"
#include "cpu/kernels/pack.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

template <typename W>
class Similarity {
  public:
    explicit Similarity(const SimilarityArgs& args)
        : a_(args), layout_(args.n, args.models, false), out_(static_cast<W*>(args.out)) {
        // Every model has panels of its own in a cross product, so that each pair of models is one product.
        panels_each_ = ceil_div(a_.n, kPanel);
        panels_ = a_.cross ? panels_each_ * a_.models : layout_.panels;
    }

    Status run() {
        const bool weights = a_.term_count > 0 && (a_.balance > 0 || a_.activation == nullptr);
        if (weights) {
            Status status = measure_rows();
            if (status == Status::ok) status = correlate_rows();
            if (status != Status::ok) return status;
        }
        return blend(weights);
    }

  private:
    template <typename Fn>
    void segments(int64_t panel, const Fn& fn) const {
        if (!a_.cross) {
            layout_.segments(panel, fn);
            return;
        }
        const int64_t unit = panel % panels_each_ * kPanel;
        fn(panel / panels_each_, unit, 0, static_cast<int>(min64(kPanel, a_.n - unit)));
    }

    void fill_panel(int64_t p, int64_t term, int64_t c0, int64_t n, W* to) const {
        segments(p, [&](int64_t model, int64_t unit, int lane, int units) {
            const SimilarityTerm& t = a_.terms[term * a_.models + model];
            const Columns columns{t.off, t.ptr, t.scale};
            fill<W>(t.dtype, t.data, t.unit_off + unit, columns, units, c0, n, to + lane);
        });
    }

    // Mean and centred norm of every row, over all terms. Sums are taken about the row's first element, which keeps
    // them exact for constant rows and accurate for rows far from zero.
    Status measure_rows() {
        const int64_t units = panels_ * kPanel;
        if (!mean_.allocate(units) || !inverse_.allocate(units)) return Status::no_memory;
        int64_t bad = a_.term_count;
        parallel_each(a_.threads, panels_, [&](int64_t p, int) {
            const int64_t found = measure_panel(p);
            int64_t seen = __atomic_load_n(&bad, __ATOMIC_RELAXED);
            while (found < seen &&
                   !__atomic_compare_exchange_n(&bad, &seen, found, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
            }
        });
        *a_.bad_term = bad;
        return bad < a_.term_count ? Status::not_finite : Status::ok;
    }

    // Returns the first term with a NaN or an infinity, or the number of terms.
    int64_t measure_panel(int64_t p) {
        W block[kPackRows * kPanel] = {}, first[kPanel], one[kPanel];
        double sums[kPanel] = {}, squares[kPanel] = {};
        int64_t count = 0;
        for (int64_t t = 0; t < a_.term_count; ++t) {
            const int64_t columns = a_.terms[t * a_.models].columns;
            for (int64_t c = 0; c < columns; c += kPackRows) {
                const int64_t n = min64(kPackRows, columns - c);
                fill_panel(p, t, c, n, block);
                for (int u = 0; count == 0 && u < kPanel; ++u) {
                    first[u] = block[u];
                    one[u] = 1;
                }
                shift_and_scale(block, n, first, one);
                measure(block, n, sums, squares);
                count += n;
            }
            bool finite = true;
            for (int u = 0; u < kPanel; ++u) finite &= sums[u] - sums[u] == 0;
            if (!finite) return t;
        }
        for (int u = 0; u < kPanel && count > 0; ++u) {
            const double n = static_cast<double>(count), offset = sums[u] / n;
            const double variance = squares[u] / n - offset * offset, mean = static_cast<double>(first[u]) + offset;
            const bool dead = is_dead(variance, fmax(variance + mean * mean, offset * offset));
            mean_[p * kPanel + u] = static_cast<W>(mean);
            inverse_[p * kPanel + u] = dead ? W(0) : static_cast<W>(1 / sqrt(variance * n));
        }
        for (int u = 0; u < kPanel && count == 0; ++u) mean_[p * kPanel + u] = inverse_[p * kPanel + u] = 0;
        return a_.term_count;
    }

    // Accumulates products of the centred, normalised rows in the result, kGramDepth columns at a time.
    Status correlate_rows() {
        int64_t total = 0;
        for (int64_t t = 0; t < a_.term_count; ++t) total += a_.terms[t * a_.models].columns;
        const int64_t depth = max64(1, min64(kGramDepth, total)), size = depth * kPanel;
        Buffer<W> packed(panels_ * size);
        Buffer<const W*> values(panels_);
        if (!packed || !values) return Status::no_memory;
        memset(packed.get(), 0, static_cast<size_t>(panels_ * size) * sizeof(W));
        for (int64_t p = 0; p < panels_; ++p) values[p] = packed.get() + p * size;
        const int64_t rows = a_.cross ? a_.n * (a_.models - 1) : a_.n * a_.models, columns = a_.cross ? a_.n : rows;
        parallel_each(a_.threads, rows,
                      [&](int64_t i, int) { memset(out_ + i * columns, 0, static_cast<size_t>(columns) * sizeof(W)); });
        int64_t term = 0, column = 0;
        for (int64_t done = 0; done < total; done += depth) {
            const int64_t n = min64(depth, total - done);
            parallel_each(a_.threads, panels_,
                          [&](int64_t p, int) { pack(p, term, column, n, packed.get() + p * size); });
            for (int64_t left = n; left > 0;) {
                const int64_t step = min64(left, a_.terms[term * a_.models].columns - column);
                left -= step;
                column += step;
                if (column == a_.terms[term * a_.models].columns) {
                    ++term;
                    column = 0;
                }
            }
            if (!multiply(n, values.get())) return Status::interrupted;
        }
        return Status::ok;
    }

    void pack(int64_t p, int64_t term, int64_t column, int64_t n, W* to) const {
        for (int64_t left = n; left > 0;) {
            const int64_t step = min64(min64(left, kPackRows), a_.terms[term * a_.models].columns - column);
            if (step > 0) {
                fill_panel(p, term, column, step, to);
                shift_and_scale(to, step, mean_.get() + p * kPanel, inverse_.get() + p * kPanel);
            }
            left -= step;
            column += step;
            to += step * kPanel;
            if (column == a_.terms[term * a_.models].columns) {
                ++term;
                column = 0;
            }
        }
    }

    bool multiply(int64_t depth, const W* const* values) const {
        const GramOperand<W> rows{values, nullptr};
        if (!a_.cross) {
            const int64_t units = a_.n * a_.models;
            return gram_product(a_.threads, depth, rows, rows, GramTarget<W>{out_, units, units, units, true},
                                &a_.poll);
        }
        for (int64_t m = 1; m < a_.models; ++m) {
            const GramOperand<W> columns{values + m * panels_each_, nullptr};
            const GramTarget<W> target{out_ + (m - 1) * a_.n * a_.n, a_.n, a_.n, a_.n, false};
            if (!gram_product(a_.threads, depth, rows, columns, target, &a_.poll)) return false;
        }
        return true;
    }

    // The epilogue: one pass over the result, mirrored below the diagonal where it is symmetric.
    Status blend(bool weights) {
        source_ = a_.balance < 1 || !weights ? a_.activation : nullptr;
        if (source_ != nullptr) {
            bool finite = true;
            if (!moments_.compute(*source_, Layout(*source_).panels * kPanel, &finite)) return Status::no_memory;
            if (!finite) {
                *a_.bad_term = -1;
                return Status::not_finite;
            }
        }
        share_ = weights ? (source_ != nullptr ? a_.balance : 1.0) : 0.0;
        const int64_t rows = a_.cross ? a_.n : a_.n * a_.models;
        parallel_each(a_.threads, ceil_div(rows, kPanel), [&](int64_t i, int) {
            const int64_t i0 = i * kPanel, i1 = min64(i0 + kPanel, rows);
            if (a_.cross) {
                blend_cross(i0, i1);
            } else {
                for (int64_t j0 = i0; j0 < rows; j0 += kPanel) blend_full(i0, i1, j0, min64(j0 + kPanel, rows));
            }
        });
        return Status::ok;
    }

    void blend_cross(int64_t i0, int64_t i1) const {
        constexpr int64_t kRun = 10 * kPanel;
        const Layout layout = source_ != nullptr ? Layout(*source_) : layout_;
        for (int64_t m = 1; m < a_.models; ++m) {
            for (int64_t j = 0; j < a_.n; j += kRun) {
                const int64_t n = min64(kRun, a_.n - j);
                for (int64_t i = i0; i < i1; ++i) {
                    W* row = out_ + ((m - 1) * a_.n + i) * a_.n + j;
                    blend_run<kRun>(layout, i, layout.position(m) + j, n, row);
                }
            }
        }
    }

    void blend_full(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
        const int64_t ld = a_.n * a_.models;
        for (int64_t i = i0; i < i1; ++i) {
            const int64_t j = max64(i, j0);
            if (j < j1) blend_run<kPanel>(layout_, i, j, j1 - j, out_ + i * ld + j);
        }
        for (int64_t i = i0; i < i1; ++i) {
            for (int64_t j = max64(i + 1, j0); j < j1; ++j) out_[j * ld + i] = out_[i * ld + j];
            if (i >= j0 && i < j1) out_[i * ld + i] = W(1);
        }
    }

    // row[0 .. n): unit i of the first models with the units from position `column` on.
    template <int64_t kMost>
    void blend_run(const Layout& layout, int64_t i, int64_t column, int64_t n, W* __restrict row) const {
        if (share_ > 0) {
            for (int64_t j = 0; j < n; ++j) {
                const W x = row[j] > W(1) ? W(1) : row[j];
                row[j] = x < W(-1) ? W(-1) : x;
            }
        }
        if (source_ == nullptr) return;
        if (share_ == 0) {
            correlation_run(*source_, layout, moments_, i, column, n, row);
            return;
        }
        W seen[kMost];
        correlation_run(*source_, layout, moments_, i, column, n, seen);
        const W mine = static_cast<W>(share_), theirs = static_cast<W>(1 - share_);
        for (int64_t j = 0; j < n; ++j) row[j] = mine * row[j] + theirs * seen[j];
    }

    const SimilarityArgs& a_;
    const Layout layout_;
    W* const out_;
    int64_t panels_each_, panels_;
    Buffer<W> mean_, inverse_;
    const CovarianceState* source_ = nullptr;  // of activations, where they have a share
    Moments moments_;
    double share_ = 0;  // of the weights
};

}  // namespace

Status similarity(const SimilarityArgs& args);
Status similarity(const SimilarityArgs& args) {
    if (args.dtype == Dtype::f64) return Similarity<double>(args).run();
    if (args.dtype == Dtype::f32) return Similarity<float>(args).run();
    return Status::unsupported;
}

}  // namespace MUDSC_ISA
}  // namespace mudsc
