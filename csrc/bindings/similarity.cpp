// similarity.
#include <tuple>

#include "bindings/covariance.h"
#include "cpu/term_table.h"

namespace mudsc::bindings {

namespace {

// One term of one model: (tensor, unit dims, labelled axes), the latter each (dims, labels, merged size, scale or
// None).
using LabelledTuple = std::tuple<std::vector<int>, py::object, int64_t, std::optional<py::object>>;
using TermTuple = std::tuple<py::object, std::vector<int>, std::vector<LabelledTuple>>;

// The offsets of one term, and the tensor that they point into.
class TermArg {
  public:
    explicit TermArg(const TermTuple& tuple) : tensor_(std::get<0>(tuple), "terms"), table_(make(*tensor_, tuple)) {
        require(!tensor_->cuda, "terms: expected CPU tensors");
    }
    SimilarityTerm term() const {
        SimilarityTerm result{};
        result.dtype = tensor_->dtype;
        result.data = tensor_->data;
        table_.fill(result);
        return result;
    }
    int64_t units() const { return table_.units(); }

  private:
    static TermTable make(const TensorView& tensor, const TermTuple& tuple) {
        std::vector<char> used(static_cast<size_t>(tensor.ndim), 0);
        const auto use = [&](int d) {
            require(d >= 0 && d < tensor.ndim && used[static_cast<size_t>(d)] == 0,
                    "terms: dims out of range or named twice");
            used[static_cast<size_t>(d)] = 1;
        };
        for (int d : std::get<1>(tuple)) use(d);
        std::vector<LabelledAxes> labelled;
        std::vector<TensorArg> keep;
        keep.reserve(2 * std::get<2>(tuple).size());
        for (const auto& [dims, labels_obj, size, scale_obj] : std::get<2>(tuple)) {
            int64_t length = 1;
            for (int d : dims) {
                use(d);
                length *= tensor.shape[d];
            }
            const TensorArg& labels = keep.emplace_back(labels_obj, "labels");
            LabelledAxes axes{dims, vector_of<int64_t>(labels, Dtype::i64, length, "labels"), size, nullptr};
            for (int64_t i = 0; i < length; ++i)
                require(axes.labels[i] >= 0 && axes.labels[i] < size, "labels: out of range");
            if (scale_obj)
                axes.scale = vector_of<double>(keep.emplace_back(*scale_obj, "scale"), Dtype::f64, size, "scale");
            labelled.push_back(axes);
        }
        return TermTable(tensor.shape, tensor.strides, tensor.ndim, std::get<1>(tuple), labelled);
    }

    TensorArg tensor_;
    TermTable table_;
};

// Fills out; returns the index of a term that is not finite (-1: the activation sums are not), or None. With `bound`,
// entries of two units of one model may be upper bounds.
std::optional<int64_t> similarity(const std::vector<std::vector<TermTuple>>& term_tuples, int64_t n, int64_t models,
                                  bool cross, double balance, const CovarianceBuffers* activation,
                                  const py::object& out_obj, int threads, bool bound) {
    TensorArg out(out_obj, "out");
    require(n > 0 && models > 1 && models <= kMaxModels, "similarity: n or models out of range");
    std::vector<TermArg> keep;
    std::vector<SimilarityTerm> terms;
    keep.reserve(term_tuples.size() * static_cast<size_t>(models));
    for (const auto& entries : term_tuples) {
        require(static_cast<int64_t>(entries.size()) == models, "terms: expected one entry a model");
        const size_t first = terms.size();
        for (const auto& tuple : entries) {
            terms.push_back(keep.emplace_back(tuple).term());
            require(keep.back().units() == n, "terms: another number of units");
            require(terms.back().columns == terms[first].columns, "terms: models differ in columns");
        }
    }
    SimilarityArgs a{};
    a.dtype = out->dtype;
    a.n = n;
    a.models = models;
    a.cross = cross;
    a.terms = terms.data();
    a.term_count = static_cast<int64_t>(term_tuples.size());
    a.balance = balance;
    if (activation != nullptr) {
        a.activation = &activation->state();
        require(a.activation->width == n && a.activation->models == models && (cross || !a.activation->cross),
                "activation: another width, number of models or scope");
        require(a.activation->counts[0] > 0 && a.activation->counts[1] == 0,
                "activation: no samples, or some are pending");
    }
    a.out = flat_of<void>(out, out->dtype, cross ? (models - 1) * n * n : models * n * models * n, "out");
    int64_t bad = -1;
    a.bad_term = &bad;
    a.bound = &bound;
    a.bound_margin = 1;
    a.threads = threads;
    SignalPoll signals;
    a.poll = signals.poll();
    const Status status = signals.outcome(without_gil([&](const KernelTable& table) { return table.similarity(a); }));
    if (status == Status::not_finite) return bad;
    check(status, "similarity");
    return std::nullopt;
}

}  // namespace

void bind_similarity(py::module_& m) {
    m.def("similarity", &similarity, py::arg("terms"), py::arg("n"), py::arg("models"), py::arg("cross"),
          py::arg("balance"), py::arg("activation"), py::arg("out"), py::arg("threads"), py::arg("bound") = false);
}

}  // namespace mudsc::bindings
