// The accumulators of a covariance, as covariance and similarity take them.
#pragma once
#include "bindings/arguments.h"

namespace mudsc::bindings {

// (panels, blocks) of a covariance: how long its vectors (48 a panel) and its products (48 x 48 a block) are.
inline std::pair<int64_t, int64_t> covariance_sizes(int64_t width, int64_t models, bool cross) {
    require(width > 0 && models > 0 && models <= kMaxModels, "covariance: width or models out of range");
    const int64_t p = kGramPanel, rows = ((cross ? width : width * models) + p - 1) / p;
    if (!cross) return {rows, rows * (rows + 1) / 2};
    const int64_t columns = (width * (models - 1) + p - 1) / p;
    return {rows + columns, rows * columns};
}

// The accumulators of one covariance: borrows the tensors that Python owns, for as long as it lives.
class CovarianceBuffers {
  public:
    CovarianceBuffers(int64_t width, int64_t models, bool cross, const py::object& gram, const py::object& panels,
                      const py::object& vectors, const py::object& raw, const py::object& counts)
        : gram_(gram, "gram"),
          panels_(panels, "panels"),
          vectors_(vectors, "vectors"),
          raw_(raw, "raw"),
          counts_(counts, "counts") {
        const auto [n_panels, n_blocks] = covariance_sizes(width, models, cross);
        const int64_t lanes = n_panels * kGramPanel;
        state_.dtype = panels_->dtype;
        require(state_.dtype == Dtype::f32 || state_.dtype == Dtype::f64, "panels: expected float32 or float64");
        state_.width = width;
        state_.models = models;
        state_.cross = cross;
        state_.gram = flat_of<double>(gram_, Dtype::f64, n_blocks * kGramPanel * kGramPanel, "gram");
        state_.panels = flat_of<void>(panels_, state_.dtype, lanes * kGramDepth, "panels");
        double* vectors_data = flat_of<double>(vectors_, Dtype::f64, 4 * lanes, "vectors");
        state_.shift = vectors_data;
        state_.scale = vectors_data + lanes;
        state_.sums = vectors_data + 2 * lanes;
        state_.squares = vectors_data + 3 * lanes;
        state_.raw = flat_of<uint8_t>(raw_, Dtype::u8, n_panels, "raw");
        state_.counts = flat_of<int64_t>(counts_, Dtype::i64, 2, "counts");
        require(state_.counts[1] >= 0 && state_.counts[1] < kGramDepth && state_.counts[0] >= state_.counts[1],
                "counts: out of range");
    }

    // features: one tensor a model with `width` entries along dim; the other dims are samples, paired in row-major
    // order.
    void update(const std::vector<py::object>& features, int dim, int threads) {
        require(static_cast<int64_t>(features.size()) == state_.models, "features: expected one tensor a model");
        std::vector<TensorArg> tensors;
        std::vector<CovarianceSource> sources(features.size());
        tensors.reserve(features.size());
        int64_t samples = 0;
        for (size_t m = 0; m < features.size(); ++m) {
            const TensorArg& x = tensors.emplace_back(features[m], "features");
            require(!x->cuda && dim >= 0 && dim < x->ndim && x->shape[dim] == state_.width,
                    "features: wrong device or width");
            CovarianceSource& source = sources[m];
            source.dtype = x->dtype;
            source.data = x->data;
            source.unit_stride = x->strides[dim];
            int64_t count = 1;
            for (int d = 0; d < x->ndim; ++d) {
                if (d == dim) continue;
                source.shape[source.ndim] = x->shape[d];
                source.strides[source.ndim++] = x->strides[d];
                count *= x->shape[d];
            }
            require(m == 0 || count == samples, "features: expected as many samples from every model");
            samples = count;
        }
        run([&](const KernelTable& table) {
            return table.covariance_update(CovarianceUpdateArgs{&state_, sources.data(), samples, threads});
        });
    }
    void flush(int threads) {
        run([&](const KernelTable& table) { return table.covariance_flush(state_, threads); });
    }
    void merge(const CovarianceBuffers& other, int threads) {
        const CovarianceState& o = other.state_;
        require(
            o.width == state_.width && o.models == state_.models && o.cross == state_.cross && o.dtype == state_.dtype,
            "other: expected a covariance of the same kind");
        require(o.counts[1] == 0 && state_.counts[1] == 0, "merge: samples are pending");
        run([&](const KernelTable& table) {
            return table.covariance_merge(CovarianceMergeArgs{&state_, &o, threads});
        });
    }
    void rebase(const py::object& shift_obj, const py::object& scale_obj, int threads) {
        TensorArg shift(shift_obj, "shift"), scale(scale_obj, "scale");
        const int64_t lanes = raw_->shape[0] * kGramPanel;
        const double *to = vector_of<double>(shift, Dtype::f64, lanes, "shift"),
                     *by = vector_of<double>(scale, Dtype::f64, lanes, "scale");
        require(state_.counts[1] == 0, "rebase: samples are pending");
        run([&](const KernelTable& table) { return table.covariance_rebase(state_, to, by, threads); });
    }
    const CovarianceState& state() const { return state_; }

  private:
    template <typename Fn>
    static void run(const Fn& fn) {
        check(without_gil(fn), "covariance");
    }

    TensorArg gram_, panels_, vectors_, raw_, counts_;
    CovarianceState state_{};
};

}  // namespace mudsc::bindings
