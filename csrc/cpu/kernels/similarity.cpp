// Similarity of units: correlation of their weights, accumulated term after term straight into the result, and its
// blend with the correlation of their activations, read from a covariance's accumulators.
#include "cpu/kernels/bounds.h"
#include "cpu/kernels/covariance.h"
#include "cpu/kernels/fill.h"
#include "cpu/kernels/pack.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

// Largest |mean| / deviation of the first columns of rows of bf16 that are multiplied as they are: six times what
// chance makes of 64 columns of mean 0.
constexpr double kRawDrift = 0.75;

constexpr int64_t kUndecided = -1;
// Rows of which the best pairs are looked at.
constexpr int64_t kRowsLookedAt = 32;

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
        corrected_ = bound_ = raw_ = false;
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
        int64_t widest = 0;
        for (int64_t t = 1; t < a_.term_count; ++t) {
            if (columns_of(t) > columns_of(widest)) widest = t;
        }
        const int64_t total = all_columns();
        if (total == 0) return Status::not_converged;
        if (bound_ && !inside_.allocate(panels_)) return Status::no_memory;
        bound_columns_ = kUndecided;
        parallel_each(a_.threads, panels_, [&](int64_t p, int) {
            guess(p, widest, total, shift.get() + p * kPanel, scale.get() + p * kPanel);
            for (int64_t u = p * kPanel; u < (p + 1) * kPanel; ++u) sums[u] = squares[u] = 0;
        });
        raw_ = may_be_raw();
        for (int64_t u = 0; raw_ && u < units; ++u) raw_ = near_zero(shift[u] * scale[u], scale[u], total);
        for (int64_t u = 0; raw_ && u < units; ++u) {
            shift[u] = 0;
            scale[u] = 1;
        }
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

    // May the tensors' own values be multiplied, as pairs of bf16? Products of these are exact and take half the time.
    bool may_be_raw() const {
        if (!kHasBf16 || sizeof(W) != sizeof(float)) return false;
        for (int64_t i = 0; i < a_.term_count * a_.models; ++i) {
            const SimilarityTerm& t = a_.terms[i];
            if (t.dtype != Dtype::bf16 || t.ptr != nullptr || t.scale != nullptr) return false;
        }
        return true;
    }
    // A guessed mean, in units of the row's norm, and one over that: neither a shift nor a scale is needed.
    static bool near_zero(W mean, W scale, int64_t total) {
        return static_cast<double>(mean * mean) * static_cast<double>(total) < kRawDrift * kRawDrift &&
               scale > W(0x1p-20) && scale < W(0x1p20);
    }

    int64_t columns_of(int64_t term) const { return a_.terms[term * a_.models].columns; }
    int64_t all_columns() const {
        int64_t total = 0;
        for (int64_t t = 0; t < a_.term_count; ++t) total += columns_of(t);
        return total;
    }

    // Columns that are packed before they are multiplied: of a cross product as many as take no more memory than its
    // result, or a megabyte.
    int64_t packed_at_once() const {
        if (!a_.cross) return kGramDepth;
        const int64_t size = static_cast<int64_t>(sizeof(W)), result = (a_.models - 1) * a_.n * a_.n * size;
        return min64(kGramDepth, max64(16, max64(result, 1 << 20) / (panels_ * kPanel * size) / 16 * 16));
    }

    // Accumulates products of the rows in the result, some columns at a time, of which `settle` makes what is
    // multiplied.
    template <typename Settle>
    Status accumulate(const Settle& settle) {
        const int64_t total = all_columns(), depth = max64(1, min64(packed_at_once(), total));
        Panels<W> packed;
        if (!packed.allocate(panels_, depth, !raw_ || bound_, raw_)) return Status::no_memory;
        const int64_t rows = a_.cross ? a_.n * (a_.models - 1) : a_.n * a_.models;
        const int64_t columns = a_.cross ? a_.n : rows, ld = a_.cross ? a_.n : full_ld_;
        parallel_each(a_.threads, rows,
                      [&](int64_t i, int) { memset(out_ + i * ld, 0, static_cast<size_t>(columns) * sizeof(W)); });
        int64_t term = 0, column = 0;
        for (int64_t done = 0; done < total; done += depth) {
            const int64_t n = min64(depth, total - done);
            parallel_each(a_.threads, panels_, [&](int64_t p, int) { pack(p, term, column, n, packed, settle); });
            for (int64_t left = n; left > 0;) {
                const int64_t step = min64(left, columns_of(term) - column);
                left -= step;
                column += step;
                if (column == columns_of(term)) {
                    ++term;
                    column = 0;
                }
            }
            if (!multiply(n, total, packed)) return Status::interrupted;
        }
        return Status::ok;
    }

    template <typename Settle>
    void pack(int64_t p, int64_t term, int64_t column, int64_t n, const Panels<W>& packed, const Settle& settle) const {
        W block[kPackRows * kPanel];
        const bool whole = filled(p) == kPanel;
        for (int64_t at = 0; at < n;) {
            const int64_t step = min64(min64(n - at, kPackRows), columns_of(term) - column);
            if (step > 0) {
                W* to = packed.room(p, at, block);
                if (!whole) memset(to, 0, static_cast<size_t>(step * kPanel) * sizeof(W));
                fill_panel(p, term, column, step, to);
                settle(p, to, step);
                packed.done(p, at, step, to);
            }
            at += step;
            column += step;
            if (column == columns_of(term)) {
                ++term;
                column = 0;
            }
        }
    }

    bool multiply(int64_t depth, int64_t total, const Panels<W>& packed) {
        const GramOperand<W> rows = packed.operand();
        if (!a_.cross) {
            const int64_t units = a_.n * a_.models;
            const GramTarget<W> target{out_, full_ld_, units, units, true, bound_ ? a_.n : 0};
            if (!gram_product(a_.threads, depth, rows, rows, target, &a_.poll)) return false;
            if (!bound_) return true;
            if (bound_columns_ == kUndecided) bound_columns_ = columns_to_bound(total);
            return inside_.multiply(a_.threads, depth, bound_columns_, packed.values(), target, &a_.poll);
        }
        for (int64_t m = 1; m < a_.models; ++m) {
            const GramOperand<W> columns = packed.operand(m * panels_each_);
            const GramTarget<W> target{out_ + (m - 1) * a_.n * a_.n, a_.n, a_.n, a_.n, false};
            if (!gram_product(a_.threads, depth, rows, columns, target, &a_.poll)) return false;
        }
        return true;
    }

    // Of how many columns products inside models are made, by the first ones and the activations.
    int64_t columns_to_bound(int64_t total) {
        const int64_t n = a_.n, units = n * a_.models, some = units - n;
        if (n < kPanel || share_ == 0 || see_activations() != Status::ok) return total;
        Separation<W> found;
        for (int64_t i = 0; i < some; i += max64(1, some / kRowsLookedAt)) {
            W seen[kPanel] = {};
            for (int64_t j = i + 1; j < units;) {
                const bool own = j / n == i / n;
                const int64_t end = (j / n + 1) * n, count = min64(kPanel, end - j);
                if (source_ != nullptr) correlation_run(*source_, layout_, moments_, i, j, count, seen);
                for (int64_t k = 0; k < count; ++k) {
                    const W activations = static_cast<W>(1 - share_) * seen[k];
                    if (own) {
                        found.see_inside(activations);
                        continue;
                    }
                    const double norms = squares_[i] * squares_[j + k];
                    const W weights = norms > 0 ? out_[i * full_ld_ + j + k] / static_cast<W>(sqrt(norms)) : W(0);
                    found.see_pair(static_cast<W>(share_) * weights + activations);
                }
                j += count;
                if (!own && j == end) found.end_of_pairs();
            }
        }
        return found.columns(total, share_, a_.bound_margin);
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
    bool corrected_ = false, raw_ = false;
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
