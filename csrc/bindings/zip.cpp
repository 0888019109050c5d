// zip.
#include "bindings/arguments.h"
#ifdef MUDSC_FAST_CUDA_ARCHS
#include "cuda/launch.h"
#endif

namespace mudsc::bindings {

namespace {

// Returns (total, merges made); the owner of each unit and the budgets left are written in place.
std::pair<double, int64_t> zip(const py::object& similarity_obj, const py::object& units_obj,
                               const py::object& model_obj, int64_t merges, double attenuation,
                               const py::object& budget_obj, const py::object& block_budget_obj,
                               const py::object& owner_obj, int threads, bool trusted) {
    TensorArg similarity(similarity_obj, "similarity"), units(units_obj, "units"), model(model_obj, "model_of"),
        budget(budget_obj, "budget"), block_budget(block_budget_obj, "block_budget"), owner(owner_obj, "owner");
    require(!similarity->cuda && similarity->ndim == 2, "similarity: expected a CPU matrix");
    ZipArgs a{};
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
    a.trusted = trusted;
    require(merges >= 0 && merges < std::max<int64_t>(a.n, 1), "merges: out of range");
    double total = 0;
    int64_t made = 0;
    a.total = &total;
    a.made = &made;
    SignalPoll signals;
    a.poll = signals.poll();
    const Status status = without_gil([&](const KernelTable& table) { return table.zip(a); });
    if (status != Status::infeasible) check(status, "zip");
    return {total, made};
}

#ifdef MUDSC_FAST_CUDA_ARCHS
// Scratch memory that zip_cuda may ask for, in bytes.
int64_t zip_scratch_cuda(int64_t n, int64_t problems, int64_t models, bool wide) {
    cuda::ZipCudaArgs a{};
    a.zip.dtype = wide ? Dtype::f64 : Dtype::f32;
    a.zip.n = n;
    a.zip.models = static_cast<int>(models);
    a.problems = problems;
    return cuda::zip_scratch_bytes(a);
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
    cuda::ZipCudaArgs a{};
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
    SignalPoll signals;
    a.zip.poll = signals.poll();
    launch([&] { return cuda::zip(a, similarity->device, reinterpret_cast<void*>(stream)); });
}
#endif

}  // namespace

void bind_zip(py::module_& m) {
    m.def("zip", &zip, py::arg("similarity"), py::arg("units"), py::arg("model_of"), py::arg("merges"),
          py::arg("attenuation"), py::arg("budget"), py::arg("block_budget"), py::arg("owner"), py::arg("threads"),
          py::arg("trusted") = false);
#ifdef MUDSC_FAST_CUDA_ARCHS
    m.def("zip_scratch_cuda", &zip_scratch_cuda, py::arg("n"), py::arg("problems"), py::arg("models"), py::arg("wide"));
    m.def("zip_cuda", &zip_cuda, py::arg("similarity"), py::arg("units"), py::arg("model_of"), py::arg("merges"),
          py::arg("attenuation"), py::arg("budget"), py::arg("block_budget"), py::arg("owner"), py::arg("total"),
          py::arg("made"), py::arg("status"), py::arg("scratch"), py::arg("stream"));
#endif
}

}  // namespace mudsc::bindings
