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
        tensors.reserve(features.size());
        for (const py::object& x : features) tensors.emplace_back(x, "features");
        for (const TensorArg& x : tensors) {
            require(!x->cuda && dim >= 0 && dim < x->ndim && x->shape[dim] == state_.width,
                    "features: wrong device or width");
            require(x->numel() == tensors[0]->numel(), "features: expected as many samples from every model");
        }
        add(tensors, dim, threads);
    }
    // The usual batch, checked and added in one step of a microsecond or two: a list or tuple of plain CPU tensors that
    // agree. False, with nothing added, for all that wants a closer look.
    bool update_plain(const py::object& features, int dim, int threads) {
        if (!PyList_CheckExact(features.ptr()) && !PyTuple_CheckExact(features.ptr())) return false;
        const auto models = static_cast<size_t>(state_.models);
        const py::tuple batch(features);  // a list may change while torch is asked
        if (batch.size() != models) return false;
        std::vector<TensorArg> tensors;
        tensors.reserve(models);
        int axis = 0;
        for (size_t m = 0; m < models; ++m) {
            const py::handle x = PyTuple_GET_ITEM(batch.ptr(), static_cast<Py_ssize_t>(m));
            if (!Torch::is_tensor(x) || !Torch::is_cpu(x) || !Torch::is_strided(x) || Torch::is_neg(x)) return false;
            if (!Torch::is_float(x)) return false;
            const int64_t ndim = Torch::dim(x), at = dim < 0 ? dim + ndim : dim;
            if (ndim > kMaxDims || at < 0 || at >= ndim || (m > 0 && at != axis)) return false;
            axis = static_cast<int>(at);
            const TensorArg& view = tensors.emplace_back(x, "features");
            if (view->dtype == Dtype::f64 && state_.dtype != Dtype::f64) return false;
            const int64_t entries = view->numel();
            if (view->shape[axis] != state_.width || entries == 0 || entries != tensors[0]->numel()) return false;
        }
        add(tensors, axis, threads);
        return true;
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
    // Samples, and those of them that wait in the panels.
    std::pair<int64_t, int64_t> counts() const { return {state_.counts[0], state_.counts[1]}; }

  private:
    // One tensor a model, all with as many samples, units along dim.
    void add(const std::vector<TensorArg>& tensors, int dim, int threads) {
        std::vector<CovarianceSource> sources(tensors.size());
        for (size_t m = 0; m < tensors.size(); ++m) {
            const TensorArg& x = tensors[m];
            CovarianceSource& source = sources[m];
            source.dtype = x->dtype;
            source.data = x->data;
            source.unit_stride = x->strides[dim];
            for (int d = 0; d < x->ndim; ++d) {
                if (d == dim) continue;
                source.shape[source.ndim] = x->shape[d];
                source.strides[source.ndim++] = x->strides[d];
            }
        }
        const int64_t samples = tensors[0]->numel() / state_.width;
        run([&](const KernelTable& table) {
            return table.covariance_update(CovarianceUpdateArgs{&state_, sources.data(), samples, threads});
        });
    }
    template <typename Fn>
    static void run(const Fn& fn) {
        check(without_gil(fn), "covariance");
    }

    TensorArg gram_, panels_, vectors_, raw_, counts_;
    CovarianceState state_{};
};

}  // namespace mudsc::bindings
