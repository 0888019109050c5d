// The only file that includes pybind11. Every entry point reads its tensors, checks what guards memory, releases the
// GIL and calls one kernel; names, shapes and values are checked by the Python function above it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "tensor_view.h"
#ifdef MUDSC_FAST_CUDA_ARCHS
#include "cuda/launch.h"
#endif

namespace py = pybind11;
using mudsc::Dtype;
using mudsc::KernelTable;
using mudsc::Poll;
using mudsc::Status;
using mudsc::TensorView;

namespace {

// A tensor argument: takes any object with __dlpack__ and keeps its memory alive until the call ends.
class TensorArg {
  public:
    TensorArg(const py::handle& object, const char* name)
        : managed_(exported(object, name)), view_(managed_->tensor, name) {}
    TensorArg(TensorArg&& other) noexcept : managed_(other.managed_), view_(other.view_) { other.managed_ = nullptr; }
    TensorArg(const TensorArg&) = delete;
    TensorArg& operator=(const TensorArg&) = delete;
    ~TensorArg() {
        if (managed_ != nullptr && managed_->deleter != nullptr) managed_->deleter(managed_);
    }
    const TensorView* operator->() const { return &view_; }
    const TensorView& operator*() const { return view_; }

  private:
    static mudsc::dlpack::ManagedTensor* exported(const py::handle& object, const char* name) {
        if (!py::hasattr(object, "__dlpack__")) {
            throw py::type_error(std::string(name) + ": expected a tensor, got " +
                                 std::string(py::str(py::type::handle_of(object).attr("__name__"))));
        }
        py::object capsule = object.attr("__dlpack__")();
        auto* managed = static_cast<mudsc::dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
        if (managed == nullptr) throw py::error_already_set();
        PyCapsule_SetName(capsule.ptr(), "used_dltensor");
        return managed;
    }

    mudsc::dlpack::ManagedTensor* managed_;
    TensorView view_;
};

void require(bool condition, const char* message) {
    if (!condition) throw py::value_error(message);
}

void require_cpu(const TensorArg& t, Dtype dtype, int ndim, const char* name) {
    if (t->cuda || t->dtype != dtype || t->ndim != ndim) {
        throw py::value_error(std::string(name) + ": wrong device, dtype or number of dimensions");
    }
}

// A contiguous CPU vector of a known length, or an error.
template <typename T>
T* vector_of(const TensorArg& t, Dtype dtype, int64_t length, const char* name) {
    require_cpu(t, dtype, 1, name);
    if (t->shape[0] != length || (length > 1 && t->strides[0] != 1)) {
        throw py::value_error(std::string(name) + ": expected a contiguous vector of length " + std::to_string(length));
    }
    return t->as<T>();
}

// Lets Ctrl-C end a long kernel: asks Python for pending signals at most every 20 ms.
class SignalPoll {
  public:
    Poll poll() { return Poll{&SignalPoll::stop, this}; }
    bool raised() const { return raised_; }

  private:
    static bool stop(void* self_ptr) {
        auto* self = static_cast<SignalPoll*>(self_ptr);
        const auto now = std::chrono::steady_clock::now();
        if (self->raised_ || now - self->last_ < std::chrono::milliseconds(20)) return self->raised_;
        self->last_ = now;
        py::gil_scoped_acquire gil;
        self->raised_ = PyErr_CheckSignals() != 0;
        return self->raised_;
    }
    std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
    bool raised_ = false;
};

void check(Status status, const char* op) {
    switch (status) {
        case Status::ok: return;
        case Status::no_memory: PyErr_SetString(PyExc_MemoryError, op); throw py::error_already_set();
        case Status::interrupted: throw py::error_already_set();  // PyErr_CheckSignals has set it
        case Status::not_finite:
            throw py::value_error(std::string(op) + ": expected finite values, got NaN or infinity");
        case Status::not_symmetric: throw py::value_error("similarity: expected a symmetric matrix");
        case Status::infeasible: throw py::value_error(std::string(op) + ": no allowed pair is left");
        case Status::not_converged:
            throw std::runtime_error(std::string(op) + ": the result could not be proven optimal");
        case Status::unsupported: throw py::type_error(std::string(op) + ": unsupported dtype");
    }
}

// ---- regroup ----

mudsc::RegroupArgs regroup_args(const TensorView& in, const TensorView& out, int dim, int threads) {
    require(in.ndim == out.ndim && in.ndim > 0 && dim >= 0 && dim < in.ndim, "regroup: in, out and dim disagree");
    require(in.dtype == out.dtype && in.element_bytes == out.element_bytes, "regroup: in and out differ in dtype");
    for (int d = 0; d < in.ndim; ++d)
        require(d == dim || in.shape[d] == out.shape[d], "regroup: in and out differ in shape");
    mudsc::RegroupArgs a{};
    a.dtype = in.dtype;
    a.element_bytes = in.element_bytes;
    a.ndim = in.ndim;
    a.dim = dim;
    a.shape = out.shape;
    a.in = in.data;
    a.in_strides = in.strides;
    a.out = out.data;
    a.out_strides = out.strides;
    a.threads = threads;
    return a;
}

void regroup(const py::object& in_obj, const py::object& out_obj, int dim, const py::object& ptr_obj,
             const py::object& members_obj, const std::optional<py::object>& scale_obj, int threads) {
    TensorArg in(in_obj, "tensor"), out(out_obj, "out"), ptr(ptr_obj, "ptr"), members(members_obj, "members");
    mudsc::RegroupArgs a = regroup_args(*in, *out, dim, threads);
    const int64_t size = out->shape[dim];
    a.ptr = vector_of<int64_t>(ptr, Dtype::i64, size + 1, "ptr");
    require(a.ptr[0] == 0, "ptr: must start at 0");
    for (int64_t j = 0; j < size; ++j) require(a.ptr[j] <= a.ptr[j + 1], "ptr: must not fall");
    a.members = vector_of<int64_t>(members, Dtype::i64, a.ptr[size], "members");
    for (int64_t p = 0; p < a.ptr[size]; ++p) {
        require(a.members[p] >= 0 && a.members[p] < in->shape[dim], "members: out of range");
    }
    std::optional<TensorArg> scale;
    if (scale_obj) {
        scale.emplace(*scale_obj, "scale");
        a.scale = vector_of<double>(*scale, Dtype::f64, size, "scale");
    }
    require(!in->cuda && !out->cuda, "regroup: expected CPU tensors");
    Status status;
    {
        const KernelTable& table = mudsc::kernels();
        py::gil_scoped_release release;
        status = table.regroup(a);
    }
    check(status, "regroup");
}

#ifdef MUDSC_FAST_CUDA_ARCHS
// The index vectors live on the device too and were made and checked there by the caller.
void regroup_cuda(const py::object& in_obj, const py::object& out_obj, int dim, const py::object& ptr_obj,
                  const py::object& members_obj, const std::optional<py::object>& scale_obj, uintptr_t stream) {
    TensorArg in(in_obj, "tensor"), out(out_obj, "out"), ptr(ptr_obj, "ptr"), members(members_obj, "members");
    mudsc::RegroupArgs a = regroup_args(*in, *out, dim, 0);
    require(in->cuda && out->cuda && ptr->cuda && members->cuda, "regroup: expected CUDA tensors");
    require(out->device == in->device && ptr->device == in->device && members->device == in->device,
            "regroup: tensors are on different devices");
    require(ptr->dtype == Dtype::i64 && ptr->ndim == 1 && ptr->shape[0] == out->shape[dim] + 1,
            "ptr: wrong dtype or length");
    require(members->dtype == Dtype::i64 && members->ndim == 1, "members: wrong dtype or shape");
    a.ptr = ptr->as<int64_t>();
    a.members = members->as<int64_t>();
    std::optional<TensorArg> scale;
    if (scale_obj) {
        scale.emplace(*scale_obj, "scale");
        require((*scale)->cuda && (*scale)->dtype == Dtype::f64 && (*scale)->numel() == out->shape[dim],
                "scale: wrong dtype or length");
        a.scale = (*scale)->as<double>();
    }
    std::string error;
    {
        py::gil_scoped_release release;
        error = mudsc::cuda::regroup(a, in->device, reinterpret_cast<void*>(stream));
    }
    if (!error.empty()) throw std::runtime_error("regroup: " + error);
}
#endif

// ---- zip ----

// Returns (total, merges made); the owner of each unit and the budgets left are written in place.
std::pair<double, int64_t> zip(const py::object& similarity_obj, const py::object& units_obj,
                               const py::object& model_obj, int64_t merges, double attenuation,
                               const py::object& budget_obj, const py::object& block_budget_obj,
                               const py::object& owner_obj, int threads) {
    TensorArg similarity(similarity_obj, "similarity"), units(units_obj, "units"), model(model_obj, "model_of"),
        budget(budget_obj, "budget"), block_budget(block_budget_obj, "block_budget"), owner(owner_obj, "owner");
    require(!similarity->cuda && similarity->ndim == 2, "similarity: expected a CPU matrix");
    mudsc::ZipArgs a{};
    a.dtype = similarity->dtype;
    a.similarity = similarity->data;
    a.row_stride = similarity->strides[0];
    a.col_stride = similarity->strides[1];
    require(units->ndim == 1, "units: expected a vector");
    a.n = units->shape[0];
    a.units = vector_of<int64_t>(units, Dtype::i64, a.n, "units");
    for (int64_t i = 0; i < a.n; ++i) {
        require(a.units[i] >= 0 && a.units[i] < similarity->shape[0] && a.units[i] < similarity->shape[1],
                "units: out of range");
    }
    require(budget->ndim == 1, "budget: expected a vector");
    a.models = static_cast<int>(budget->shape[0]);
    a.model_of = vector_of<int32_t>(model, Dtype::i32, a.n, "model_of");
    for (int64_t i = 0; i < a.n; ++i) require(a.model_of[i] >= 0 && a.model_of[i] < a.models, "model_of: out of range");
    a.budget = vector_of<int64_t>(budget, Dtype::i64, a.models, "budget");
    a.block_budget = vector_of<int64_t>(block_budget, Dtype::i64, a.models, "block_budget");
    a.owner = vector_of<int64_t>(owner, Dtype::i64, a.n, "owner");
    a.merges = merges;
    a.attenuation = attenuation;
    a.threads = threads;
    require(merges >= 0 && merges < std::max<int64_t>(a.n, 1), "merges: out of range");
    double total = 0;
    int64_t made = 0;
    a.total = &total;
    a.made = &made;
    SignalPoll signals;
    a.poll = signals.poll();
    Status status;
    {
        const KernelTable& table = mudsc::kernels();
        py::gil_scoped_release release;
        status = table.zip(a);
    }
    if (status != Status::infeasible) check(status, "zip");
    return {total, made};
}

// ---- assign ----

// similarity is (n, n), (b, n, n) or (a, b, n, n); the rest are contiguous and hold one piece a matrix: start (2, n)
// duals, indices (n,), out: value, gap, u (n,), v (n,), each for all matrices before the next.
void assign(const py::object& similarity_obj, const std::optional<py::object>& start_obj, const py::object& indices_obj,
            const py::object& out_obj, int threads) {
    TensorArg similarity(similarity_obj, "similarity"), indices(indices_obj, "indices"), out(out_obj, "out");
    require(!similarity->cuda && similarity->ndim >= 2 && similarity->ndim <= 4,
            "similarity: expected 2 to 4 dimensions on the CPU");
    mudsc::AssignArgs a{};
    const int batch_dims = similarity->ndim - 2;
    a.dtype = similarity->dtype;
    a.similarity = similarity->data;
    a.shape[0] = a.shape[1] = 1;
    for (int d = 0; d < batch_dims; ++d) {
        a.shape[2 - batch_dims + d] = similarity->shape[d];
        a.strides[2 - batch_dims + d] = similarity->strides[d];
    }
    a.n = similarity->shape[batch_dims];
    require(a.n == similarity->shape[batch_dims + 1], "similarity: expected square matrices");
    a.row_stride = similarity->strides[batch_dims];
    a.col_stride = similarity->strides[batch_dims + 1];
    const int64_t problems = a.shape[0] * a.shape[1];
    std::optional<TensorArg> start;
    if (start_obj) {
        start.emplace(*start_obj, "duals");
        a.start = vector_of<double>(*start, Dtype::f64, problems * 2 * a.n, "duals");
    }
    a.indices = vector_of<int64_t>(indices, Dtype::i64, problems * a.n, "indices");
    a.value = vector_of<double>(out, Dtype::f64, problems * (2 + 2 * a.n), "out");
    a.gap = a.value + problems;
    a.u = a.gap + problems;
    a.v = a.u + problems * a.n;
    a.threads = threads;
    SignalPoll signals;
    a.poll = signals.poll();
    Status status;
    {
        const KernelTable& table = mudsc::kernels();
        py::gil_scoped_release release;
        status = table.assign(a);
    }
    check(status, "similarity");
}

// ---- ceilings, for benchmarks ----

// Floating-point operations a second that one thread reaches; 0 where the instruction set has no such instruction.
double peak_flops(bool bf16) {
    const KernelTable& table = mudsc::kernels();
    const auto run = bf16 ? table.peak_bf16 : table.peak_f32;
    py::gil_scoped_release release;
    double best = 0;
    for (int round = 0; round < 5; ++round) {
        float sink = 0;
        const auto start = std::chrono::steady_clock::now();
        const double flop = run(1000000, &sink);
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        best = std::max(best, flop / taken.count());
    }
    return best;
}

// ---- what this build is ----

py::dict build_info() {
    py::list built, usable;
    for (int i = 0; i < mudsc::isa_count(); ++i) {
        built.append(mudsc::isa_name(i));
        if (mudsc::isa_usable(i)) usable.append(mudsc::isa_name(i));
    }
    py::list archs;
#ifdef MUDSC_FAST_CUDA_ARCHS
    for (const py::handle& arch : py::str(MUDSC_FAST_CUDA_ARCHS).attr("split")(",")) archs.append(arch);
#endif
    py::dict info;
    info["version"] = MUDSC_FAST_VERSION;
    info["compiler"] = MUDSC_FAST_COMPILER;
    info["isas_built"] = built;
    info["isas_usable"] = usable;
    info["cuda_archs"] = archs;
    return info;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "Compiled kernels of mudsc_fast. Private: call the functions of the package instead.";
    m.attr("__version__") = MUDSC_FAST_VERSION;
    m.def("build_info", &build_info);
    m.def("isa", [] { return mudsc::kernels().isa; }, "The instruction set in use.");
    m.def(
        "use_isa", [](const std::optional<std::string>& name) { mudsc::use_isa(name ? name->c_str() : nullptr); },
        py::arg("name"), "Switches the instruction set; None chooses again.");
    m.def("peak_flops", &peak_flops, py::arg("bf16"));
    m.def("regroup", &regroup, py::arg("tensor"), py::arg("out"), py::arg("dim"), py::arg("ptr"), py::arg("members"),
          py::arg("scale"), py::arg("threads"));
    m.def("zip", &zip, py::arg("similarity"), py::arg("units"), py::arg("model_of"), py::arg("merges"),
          py::arg("attenuation"), py::arg("budget"), py::arg("block_budget"), py::arg("owner"), py::arg("threads"));
    m.def("assign", &assign, py::arg("similarity"), py::arg("start"), py::arg("indices"), py::arg("out"),
          py::arg("threads"));
#ifdef MUDSC_FAST_CUDA_ARCHS
    m.def("regroup_cuda", &regroup_cuda, py::arg("tensor"), py::arg("out"), py::arg("dim"), py::arg("ptr"),
          py::arg("members"), py::arg("scale"), py::arg("stream"));
#endif
}
