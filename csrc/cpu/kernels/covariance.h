// Where a covariance's samples and accumulators lie, and correlations read straight from the latter.
#pragma once

#include <math.h>
#include <stdint.h>

#include "cpu/common.h"
#include "cpu/kernels.h"
#include "cpu/kernels/gram.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

// A unit is dead when its deviation is at most 1e-7 of its root mean square (docs/method.md); this is the square.
constexpr double kDeadVariance = 1e-14;

inline bool is_dead(double variance, double mean_square) { return !(variance > kDeadVariance * mean_square); }

// Offsets of samples [first, first + n) of one source, in row-major order of its sample dims.
inline void sample_offsets(const CovarianceSource& source, int64_t first, int64_t n, int64_t* off) {
    int64_t index[kMaxDims], at = 0, rest = first;
    for (int d = source.ndim - 1; d >= 0; --d) {
        index[d] = rest % source.shape[d];
        rest /= source.shape[d];
        at += index[d] * source.strides[d];
    }
    for (int64_t k = 0; k < n; ++k) {
        off[k] = at;
        for (int d = source.ndim - 1; d >= 0; --d) {
            at += source.strides[d];
            if (++index[d] < source.shape[d]) break;
            at -= index[d] * source.strides[d];
            index[d] = 0;
        }
    }
}

// Where units lie. Rows of the product are panels [0, row_panels); columns start at panel `column_panel`.
struct Layout {
    int64_t width, models, row_units, column_units, row_panels, column_panels, column_panel, panels;
    bool cross;

    Layout(int64_t width_, int64_t models_, bool cross_) : width(width_), models(models_), cross(cross_) {
        row_units = cross ? width : width * models;
        column_units = cross ? width * (models - 1) : row_units;
        row_panels = ceil_div(row_units, kPanel);
        column_panels = ceil_div(column_units, kPanel);
        column_panel = cross ? row_panels : 0;
        panels = cross ? row_panels + column_panels : row_panels;
    }
    explicit Layout(const CovarianceState& s) : Layout(s.width, s.models, s.cross) {}

    int64_t position(int64_t model) const {  // of its first unit
        if (!cross || model == 0) return model * width;
        return row_panels * kPanel + (model - 1) * width;
    }
    int64_t blocks() const { return cross ? row_panels * column_panels : row_panels * (row_panels + 1) / 2; }

    // Models with units in positions [first, first + kPanel): calls fn(model, unit, lane, units).
    template <typename Fn>
    void segments(int64_t panel, const Fn& fn) const {
        const int64_t first = panel * kPanel;
        int64_t model = 0;
        if (cross && panel >= row_panels) model = 1 + (first - row_panels * kPanel) / width;
        if (!cross) model = first / width;
        const int64_t last = cross && panel < row_panels ? 1 : models;
        for (; model < last; ++model) {
            const int64_t from = max64(position(model), first), to = min64(position(model) + width, first + kPanel);
            if (from >= first + kPanel) break;
            if (from < to)
                fn(model, from - position(model), static_cast<int>(from - first), static_cast<int>(to - from));
        }
    }
};

// What turns accumulated products into correlations: c_ij = (gram_ij / n - mean_i mean_j) * inverse_i * inverse_j.
struct Moments {
    Buffer<double> mean, inverse;

    bool compute(const CovarianceState& s, int64_t units, bool* finite) {
        if (!mean.allocate(units) || !inverse.allocate(units)) return false;
        const double count = static_cast<double>(s.counts[0]);
        const double largest = s.dtype == Dtype::f64 ? 1e300 : 1e38;  // above, products have overflowed
        *finite = true;
        for (int64_t u = 0; u < units; ++u) {
            mean[u] = s.sums[u] / count;
            const double variance = s.squares[u] / count - mean[u] * mean[u],
                         offset = s.shift[u] * s.scale[u] + mean[u];
            const double square = fmax(variance + offset * offset, mean[u] * mean[u]);
            inverse[u] = is_dead(variance, square) ? 0.0 : 1.0 / sqrt(variance);
            if (!(s.squares[u] <= largest)) *finite = false;
        }
        return true;
    }
};

template <typename W>
inline void correlate(const double* __restrict gram, const double* __restrict means, const double* __restrict inverses,
                      double inverse_count, double mean, double inverse, int64_t n, W* __restrict out) {
    for (int64_t j = 0; j < n; ++j) {
        double c = (gram[j] * inverse_count - mean * means[j]) * (inverse * inverses[j]);
        c = c > 1.0 ? 1.0 : c;
        c = c < -1.0 ? -1.0 : c;
        out[j] = static_cast<W>(c);
    }
}

// Correlations of one row unit with a run of column units, by position; both in rows and columns of the product.
template <typename W>
void correlation_run(const CovarianceState& s, const Layout& layout, const Moments& moments, int64_t row,
                     int64_t column, int64_t n, W* out) {
    const int64_t base =
        layout.column_panel * kPanel;  // vectors are indexed by position, blocks by panel of their side
    const double inverse_count = 1.0 / static_cast<double>(s.counts[0]);
    const double mean = moments.mean[row], inverse = moments.inverse[row];
    for (int64_t done = 0; done < n;) {
        const int64_t at = column + done - base, block = at / kPanel, lane = at % kPanel;
        const int64_t run = min64(kPanel - lane, n - done);
        const double* from = s.gram +
                             block_index(row / kPanel, block, layout.column_panels, !layout.cross) * kPanel * kPanel +
                             row % kPanel * kPanel + lane;
        correlate(from, moments.mean.get() + column + done, moments.inverse.get() + column + done, inverse_count, mean,
                  inverse, run, out + done);
        done += run;
    }
}

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
