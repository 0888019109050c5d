// The only file that includes pybind11. Every entry point reads its tensors, checks what guards memory, releases the
// GIL and calls one kernel; names, shapes and values are checked by the Python function above it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/term_table.h"
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

// What is asked of torch at every call, without looking its names up again.
class Torch {
  public:
    static bool is_tensor(const py::handle& object) { return py::type::handle_of(object).ptr() == names().tensor; }
    static bool is_cpu(const py::handle& tensor) {
        return checked(PyObject_GetAttr(tensor.ptr(), names().is_cpu)).ptr() == Py_True;
    }
    static bool is_neg(const py::handle& tensor) {
        return checked(PyObject_CallMethodObjArgs(tensor.ptr(), names().is_neg, nullptr)).ptr() == Py_True;
    }
    static py::object to_dlpack(const py::handle& tensor) {
        return checked(PyObject_CallFunctionObjArgs(names().to_dlpack, tensor.ptr(), nullptr));
    }

  private:
    struct Names {
        PyObject* tensor = py::object(py::module_::import("torch").attr("Tensor")).release().ptr();
        PyObject* to_dlpack = py::object(py::module_::import("torch.utils.dlpack").attr("to_dlpack")).release().ptr();
        PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
        PyObject* is_neg = PyUnicode_InternFromString("is_neg");
    };
    static const Names& names() {
        static const Names* found = new Names;  // never freed: the interpreter may be gone by then
        return *found;
    }
    static py::object checked(PyObject* result) {
        if (result == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(result);
    }
};

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
        const bool quick = is_cpu_tensor(object);
        if (!quick && !py::hasattr(object, "__dlpack__")) {
            throw py::type_error(std::string(name) + ": expected a tensor, got " +
                                 std::string(py::str(py::type::handle_of(object).attr("__name__"))));
        }
        py::object capsule = quick ? to_dlpack(object) : object.attr("__dlpack__")();
        auto* managed = static_cast<mudsc::dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
        if (managed == nullptr) throw py::error_already_set();
        PyCapsule_SetName(capsule.ptr(), "used_dltensor");
        return managed;
    }

    static bool is_cpu_tensor(const py::handle& object) { return Torch::is_tensor(object) && Torch::is_cpu(object); }

    // torch's own function is ten times as quick as the method, whose checks are about gradients and CUDA streams. It
    // drops the mark of a tensor whose elements are to be read with the other sign.
    static py::object to_dlpack(const py::handle& object) {
        return Torch::is_neg(object) ? Torch::to_dlpack(object.attr("resolve_neg")()) : Torch::to_dlpack(object);
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

// Labels in [0, size) as segments: members[ptr[j] .. ptr[j + 1]) are the positions labelled j, rising. Returns the
// length of the longest one, or -1 where a label is out of range.
int64_t segments(const py::object& labels_obj, const py::object& ptr_obj, const py::object& members_obj) {
    TensorArg labels(labels_obj, "labels"), ptr(ptr_obj, "ptr"), members(members_obj, "members");
    require(labels->ndim == 1 && ptr->ndim == 1 && ptr->shape[0] > 0, "segments: expected vectors");
    const int64_t n = labels->shape[0], size = ptr->shape[0] - 1;
    const int64_t* label = vector_of<int64_t>(labels, Dtype::i64, n, "labels");
    int64_t* start = vector_of<int64_t>(ptr, Dtype::i64, size + 1, "ptr");
    int64_t* member = vector_of<int64_t>(members, Dtype::i64, n, "members");
    std::fill(start, start + size + 1, 0);
    for (int64_t i = 0; i < n; ++i) {
        if (label[i] < 0 || label[i] >= size) return -1;
        ++start[label[i] + 1];
    }
    int64_t most = 0;
    for (int64_t j = 0; j < size; ++j) {
        most = std::max(most, start[j + 1]);
        start[j + 1] += start[j];
    }
    std::vector<int64_t> next(start, start + size);
    for (int64_t i = 0; i < n; ++i) member[next[static_cast<size_t>(label[i])]++] = i;
    return most;
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
                  const py::object& members_obj, const std::optional<py::object>& scale_obj, bool single,
                  uintptr_t stream) {
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
        error = mudsc::cuda::regroup(a, in->shape[dim], single, in->device, reinterpret_cast<void*>(stream));
    }
    if (!error.empty()) throw std::runtime_error(error);
}

// A contiguous CUDA tensor on the device of another, of a known number of elements, or an error.
template <typename T>
T* device_flat_of(const TensorArg& t, const TensorArg& beside, Dtype dtype, int64_t length, const char* name) {
    int64_t expected = 1;
    bool contiguous = t->cuda && t->device == beside->device && t->dtype == dtype && t->numel() == length;
    for (int d = t->ndim - 1; d >= 0; --d) {
        contiguous = contiguous && (t->shape[d] == 1 || t->strides[d] == expected);
        expected *= t->shape[d];
    }
    if (!contiguous) {
        throw py::value_error(std::string(name) + ": expected a contiguous tensor of " + std::to_string(length) +
                              " elements on the similarity's device");
    }
    return t->as<T>();
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

#ifdef MUDSC_FAST_CUDA_ARCHS
// Scratch memory that zip_cuda may ask for, in bytes.
int64_t zip_scratch_cuda(int64_t n, int64_t problems, int64_t models, bool wide) {
    mudsc::cuda::ZipCudaArgs a{};
    a.zip.dtype = wide ? Dtype::f64 : Dtype::f32;
    a.zip.n = n;
    a.zip.models = static_cast<int>(models);
    a.problems = problems;
    return mudsc::cuda::zip_scratch_bytes(a);
}

// units and model_of are (problems, n), budget and block_budget (problems, models), the results one piece a problem.
void zip_cuda(const py::object& similarity_obj, const py::object& units_obj, const py::object& model_obj,
              int64_t merges, double attenuation, const py::object& budget_obj, const py::object& block_budget_obj,
              const py::object& owner_obj, const py::object& total_obj, const py::object& made_obj,
              const py::object& status_obj, const py::object& scratch_obj, uintptr_t stream) {
    TensorArg similarity(similarity_obj, "similarity"), units(units_obj, "units"), model(model_obj, "model_of"),
        budget(budget_obj, "budget"), block_budget(block_budget_obj, "block_budget"), owner(owner_obj, "owner"),
        total(total_obj, "total"), made(made_obj, "made"), status(status_obj, "status"),
        scratch(scratch_obj, "scratch");
    require(similarity->cuda && similarity->ndim == 2, "similarity: expected a CUDA matrix");
    require(units->ndim == 2 && budget->ndim == 2, "units, budget: expected one row a problem");
    mudsc::cuda::ZipCudaArgs a{};
    a.problems = units->shape[0];
    a.zip.n = units->shape[1];
    a.zip.models = static_cast<int>(budget->shape[1]);
    a.zip.dtype = similarity->dtype;
    a.zip.similarity = similarity->data;
    a.zip.row_stride = similarity->strides[0];
    a.zip.col_stride = similarity->strides[1];
    const int64_t rows = a.problems * a.zip.n, budgets = a.problems * a.zip.models;
    a.zip.units = device_flat_of<int64_t>(units, similarity, Dtype::i64, rows, "units");
    a.zip.model_of = device_flat_of<int32_t>(model, similarity, Dtype::i32, rows, "model_of");
    a.zip.budget = device_flat_of<int64_t>(budget, similarity, Dtype::i64, budgets, "budget");
    a.zip.block_budget = device_flat_of<int64_t>(block_budget, similarity, Dtype::i64, budgets, "block_budget");
    a.zip.owner = device_flat_of<int64_t>(owner, similarity, Dtype::i64, rows, "owner");
    a.zip.total = device_flat_of<double>(total, similarity, Dtype::f64, a.problems, "total");
    a.zip.made = device_flat_of<int64_t>(made, similarity, Dtype::i64, a.problems, "made");
    a.status = device_flat_of<int32_t>(status, similarity, Dtype::i32, a.problems, "status");
    a.scratch_bytes = scratch->numel();
    a.scratch = device_flat_of<uint8_t>(scratch, similarity, Dtype::u8, a.scratch_bytes, "scratch");
    a.zip.merges = merges;
    a.zip.attenuation = attenuation;
    require(merges >= 0 && merges < std::max<int64_t>(a.zip.n, 1), "merges: out of range");
    std::string error;
    {
        py::gil_scoped_release release;
        error = mudsc::cuda::zip(a, similarity->device, reinterpret_cast<void*>(stream));
    }
    if (!error.empty()) throw std::runtime_error(error);
}
#endif

// ---- assign ----

// A batch of square matrices: its sizes and strides.
mudsc::AssignArgs assign_args(const TensorArg& similarity) {
    require(similarity->ndim >= 2 && similarity->ndim <= 4, "similarity: expected 2 to 4 dimensions");
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
    return a;
}

// similarity is (n, n), (b, n, n) or (a, b, n, n); the rest are contiguous and hold one piece a matrix: start (2, n)
// duals, indices (n,), out: value, gap, u (n,), v (n,), each for all matrices before the next.
void assign(const py::object& similarity_obj, const std::optional<py::object>& start_obj, const py::object& indices_obj,
            const py::object& out_obj, int threads) {
    TensorArg similarity(similarity_obj, "similarity"), indices(indices_obj, "indices"), out(out_obj, "out");
    require(!similarity->cuda, "similarity: expected a CPU tensor");
    mudsc::AssignArgs a = assign_args(similarity);
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

#ifdef MUDSC_FAST_CUDA_ARCHS
// As assign, with all tensors on one device; status: one number a matrix, 0 where the result is proven.
void assign_cuda(const py::object& similarity_obj, const std::optional<py::object>& start_obj,
                 const py::object& indices_obj, const py::object& out_obj, const py::object& status_obj,
                 uintptr_t stream) {
    TensorArg similarity(similarity_obj, "similarity"), indices(indices_obj, "indices"), out(out_obj, "out"),
        status(status_obj, "status");
    require(similarity->cuda, "similarity: expected a CUDA tensor");
    mudsc::AssignArgs a = assign_args(similarity);
    const int64_t problems = a.shape[0] * a.shape[1];
    std::optional<TensorArg> start;
    if (start_obj) {
        start.emplace(*start_obj, "duals");
        a.start = device_flat_of<double>(*start, similarity, Dtype::f64, problems * 2 * a.n, "duals");
    }
    a.indices = device_flat_of<int64_t>(indices, similarity, Dtype::i64, problems * a.n, "indices");
    a.value = device_flat_of<double>(out, similarity, Dtype::f64, problems * (2 + 2 * a.n), "out");
    a.gap = a.value + problems;
    a.u = a.gap + problems;
    a.v = a.u + problems * a.n;
    auto* found = device_flat_of<int32_t>(status, similarity, Dtype::i32, problems, "status");
    std::string error;
    {
        py::gil_scoped_release release;
        error = mudsc::cuda::assign(a, found, similarity->device, reinterpret_cast<void*>(stream));
    }
    if (!error.empty()) throw std::runtime_error(error);
}
#endif

// One small matrix as it is: indices, value, gap, u and v as bytes, in this order; or None when the call above has to
// be made, which has checks and errors for everything else. Most of the time of a small problem is Python's otherwise.
py::object assign_lone(const py::handle& similarity_obj) {
    if (!Torch::is_tensor(similarity_obj) || !Torch::is_cpu(similarity_obj)) return py::none();
    TensorArg similarity(similarity_obj, "similarity");
    const int64_t n = similarity->ndim == 2 ? similarity->shape[0] : 0;
    if (n < 1 || n > mudsc::kSmallAssignment || similarity->shape[1] != n) return py::none();
    if (similarity->dtype != Dtype::f32 && similarity->dtype != Dtype::f64) return py::none();
    const auto bytes = py::reinterpret_steal<py::object>(PyByteArray_FromStringAndSize(nullptr, (3 * n + 2) * 8));
    if (!bytes) throw py::error_already_set();
    char* packed = PyByteArray_AS_STRING(bytes.ptr());
    mudsc::AssignArgs a{};
    a.dtype = similarity->dtype;
    a.similarity = similarity->data;
    a.shape[0] = a.shape[1] = 1;
    a.n = n;
    a.row_stride = similarity->strides[0];
    a.col_stride = similarity->strides[1];
    a.indices = reinterpret_cast<int64_t*>(packed);
    a.value = reinterpret_cast<double*>(packed) + n;
    a.gap = a.value + 1;
    a.u = a.gap + 1;
    a.v = a.u + n;
    a.threads = 1;
    Status status;
    {
        const KernelTable& table = mudsc::kernels();
        py::gil_scoped_release release;
        status = table.assign(a);
    }
    return status == Status::ok ? bytes : py::none();
}

// The `room` best columns of some rows at prices v, and bounds on the others; maxima, where it is given, takes every
// row's largest reduced value.
void assign_tile(const py::object& tile_obj, int64_t first_row, const py::object& v_obj, int64_t room,
                 const py::object& columns_obj, const py::object& values_obj, const py::object& threshold_obj,
                 const std::optional<py::object>& maxima_obj, int threads) {
    TensorArg tile(tile_obj, "tile"), v(v_obj, "v"), columns(columns_obj, "columns"), values(values_obj, "values"),
        threshold(threshold_obj, "threshold");
    require(!tile->cuda && tile->ndim == 2 && (tile->shape[1] < 2 || tile->strides[1] == 1),
            "tile: expected a CPU matrix with contiguous rows");
    mudsc::AssignTileArgs a{};
    a.dtype = tile->dtype;
    a.tile = tile->data;
    a.rows = tile->shape[0];
    a.n = tile->shape[1];
    a.row_stride = tile->strides[0];
    a.first_row = first_row;
    a.v = vector_of<double>(v, Dtype::f64, a.n, "v");
    a.room = room;
    require(room >= 0 && room <= a.n, "room: out of range");
    a.columns = vector_of<int32_t>(columns, Dtype::i32, a.rows * room, "columns");
    a.values = vector_of<double>(values, Dtype::f64, a.rows * room, "values");
    a.threshold = vector_of<double>(threshold, Dtype::f64, room > 0 ? a.rows : 0, "threshold");
    std::optional<TensorArg> maxima;
    if (maxima_obj) {
        maxima.emplace(*maxima_obj, "maxima");
        a.maxima = vector_of<double>(*maxima, Dtype::f64, a.rows, "maxima");
    }
    a.threads = threads;
    SignalPoll signals;
    a.poll = signals.poll();
    Status status;
    {
        const KernelTable& table = mudsc::kernels();
        py::gil_scoped_release release;
        status = table.assign_tile(a);
    }
    check(status, "tile");
}

// Matches what the lists can tell; returns the number of rows without a column. v, column_of and wanted are written.
int64_t assign_lists(const py::object& ptr_obj, const py::object& columns_obj, const py::object& values_obj,
                     const py::object& keys_obj, const py::object& threshold_obj, const py::object& v_obj,
                     const py::object& column_of_obj, const py::object& wanted_obj) {
    TensorArg ptr(ptr_obj, "ptr"), columns(columns_obj, "columns"), values(values_obj, "values"),
        keys(keys_obj, "keys"), threshold(threshold_obj, "threshold"), v(v_obj, "v"),
        column_of(column_of_obj, "column_of"), wanted(wanted_obj, "wanted");
    mudsc::AssignListsArgs a{};
    require(v->ndim == 1, "v: expected a vector");
    a.n = v->shape[0];
    a.v = vector_of<double>(v, Dtype::f64, a.n, "v");
    a.ptr = vector_of<int64_t>(ptr, Dtype::i64, a.n + 1, "ptr");
    require(a.ptr[0] == 0, "ptr: must start at 0");
    for (int64_t i = 0; i < a.n; ++i) require(a.ptr[i] <= a.ptr[i + 1], "ptr: must not fall");
    const int64_t total = a.ptr[a.n];
    a.columns = vector_of<int32_t>(columns, Dtype::i32, total, "columns");
    for (int64_t k = 0; k < total; ++k) require(a.columns[k] >= 0 && a.columns[k] < a.n, "columns: out of range");
    a.values = vector_of<double>(values, Dtype::f64, total, "values");
    a.keys = vector_of<double>(keys, Dtype::f64, total, "keys");
    a.threshold = vector_of<double>(threshold, Dtype::f64, a.n, "threshold");
    a.column_of = vector_of<int64_t>(column_of, Dtype::i64, a.n, "column_of");
    for (int64_t i = 0; i < a.n; ++i) require(a.column_of[i] >= -1 && a.column_of[i] < a.n, "column_of: out of range");
    a.wanted = vector_of<uint8_t>(wanted, Dtype::u8, a.n, "wanted");
    int64_t free_rows = 0;
    a.free_rows = &free_rows;
    SignalPoll signals;
    a.poll = signals.poll();
    Status status;
    {
        const KernelTable& table = mudsc::kernels();
        py::gil_scoped_release release;
        status = table.assign_lists(a);
    }
    check(status, "lists");
    return free_rows;
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

// ---- covariance ----

// A contiguous CPU tensor of a known number of elements, whatever its shape.
template <typename T>
T* flat_of(const TensorArg& t, Dtype dtype, int64_t length, const char* name) {
    int64_t expected = 1;
    bool contiguous = !t->cuda && t->dtype == dtype && t->numel() == length;
    for (int d = t->ndim - 1; d >= 0; --d) {
        contiguous = contiguous && (t->shape[d] == 1 || t->strides[d] == expected);
        expected *= t->shape[d];
    }
    if (!contiguous) {
        throw py::value_error(std::string(name) + ": expected a contiguous CPU tensor of " + std::to_string(length) +
                              " elements");
    }
    return t->as<T>();
}

// (panels, blocks) of a covariance: how long its vectors (48 a panel) and its products (48 x 48 a block) are.
std::pair<int64_t, int64_t> covariance_sizes(int64_t width, int64_t models, bool cross) {
    require(width > 0 && models > 0 && models <= mudsc::kMaxModels, "covariance: width or models out of range");
    const int64_t p = mudsc::kGramPanel, rows = ((cross ? width : width * models) + p - 1) / p;
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
        const int64_t lanes = n_panels * mudsc::kGramPanel;
        state_.dtype = panels_->dtype;
        require(state_.dtype == Dtype::f32 || state_.dtype == Dtype::f64, "panels: expected float32 or float64");
        state_.width = width;
        state_.models = models;
        state_.cross = cross;
        state_.gram = flat_of<double>(gram_, Dtype::f64, n_blocks * mudsc::kGramPanel * mudsc::kGramPanel, "gram");
        state_.panels = flat_of<void>(panels_, state_.dtype, lanes * mudsc::kGramDepth, "panels");
        double* vectors_data = flat_of<double>(vectors_, Dtype::f64, 4 * lanes, "vectors");
        state_.shift = vectors_data;
        state_.scale = vectors_data + lanes;
        state_.sums = vectors_data + 2 * lanes;
        state_.squares = vectors_data + 3 * lanes;
        state_.raw = flat_of<uint8_t>(raw_, Dtype::u8, n_panels, "raw");
        state_.counts = flat_of<int64_t>(counts_, Dtype::i64, 2, "counts");
        require(state_.counts[1] >= 0 && state_.counts[1] < mudsc::kGramDepth && state_.counts[0] >= state_.counts[1],
                "counts: out of range");
    }

    // features: one tensor a model with `width` entries along dim; the other dims are samples, paired in row-major
    // order.
    void update(const std::vector<py::object>& features, int dim, int threads) {
        require(static_cast<int64_t>(features.size()) == state_.models, "features: expected one tensor a model");
        std::vector<TensorArg> tensors;
        std::vector<mudsc::CovarianceSource> sources(features.size());
        tensors.reserve(features.size());
        int64_t samples = 0;
        for (size_t m = 0; m < features.size(); ++m) {
            const TensorArg& x = tensors.emplace_back(features[m], "features");
            require(!x->cuda && dim >= 0 && dim < x->ndim && x->shape[dim] == state_.width,
                    "features: wrong device or width");
            mudsc::CovarianceSource& source = sources[m];
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
            return table.covariance_update(mudsc::CovarianceUpdateArgs{&state_, sources.data(), samples, threads});
        });
    }
    void flush(int threads) {
        run([&](const KernelTable& table) { return table.covariance_flush(state_, threads); });
    }
    void merge(const CovarianceBuffers& other, int threads) {
        const mudsc::CovarianceState& o = other.state_;
        require(
            o.width == state_.width && o.models == state_.models && o.cross == state_.cross && o.dtype == state_.dtype,
            "other: expected a covariance of the same kind");
        require(o.counts[1] == 0 && state_.counts[1] == 0, "merge: samples are pending");
        run([&](const KernelTable& table) {
            return table.covariance_merge(mudsc::CovarianceMergeArgs{&state_, &o, threads});
        });
    }
    void rebase(const py::object& shift_obj, const py::object& scale_obj, int threads) {
        TensorArg shift(shift_obj, "shift"), scale(scale_obj, "scale");
        const int64_t lanes = raw_->shape[0] * mudsc::kGramPanel;
        const double *to = vector_of<double>(shift, Dtype::f64, lanes, "shift"),
                     *by = vector_of<double>(scale, Dtype::f64, lanes, "scale");
        require(state_.counts[1] == 0, "rebase: samples are pending");
        run([&](const KernelTable& table) { return table.covariance_rebase(state_, to, by, threads); });
    }
    const mudsc::CovarianceState& state() const { return state_; }

  private:
    template <typename Fn>
    static void run(const Fn& fn) {
        Status status;
        {
            const KernelTable& table = mudsc::kernels();
            py::gil_scoped_release release;
            status = fn(table);
        }
        check(status, "covariance");
    }

    TensorArg gram_, panels_, vectors_, raw_, counts_;
    mudsc::CovarianceState state_{};
};

// ---- similarity ----

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
    mudsc::SimilarityTerm term() const {
        mudsc::SimilarityTerm result{};
        result.dtype = tensor_->dtype;
        result.data = tensor_->data;
        table_.fill(result);
        return result;
    }
    int64_t units() const { return table_.units(); }

  private:
    static mudsc::TermTable make(const TensorView& tensor, const TermTuple& tuple) {
        std::vector<char> used(static_cast<size_t>(tensor.ndim), 0);
        const auto use = [&](int d) {
            require(d >= 0 && d < tensor.ndim && used[static_cast<size_t>(d)] == 0,
                    "terms: dims out of range or named twice");
            used[static_cast<size_t>(d)] = 1;
        };
        for (int d : std::get<1>(tuple)) use(d);
        std::vector<mudsc::LabelledAxes> labelled;
        std::vector<TensorArg> keep;
        keep.reserve(2 * std::get<2>(tuple).size());
        for (const auto& [dims, labels_obj, size, scale_obj] : std::get<2>(tuple)) {
            int64_t length = 1;
            for (int d : dims) {
                use(d);
                length *= tensor.shape[d];
            }
            const TensorArg& labels = keep.emplace_back(labels_obj, "labels");
            mudsc::LabelledAxes axes{dims, vector_of<int64_t>(labels, Dtype::i64, length, "labels"), size, nullptr};
            for (int64_t i = 0; i < length; ++i)
                require(axes.labels[i] >= 0 && axes.labels[i] < size, "labels: out of range");
            if (scale_obj)
                axes.scale = vector_of<double>(keep.emplace_back(*scale_obj, "scale"), Dtype::f64, size, "scale");
            labelled.push_back(axes);
        }
        return mudsc::TermTable(tensor.shape, tensor.strides, tensor.ndim, std::get<1>(tuple), labelled);
    }

    TensorArg tensor_;
    mudsc::TermTable table_;
};

// Fills out; returns the index of a term that is not finite (-1: the activation sums are not), or None.
std::optional<int64_t> similarity(const std::vector<std::vector<TermTuple>>& term_tuples, int64_t n, int64_t models,
                                  bool cross, double balance, const CovarianceBuffers* activation,
                                  const py::object& out_obj, int threads) {
    TensorArg out(out_obj, "out");
    require(n > 0 && models > 1 && models <= mudsc::kMaxModels, "similarity: n or models out of range");
    std::vector<TermArg> keep;
    std::vector<mudsc::SimilarityTerm> terms;
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
    mudsc::SimilarityArgs a{};
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
    a.threads = threads;
    SignalPoll signals;
    a.poll = signals.poll();
    Status status;
    {
        const KernelTable& table = mudsc::kernels();
        py::gil_scoped_release release;
        status = table.similarity(a);
    }
    if (status == Status::not_finite) return bad;
    check(status, "similarity");
    return std::nullopt;
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
    m.def("segments", &segments, py::arg("labels"), py::arg("ptr"), py::arg("members"));
    m.def("regroup", &regroup, py::arg("tensor"), py::arg("out"), py::arg("dim"), py::arg("ptr"), py::arg("members"),
          py::arg("scale"), py::arg("threads"));
    m.def("zip", &zip, py::arg("similarity"), py::arg("units"), py::arg("model_of"), py::arg("merges"),
          py::arg("attenuation"), py::arg("budget"), py::arg("block_budget"), py::arg("owner"), py::arg("threads"));
    m.def("assign", &assign, py::arg("similarity"), py::arg("start"), py::arg("indices"), py::arg("out"),
          py::arg("threads"));
    m.def("assign_lone", &assign_lone, py::arg("similarity"));
    m.def("assign_tile", &assign_tile, py::arg("tile"), py::arg("first_row"), py::arg("v"), py::arg("room"),
          py::arg("columns"), py::arg("values"), py::arg("threshold"), py::arg("maxima"), py::arg("threads"));
    m.def("assign_lists", &assign_lists, py::arg("ptr"), py::arg("columns"), py::arg("values"), py::arg("keys"),
          py::arg("threshold"), py::arg("v"), py::arg("column_of"), py::arg("wanted"));
    m.attr("gram_panel") = mudsc::kGramPanel;
    m.attr("gram_depth") = mudsc::kGramDepth;
    m.def("covariance_sizes", &covariance_sizes, py::arg("width"), py::arg("models"), py::arg("cross"));
    py::class_<CovarianceBuffers>(m, "CovarianceBuffers")
        .def(py::init<int64_t, int64_t, bool, const py::object&, const py::object&, const py::object&,
                      const py::object&, const py::object&>(),
             py::arg("width"), py::arg("models"), py::arg("cross"), py::arg("gram"), py::arg("panels"),
             py::arg("vectors"), py::arg("raw"), py::arg("counts"))
        .def("update", &CovarianceBuffers::update, py::arg("features"), py::arg("dim"), py::arg("threads"))
        .def("flush", &CovarianceBuffers::flush, py::arg("threads"))
        .def("merge", &CovarianceBuffers::merge, py::arg("other"), py::arg("threads"))
        .def("rebase", &CovarianceBuffers::rebase, py::arg("shift"), py::arg("scale"), py::arg("threads"));
    m.def("similarity", &similarity, py::arg("terms"), py::arg("n"), py::arg("models"), py::arg("cross"),
          py::arg("balance"), py::arg("activation"), py::arg("out"), py::arg("threads"));
#ifdef MUDSC_FAST_CUDA_ARCHS
    m.def("regroup_cuda", &regroup_cuda, py::arg("tensor"), py::arg("out"), py::arg("dim"), py::arg("ptr"),
          py::arg("members"), py::arg("scale"), py::arg("single"), py::arg("stream"));
    m.def("zip_scratch_cuda", &zip_scratch_cuda, py::arg("n"), py::arg("problems"), py::arg("models"), py::arg("wide"));
    m.def("zip_cuda", &zip_cuda, py::arg("similarity"), py::arg("units"), py::arg("model_of"), py::arg("merges"),
          py::arg("attenuation"), py::arg("budget"), py::arg("block_budget"), py::arg("owner"), py::arg("total"),
          py::arg("made"), py::arg("status"), py::arg("scratch"), py::arg("stream"));
    m.def("assign_cuda", &assign_cuda, py::arg("similarity"), py::arg("start"), py::arg("indices"), py::arg("out"),
          py::arg("status"), py::arg("stream"));
#endif
}
