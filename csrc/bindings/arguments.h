// How the bindings take their arguments: every entry point reads its tensors, checks what guards memory, releases the
// GIL and calls one kernel; names, shapes and values are checked by the Python function above it.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <iterator>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "tensor_view.h"

namespace mudsc::bindings {

namespace py = pybind11;

// What is asked of torch at every call, without looking its names up again.
class Torch {
  public:
    static bool is_tensor(const py::handle& object) { return py::type::handle_of(object).ptr() == names().tensor; }
    static bool is_parameter(const py::handle& object) {
        return py::type::handle_of(object).ptr() == names().parameter;
    }
    static bool is_cpu(const py::handle& tensor) {
        return checked(PyObject_GetAttr(tensor.ptr(), names().is_cpu)).ptr() == Py_True;
    }
    static bool is_strided(const py::handle& tensor) {
        return checked(PyObject_GetAttr(tensor.ptr(), names().layout)).ptr() == names().strided;
    }
    // float64, float32, float16 or bfloat16: what comes through DLPack from every torch.
    static bool is_float(const py::handle& tensor) {
        const py::object dtype = checked(PyObject_GetAttr(tensor.ptr(), names().dtype));
        return std::find(std::begin(names().floats), std::end(names().floats), dtype.ptr()) != std::end(names().floats);
    }
    static bool is_int64(const py::handle& tensor) {
        return checked(PyObject_GetAttr(tensor.ptr(), names().dtype)).ptr() == names().int64;
    }
    static bool is_neg(const py::handle& tensor) {
        return checked(PyObject_CallOneArg(names().is_neg, tensor.ptr())).ptr() == Py_True;
    }
    static bool requires_grad(const py::handle& tensor) {
        return checked(PyObject_GetAttr(tensor.ptr(), names().requires_grad)).ptr() == Py_True;
    }
    static int64_t dim(const py::handle& tensor) {
        return checked(PyObject_GetAttr(tensor.ptr(), names().ndim)).cast<int64_t>();
    }
    static int threads() { return checked(PyObject_CallNoArgs(names().get_num_threads)).cast<int>(); }
    // A tensor described in place, which takes 0.17 us less than a capsule; false where this torch cannot, or not this
    // tensor. As in a call of torch's own, no other thread may give the tensor other memory before the call ends.
    static bool describe(const py::handle& tensor, dlpack::Tensor& out) {
        const dlpack::ExchangeApi* api = names().exchange;
        if (api != nullptr && api->describe(tensor.ptr(), &out) == 0) return true;
        PyErr_Clear();  // a capsule may do, and says in its own words why not
        return false;
    }
    static py::object to_dlpack(const py::handle& tensor) {
        return checked(PyObject_CallFunctionObjArgs(names().to_dlpack, tensor.ptr(), nullptr));
    }
    // Whether this torch makes a tensor of memory that it is given, which takes 0.3 us; its functions take 0.8.
    static bool makes_tensors() { return names().exchange != nullptr && names().exchange->make != nullptr; }
    static py::object make_tensor(dlpack::VersionedTensor* memory) {
        void* object = nullptr;
        if (names().exchange->make(memory, &object) != 0) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
    }
    static py::object empty_int64(int64_t n) {
        return py::module_::import("torch").attr("empty")(
            n, py::arg("dtype") = py::reinterpret_borrow<py::object>(names().int64), py::arg("device") = "cpu");
    }

  private:
    struct Names {
        PyObject* tensor = py::object(py::module_::import("torch").attr("Tensor")).release().ptr();
        PyObject* parameter = py::object(py::module_::import("torch.nn").attr("Parameter")).release().ptr();
        PyObject* to_dlpack = py::object(py::module_::import("torch.utils.dlpack").attr("to_dlpack")).release().ptr();
        PyObject* strided = py::object(py::module_::import("torch").attr("strided")).release().ptr();
        PyObject* floats[4] = {py::object(py::module_::import("torch").attr("float64")).release().ptr(),
                               py::object(py::module_::import("torch").attr("float32")).release().ptr(),
                               py::object(py::module_::import("torch").attr("float16")).release().ptr(),
                               py::object(py::module_::import("torch").attr("bfloat16")).release().ptr()};
        PyObject* int64 = py::object(py::module_::import("torch").attr("int64")).release().ptr();
        PyObject* dtype = PyUnicode_InternFromString("dtype");
        PyObject* layout = PyUnicode_InternFromString("layout");
        PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
        PyObject* is_neg = py::object(py::module_::import("torch").attr("Tensor").attr("is_neg")).release().ptr();
        PyObject* get_num_threads = py::object(py::module_::import("torch").attr("get_num_threads")).release().ptr();
        const dlpack::ExchangeApi* exchange = exchange_of(py::module_::import("torch").attr("Tensor"));
        PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
        PyObject* ndim = PyUnicode_InternFromString("ndim");
    };
    static const Names& names() {
        static const Names* found = new Names;  // never freed: the interpreter may be gone by then
        return *found;
    }
    static const dlpack::ExchangeApi* exchange_of(const py::object& type) {
        const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
        const char* name = "dlpack_exchange_api";
        if (PyCapsule_IsValid(capsule.ptr(), name) == 0) return nullptr;  // an older torch: none, or a number
        const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), name));
        return api->major == 1 && api->describe != nullptr ? api : nullptr;
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
    // Of an object that is known to be a plain tensor in the CPU's memory, and not to be read with the other sign.
    static TensorArg of_plain(const py::handle& tensor, const char* name) {
        dlpack::Tensor described;
        if (Torch::describe(tensor, described)) return TensorArg(tensor, described, name);
        return TensorArg(taken(Torch::to_dlpack(tensor)), name);
    }
    // Of an object as torch describes it.
    TensorArg(const py::handle& object, const dlpack::Tensor& described, const char* name)
        : described_(py::reinterpret_borrow<py::object>(object)), view_(described, name) {}
    TensorArg(TensorArg&& other) noexcept
        : managed_(other.managed_), described_(std::move(other.described_)), view_(other.view_) {
        other.managed_ = nullptr;
    }
    TensorArg(const TensorArg&) = delete;
    TensorArg& operator=(const TensorArg&) = delete;
    ~TensorArg() {
        if (managed_ != nullptr && managed_->deleter != nullptr) managed_->deleter(managed_);
    }
    const TensorView* operator->() const { return &view_; }
    const TensorView& operator*() const { return view_; }

  private:
    TensorArg(dlpack::ManagedTensor* managed, const char* name) : managed_(managed), view_(managed->tensor, name) {}

    static dlpack::ManagedTensor* exported(const py::handle& object, const char* name) {
        const bool quick = is_cpu_tensor(object);
        if (!quick && !py::hasattr(object, "__dlpack__")) {
            throw py::type_error(std::string(name) + ": expected a tensor, got " +
                                 std::string(py::str(py::type::handle_of(object).attr("__name__"))));
        }
        return taken(quick ? to_dlpack(object) : object.attr("__dlpack__")());
    }

    static dlpack::ManagedTensor* taken(const py::object& capsule) {
        auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
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

    dlpack::ManagedTensor* managed_ = nullptr;
    py::object described_;  // where nothing is managed: the tensor that view_ looks into
    TensorView view_;
};

// A new int64 vector for a result, to be filled by the kernel.
class NewVector {
  public:
    explicit NewVector(int64_t n) {
        if (!Torch::makes_tensors()) {
            tensor_ = Torch::empty_int64(n);
            data_ = TensorArg::of_plain(tensor_, "result")->as<int64_t>();
            return;
        }
        auto* head = static_cast<Head*>(std::malloc(sizeof(Head) + static_cast<size_t>(n) * sizeof(int64_t)));
        if (head == nullptr) throw std::bad_alloc();
        data_ = reinterpret_cast<int64_t*>(head + 1);
        head->shape = n;
        head->stride = 1;
        head->managed = {1,        0, nullptr,
                         &release, 0, {data_, dlpack::kCpu, 0, 1, dlpack::kInt, 64, 1, &head->shape, &head->stride, 0}};
        tensor_ = Torch::make_tensor(&head->managed);
    }
    int64_t* data() const { return data_; }
    const py::object& tensor() const { return tensor_; }

  private:
    // What the elements lie behind, in the same piece of memory.
    struct Head {
        dlpack::VersionedTensor managed;
        int64_t shape, stride;
    };
    static void release(dlpack::VersionedTensor* managed) { std::free(managed); }

    py::object tensor_;
    int64_t* data_ = nullptr;
};

// A tensor at first sight: what is asked of it before it is opened, without a capsule where torch can describe it.
class Glimpse {
  public:
    explicit Glimpse(const py::handle& object)
        : object_(object), tensor_(Torch::is_tensor(object)), described_(tensor_ && Torch::describe(object, shown_)) {}
    // In the CPU's memory, and not to be read with the other sign.
    bool plain() const { return tensor_ && on_cpu() && !Torch::is_neg(object_); }
    int64_t dim() const { return described_ ? shown_.ndim : Torch::dim(object_); }
    // Of a plain one.
    TensorArg open(const char* name) const {
        return described_ ? TensorArg(object_, shown_, name) : TensorArg::of_plain(object_, name);
    }

  private:
    bool on_cpu() const {
        if (!described_) return Torch::is_cpu(object_);
        return shown_.device_type == dlpack::kCpu || shown_.device_type == dlpack::kCudaHost;
    }
    py::handle object_;
    dlpack::Tensor shown_;
    bool tensor_, described_;
};

inline void require(bool condition, const char* message) {
    if (!condition) throw py::value_error(message);
}

inline void require_cpu(const TensorArg& t, Dtype dtype, int ndim, const char* name) {
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
    // What a call came to: once a signal's handler has raised, that, whatever else another thread found meanwhile.
    Status outcome(Status status) const { return raised_ ? Status::interrupted : status; }

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

inline void check(Status status, const char* op) {
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

#ifdef MUDSC_FAST_CUDA_ARCHS
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

// Calls a CUDA kernel's launcher without the GIL; what it says went wrong becomes an exception, and so does Ctrl-C.
template <typename Fn>
void launch(const Fn& fn) {
    std::string error;
    {
        py::gil_scoped_release release;
        error = fn();
    }
    if (error.empty()) return;
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();  // a SignalPoll has set it
    throw std::runtime_error(error);
}
#endif

// Calls a kernel of the instruction set in use without the GIL.
template <typename Fn>
Status without_gil(const Fn& fn) {
    const KernelTable& table = kernels();
    py::gil_scoped_release release;
    return fn(table);
}

// One file an op: each adds its functions to the module.
void bind_regroup(py::module_& m);
void bind_zip(py::module_& m);
void bind_assign(py::module_& m);
void bind_covariance(py::module_& m);
void bind_similarity(py::module_& m);
void bind_network(py::module_& m);

}  // namespace mudsc::bindings
