// assign, its quick form for one small matrix, and the two parts of the tiled form.
#include "bindings/arguments.h"
#ifdef MUDSC_FAST_CUDA_ARCHS
#include "cuda/launch.h"
#endif

namespace mudsc::bindings {

namespace {

// A batch of square matrices: its sizes and strides.
AssignArgs assign_args(const TensorArg& similarity) {
    require(similarity->ndim >= 2 && similarity->ndim <= 4, "similarity: expected 2 to 4 dimensions");
    AssignArgs a{};
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
            const py::object& out_obj, int threads, bool trusted) {
    TensorArg similarity(similarity_obj, "similarity"), indices(indices_obj, "indices"), out(out_obj, "out");
    require(!similarity->cuda, "similarity: expected a CPU tensor");
    AssignArgs a = assign_args(similarity);
    a.trusted = trusted;
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
    const Status status = without_gil([&](const KernelTable& table) { return table.assign(a); });
    check(signals.outcome(status), "similarity");
}

#ifdef MUDSC_FAST_CUDA_ARCHS
// As assign, with all tensors on one device; status: one number a matrix, 0 where the result is proven.
void assign_cuda(const py::object& similarity_obj, const std::optional<py::object>& start_obj,
                 const py::object& indices_obj, const py::object& out_obj, const py::object& status_obj,
                 uintptr_t stream) {
    TensorArg similarity(similarity_obj, "similarity"), indices(indices_obj, "indices"), out(out_obj, "out"),
        status(status_obj, "status");
    require(similarity->cuda, "similarity: expected a CUDA tensor");
    AssignArgs a = assign_args(similarity);
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
    launch([&] { return cuda::assign(a, found, similarity->device, reinterpret_cast<void*>(stream)); });
}
#endif

// Up to this many units a solve is over before another thread would get the interpreter, which takes 0.1 us to hand on.
constexpr int kKeepsInterpreter = 64;

// One small matrix as it is: an instance of `type` with its indices, a tensor, and as _packed value, gap, u and v as
// bytes, in this order. None when the call above has to be made, which has checks and errors for everything else.
py::object solve_lone(const py::handle& similarity_obj, PyTypeObject* type) {
    const Glimpse seen(similarity_obj);
    if (!seen.plain() || seen.dim() != 2) return py::none();
    const TensorArg similarity = seen.open("similarity");
    const int64_t n = similarity->shape[0];
    if (n < 1 || n > kSmallAssignment || similarity->shape[1] != n) return py::none();
    if (similarity->dtype != Dtype::f32 && similarity->dtype != Dtype::f64) return py::none();
    const NewVector indices(n);
    const auto packed = py::reinterpret_steal<py::object>(PyByteArray_FromStringAndSize(nullptr, (2 * n + 2) * 8));
    if (!packed) throw py::error_already_set();
    AssignArgs a{};
    a.dtype = similarity->dtype;
    a.similarity = similarity->data;
    a.shape[0] = a.shape[1] = 1;
    a.n = n;
    a.row_stride = similarity->strides[0];
    a.col_stride = similarity->strides[1];
    a.indices = indices.data();
    a.value = reinterpret_cast<double*>(PyByteArray_AS_STRING(packed.ptr()));
    a.gap = a.value + 1;
    a.u = a.gap + 1;
    a.v = a.u + n;
    a.threads = 1;
    const auto solve = [&](const KernelTable& table) { return table.assign(a); };
    if ((n <= kKeepsInterpreter ? solve(kernels()) : without_gil(solve)) != Status::ok) return py::none();
    static PyObject* const indices_name = PyUnicode_InternFromString("indices");
    static PyObject* const packed_name = PyUnicode_InternFromString("_packed");
    auto found = py::reinterpret_steal<py::object>(type->tp_new(type, py::tuple().ptr(), nullptr));
    if (!found || PyObject_GenericSetAttr(found.ptr(), indices_name, indices.tensor().ptr()) != 0 ||
        PyObject_GenericSetAttr(found.ptr(), packed_name, packed.ptr()) != 0) {
        throw py::error_already_set();
    }
    return found;
}

// Called by Python without pybind11, which takes 0.1 us of the microsecond that a call costs beside its solve.
PyObject* assign_lone(PyObject*, PyObject* const* arguments, Py_ssize_t count) noexcept {
    if (count != 2 || PyType_Check(arguments[1]) == 0) {
        PyErr_SetString(PyExc_TypeError, "assign_lone: expected a similarity and a type");
        return nullptr;
    }
    try {
        return solve_lone(arguments[0], reinterpret_cast<PyTypeObject*>(arguments[1])).release().ptr();
    } catch (py::error_already_set& error) {
        if (error.matches(PyExc_Exception)) Py_RETURN_NONE;
        error.restore();  // Ctrl-C
        return nullptr;
    } catch (...) {  // as above: the usual call meets it again and says what it is
        Py_RETURN_NONE;
    }
}

PyMethodDef lone_methods[] = {{"assign_lone", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&assign_lone)),
                               METH_FASTCALL, "assign_lone(similarity: object, made: type, /) -> object"},
                              {nullptr, nullptr, 0, nullptr}};

// The `room` best columns of some rows at prices v, and bounds on the others; maxima, where it is given, takes every
// row's largest reduced value.
void assign_tile(const py::object& tile_obj, int64_t first_row, const py::object& v_obj, int64_t room,
                 const py::object& columns_obj, const py::object& values_obj, const py::object& threshold_obj,
                 const std::optional<py::object>& maxima_obj, int threads) {
    TensorArg tile(tile_obj, "tile"), v(v_obj, "v"), columns(columns_obj, "columns"), values(values_obj, "values"),
        threshold(threshold_obj, "threshold");
    require(!tile->cuda && tile->ndim == 2 && (tile->shape[1] < 2 || tile->strides[1] == 1),
            "tile: expected a CPU matrix with contiguous rows");
    AssignTileArgs a{};
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
    const Status status = without_gil([&](const KernelTable& table) { return table.assign_tile(a); });
    check(signals.outcome(status), "tile");
}

// Matches what the lists can tell; returns the number of rows without a column. v, column_of and wanted are written.
int64_t assign_lists(const py::object& ptr_obj, const py::object& columns_obj, const py::object& values_obj,
                     const py::object& keys_obj, const py::object& threshold_obj, const py::object& v_obj,
                     const py::object& column_of_obj, const py::object& wanted_obj) {
    TensorArg ptr(ptr_obj, "ptr"), columns(columns_obj, "columns"), values(values_obj, "values"),
        keys(keys_obj, "keys"), threshold(threshold_obj, "threshold"), v(v_obj, "v"),
        column_of(column_of_obj, "column_of"), wanted(wanted_obj, "wanted");
    AssignListsArgs a{};
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
    const Status status = without_gil([&](const KernelTable& table) { return table.assign_lists(a); });
    check(signals.outcome(status), "lists");
    return free_rows;
}

}  // namespace

void bind_assign(py::module_& m) {
    m.def("assign", &assign, py::arg("similarity"), py::arg("start"), py::arg("indices"), py::arg("out"),
          py::arg("threads"), py::arg("trusted") = false);
    if (PyModule_AddFunctions(m.ptr(), lone_methods) != 0) throw py::error_already_set();
    m.def("assign_tile", &assign_tile, py::arg("tile"), py::arg("first_row"), py::arg("v"), py::arg("room"),
          py::arg("columns"), py::arg("values"), py::arg("threshold"), py::arg("maxima"), py::arg("threads"));
    m.def("assign_lists", &assign_lists, py::arg("ptr"), py::arg("columns"), py::arg("values"), py::arg("keys"),
          py::arg("threshold"), py::arg("v"), py::arg("column_of"), py::arg("wanted"));
#ifdef MUDSC_FAST_CUDA_ARCHS
    m.def("assign_cuda", &assign_cuda, py::arg("similarity"), py::arg("start"), py::arg("indices"), py::arg("out"),
          py::arg("status"), py::arg("stream"));
#endif
}

}  // namespace mudsc::bindings
