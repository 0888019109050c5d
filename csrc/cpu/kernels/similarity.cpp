// Similarity of units: correlation of their weights, accumulated term after term straight into the result, and its
// blend with the correlation of their activations, read from a covariance's accumulators.
#include "cpu/kernels/bounds.h"
#include "cpu/kernels/covariance.h"
#include "cpu/kernels/fill.h"
#include "cpu/kernels/pack.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

constexpr int64_t kUndecided = -1;
// Rows of which the best pairs are looked at.
constexpr int64_t kRowsLookedAt = 32;
// Of the room that these leave, the share that is used, and what is kept for the errors of rounding.
constexpr double kRoom = 0.85, kRounding = 0.04;
// Above this share of the columns, bounds take all of them; below, a multiple of some.
constexpr double kWorthLess = 0.95;
constexpr int64_t kSome = 16;

template <typename W>
class Similarity {
  public:
    explicit Similarity(const SimilarityArgs& args)
        : a_(args), layout_(args.n, args.models, false), out_(static_cast<W*>(args.out)) {
        // Every model has panels of its own in a cross product, so that each pair of models is one product.
        panels_each_ = ceil_div(a_.n, kPanel);
        full_ld_ = a_.row_stride > 0 ? a_.row_stride : a_.n * a_.models;
        panels_ = a_.cross ? panels_each_ * a_.models : layout_.panels;
        bound_ = a_.bound != nullptr && *a_.bound && !a_.cross;
    }

    Status run() {
        const bool weights = a_.term_count > 0 && (a_.balance > 0 || a_.activation == nullptr);
        bound_ &= weights;
        source_ = a_.balance < 1 || !weights ? a_.activation : nullptr;
        share_ = weights ? (source_ != nullptr ? a_.balance : 1.0) : 0.0;
        if (weights) {
            Status status = correlate_once();
            if (status == Status::not_converged) status = correlate_rows();
            if (status != Status::ok) return status;
        }
        if (a_.bound != nullptr) *a_.bound = bound_;
        return blend();
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

    // The first lanes of a panel that hold all its units.
    int filled(int64_t p) const {
        int lanes = 0;
        segments(p, [&](int64_t, int64_t, int lane, int units) { lanes = lane + units; });
        return lanes;
    }

    void fill_panel(int64_t p, int64_t term, int64_t c0, int64_t n, W* to) const {
        segments(p, [&](int64_t model, int64_t unit, int lane, int units) {
            const SimilarityTerm& t = a_.terms[term * a_.models + model];
            const Columns columns{t.columns, t.off, t.ptr, t.scale};
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

    // The careful way: rows are measured first, then centred and normalised as they are packed.
    Status correlate_rows() {
        corrected_ = bound_ = false;
        const Status status = measure_rows();
        if (status != Status::ok) return status;
        return accumulate([&](int64_t p, W* block, int64_t n) {
            shift_and_scale(block, n, mean_.get() + p * kPanel, inverse_.get() + p * kPanel);
        });
    }

    // The quick way reads the tensors once: rows are shifted by the mean of some of their columns, and what that misses
    // of the mean is a rank-one correction in the epilogue. Returns not_converged where it misses by more than a
    // deviation, so that the correction would cancel digits, or where anything is not finite or out of scale.
    Status correlate_once() {
        const int64_t units = panels_ * kPanel;
        Buffer<W> shift(units), scale(units);
        Buffer<double> sums(units);
        const Buffer<double>& squares = squares_;
        if (!shift || !scale || !sums || !squares_.allocate(units) || !mean_.allocate(units) ||
            !inverse_.allocate(units))
            return Status::no_memory;
        int64_t total = 0, widest = 0;
        for (int64_t t = 0; t < a_.term_count; ++t) {
            const int64_t columns = a_.terms[t * a_.models].columns;
            if (columns > a_.terms[widest * a_.models].columns) widest = t;
            total += columns;
        }
        if (total == 0) return Status::not_converged;
        if (bound_ && !inside_.allocate(panels_)) return Status::no_memory;
        bound_columns_ = kUndecided;
        parallel_each(a_.threads, panels_, [&](int64_t p, int) {
            guess(p, widest, total, shift.get() + p * kPanel, scale.get() + p * kPanel);
            for (int64_t u = p * kPanel; u < (p + 1) * kPanel; ++u) sums[u] = squares[u] = 0;
        });
        const Status status = accumulate([&](int64_t p, W* block, int64_t n) {
            const int64_t u = p * kPanel;
            settle_samples<false>(block, n, shift.get() + u, scale.get() + u, sums.get() + u, squares.get() + u,
                                  filled(p));
        });
        if (status != Status::ok) return status;
        const double n = static_cast<double>(total);
        bool good = true;
        for (int64_t u = 0; u < units; ++u) {
            const double offset = sums[u] / n, variance = squares[u] / n - offset * offset;
            const double mean = static_cast<double>(shift[u]) * static_cast<double>(scale[u]) + offset;
            const bool constant = squares[u] == 0, in_scale = squares[u] > 0x1p-60 && squares[u] < 0x1p60;
            good &= constant || (in_scale && offset * offset <= variance);
            const bool dead = is_dead(variance, fmax(variance + mean * mean, offset * offset));
            mean_[u] = static_cast<W>(offset * sqrt(n));
            inverse_[u] = dead ? W(0) : static_cast<W>(1 / sqrt(variance * n));
            if (bound_) inside_.settle(u, squares[u], static_cast<double>(inverse_[u]), total);
        }
        bound_ &= !inside_.exact(total);
        corrected_ = true;
        return good ? Status::ok : Status::not_converged;
    }

    // Mean and one over the norm of the rows of a panel, by the first columns of a term.
    void guess(int64_t p, int64_t term, int64_t total, W* shift, W* scale) const {
        W block[kPackRows * kPanel] = {};
        double sums[kPanel] = {}, squares[kPanel] = {};
        const int64_t n = min64(kPackRows, a_.terms[term * a_.models].columns);
        fill_panel(p, term, 0, n, block);
        measure(block, n, sums, squares);
        for (int u = 0; u < kPanel; ++u) {
            const double mean = sums[u] / static_cast<double>(n),
                         variance = squares[u] / static_cast<double>(n) - mean * mean;
            const double by = 1 / sqrt(variance * static_cast<double>(total));
            shift[u] = static_cast<W>(mean);
            scale[u] = by > 1e-30 && by < 1e30 ? static_cast<W>(by) : W(1);
        }
    }

    // Accumulates products of the rows in the result, kGramDepth columns at a time, of which `settle` makes what is
    // multiplied.
    template <typename Settle>
    Status accumulate(const Settle& settle) {
        int64_t total = 0;
        for (int64_t t = 0; t < a_.term_count; ++t) total += a_.terms[t * a_.models].columns;
        const int64_t depth = max64(1, min64(kGramDepth, total)), size = depth * kPanel;
        Buffer<W> packed(panels_ * size);
        Buffer<const W*> values(panels_);
        if (!packed || !values) return Status::no_memory;
        for (int64_t p = 0; p < panels_; ++p) {
            values[p] = packed.get() + p * size;
            if (filled(p) < kPanel) memset(packed.get() + p * size, 0, static_cast<size_t>(size) * sizeof(W));
        }
        const int64_t rows = a_.cross ? a_.n * (a_.models - 1) : a_.n * a_.models;
        const int64_t columns = a_.cross ? a_.n : rows, ld = a_.cross ? a_.n : full_ld_;
        parallel_each(a_.threads, rows,
                      [&](int64_t i, int) { memset(out_ + i * ld, 0, static_cast<size_t>(columns) * sizeof(W)); });
        int64_t term = 0, column = 0;
        for (int64_t done = 0; done < total; done += depth) {
            const int64_t n = min64(depth, total - done);
            parallel_each(a_.threads, panels_,
                          [&](int64_t p, int) { pack(p, term, column, n, packed.get() + p * size, settle); });
            for (int64_t left = n; left > 0;) {
                const int64_t step = min64(left, a_.terms[term * a_.models].columns - column);
                left -= step;
                column += step;
                if (column == a_.terms[term * a_.models].columns) {
                    ++term;
                    column = 0;
                }
            }
            if (!multiply(n, total, values.get())) return Status::interrupted;
        }
        return Status::ok;
    }

    template <typename Settle>
    void pack(int64_t p, int64_t term, int64_t column, int64_t n, W* to, const Settle& settle) const {
        for (int64_t left = n; left > 0;) {
            const int64_t step = min64(min64(left, kPackRows), a_.terms[term * a_.models].columns - column);
            if (step > 0) {
                fill_panel(p, term, column, step, to);
                settle(p, to, step);
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

    bool multiply(int64_t depth, int64_t total, const W* const* values) {
        const GramOperand<W> rows{values, nullptr};
        if (!a_.cross) {
            const int64_t units = a_.n * a_.models;
            const GramTarget<W> target{out_, full_ld_, units, units, true, bound_ ? a_.n : 0};
            if (!gram_product(a_.threads, depth, rows, rows, target, &a_.poll)) return false;
            if (!bound_) return true;
            if (bound_columns_ == kUndecided) bound_columns_ = columns_to_bound(total);
            return inside_.multiply(a_.threads, depth, bound_columns_, values, target, &a_.poll);
        }
        for (int64_t m = 1; m < a_.models; ++m) {
            const GramOperand<W> columns{values + m * panels_each_, nullptr};
            const GramTarget<W> target{out_ + (m - 1) * a_.n * a_.n, a_.n, a_.n, a_.n, false};
            if (!gram_product(a_.threads, depth, rows, columns, target, &a_.poll)) return false;
        }
        return true;
    }

    // Of how many columns products inside models are made: as few as tell two units of one model from the rows' best
    // pairs, as far as some rows show after the first columns. Bounds that turn out too high cost another similarity,
    // so all are taken where rows have a second best pair that is nearly as good: pairs that get in each other's way
    // leave units for last that match nothing.
    int64_t columns_to_bound(int64_t total) {
        const int64_t n = a_.n, units = n * a_.models, some = units - n;
        if (n < kPanel || share_ == 0 || see_activations() != Status::ok) return total;
        W lowest = 1, rival = -1;  // of the rows' best pairs with another model; the highest second best
        W inside = -1;             // the highest that activations say of two units of one model
        for (int64_t i = 0; i < some; i += max64(1, some / kRowsLookedAt)) {
            W seen[kPanel] = {}, best = -1, second = -1;
            for (int64_t j = i + 1; j < units;) {
                const bool own = j / n == i / n;
                const int64_t end = (j / n + 1) * n, count = min64(kPanel, end - j);
                if (source_ != nullptr) correlation_run(*source_, layout_, moments_, i, j, count, seen);
                for (int64_t k = 0; k < count; ++k) {
                    const W activations = static_cast<W>(1 - share_) * seen[k];
                    if (own) {
                        inside = activations > inside ? activations : inside;
                        continue;
                    }
                    const double norms = squares_[i] * squares_[j + k];
                    const W weights = norms > 0 ? out_[i * full_ld_ + j + k] / static_cast<W>(sqrt(norms)) : W(0);
                    const W both = static_cast<W>(share_) * weights + activations, less = both < best ? both : best;
                    best = both > best ? both : best;
                    second = less > second ? less : second;
                }
                j += count;
                if (own || j < end) continue;
                lowest = best < lowest ? best : lowest;
                rival = second > rival ? second : rival;
                best = second = -1;
            }
        }
        lowest *= static_cast<W>(a_.bound_margin);
        if (2 * rival > lowest + inside) return total;
        // What is left of two rows may be correlated by as much as this.
        const double room = static_cast<double>(lowest - inside) / share_ * kRoom - kRounding;
        const double part = 1 - room;
        if (!(part < kWorthLess)) return total;
        return part > 0 ? ceil_div(static_cast<int64_t>(part * static_cast<double>(total)) + 1, kSome) * kSome : 0;
    }

    // Reads the activations' sums, where they have a share.
    Status see_activations() {
        if (source_ == nullptr) return Status::ok;
        if (!moments_.mean && !moments_.compute(*source_, Layout(*source_).panels * kPanel, &finite_))
            return Status::no_memory;
        return finite_ ? Status::ok : Status::not_finite;
    }

    // The epilogue: one pass over the result, mirrored below the diagonal where it is symmetric.
    Status blend() {
        const Status status = see_activations();
        if (status == Status::not_finite) *a_.bad_term = -1;
        if (status != Status::ok) return status;
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
        const Layout layout = source_ != nullptr ? Layout(*source_) : layout_;
        for (int64_t m = 1; m < a_.models; ++m) {
            for (int64_t j = 0; j < a_.n; j += kPanel) {
                const int64_t n = min64(kPanel, a_.n - j);
                for (int64_t i = i0; i < i1; ++i) {
                    W* row = out_ + ((m - 1) * a_.n + i) * a_.n + j;
                    blend_run(layout, i, m * panels_each_ * kPanel + j, layout.position(m) + j, n, row);
                }
            }
        }
    }

    void blend_full(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
        const int64_t ld = full_ld_;
        for (int64_t i = i0; i < i1; ++i) {
            int64_t j = max64(i, j0);
            const int64_t inside = bound_ ? min64((i / a_.n + 1) * a_.n, j1) : j;
            if (j < inside) blend_run(layout_, i, j, j, inside - j, out_ + i * ld + j, true);
            j = max64(j, inside);
            if (j < j1) blend_run(layout_, i, j, j, j1 - j, out_ + i * ld + j);
        }
        if (i0 == j0) {
            for (int64_t i = i0; i < i1; ++i) {
                for (int64_t j = i + 1; j < j1; ++j) out_[j * ld + i] = out_[i * ld + j];
                out_[i * ld + i] = W(1);
            }
            return;
        }
        // A block off the diagonal: four rows at a time become four columns.
        int64_t i = i0;
        for (; i + 4 <= i1; i += 4) {
            const W* const from[4] = {out_ + i * ld + j0, out_ + (i + 1) * ld + j0, out_ + (i + 2) * ld + j0,
                                      out_ + (i + 3) * ld + j0};
            transpose_4(from, 0, j1 - j0, out_ + j0 * ld + i, ld);
        }
        for (; i < i1; ++i) {
            for (int64_t j = j0; j < j1; ++j) out_[j * ld + i] = out_[i * ld + j];
        }
    }

    // row[0 .. n): unit i of the first models with the units from position `column` of the activations and `packed` of
    // the weights on. bound: these are to become upper bounds.
    void blend_run(const Layout& layout, int64_t i, int64_t packed, int64_t column, int64_t n, W* __restrict row,
                   bool bound = false) const {
        if (share_ > 0 && corrected_) {
            const W offset = mean_[i], by = inverse_[i];
            const W *offsets = mean_.get() + packed, *others = inverse_.get() + packed;
            for (int64_t j = 0; j < n; ++j) row[j] = (row[j] - offset * offsets[j]) * (by * others[j]);
        }
        if (bound) inside_.raise(i, packed, n, row);
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
        W seen[kPanel];
        correlation_run(*source_, layout, moments_, i, column, n, seen);
        const W mine = static_cast<W>(share_), theirs = static_cast<W>(1 - share_);
        for (int64_t j = 0; j < n; ++j) row[j] = mine * row[j] + theirs * seen[j];
    }

    const SimilarityArgs& a_;
    const Layout layout_;
    W* const out_;
    int64_t panels_each_, panels_, full_ld_;
    // Of the rows; with corrected_, what a row's shift misses of its mean, times the root of the number of columns.
    Buffer<W> mean_, inverse_;
    bool corrected_ = false;
    Buffer<double> squares_;  // of what is multiplied, so far
    bool bound_;              // entries inside a model are upper bounds
    InsideBounds<W> inside_;
    int64_t bound_columns_ = kUndecided;
    const CovarianceState* source_ = nullptr;  // of activations, where they have a share
    Moments moments_;
    bool finite_ = true;  // these
    double share_ = 0;    // of the weights
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
