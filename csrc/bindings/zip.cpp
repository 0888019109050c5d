// zip.
#include "bindings/arguments.h"
#include "cpu/unions.h"
#ifdef MUDSC_FAST_CUDA_ARCHS
#include "cuda/launch.h"
#endif

namespace mudsc::bindings {

namespace {

// What all unions of a zip have in common.
ZipArgs common(const TensorArg& similarity, int64_t n, int64_t models, int64_t merges, double attenuation,
               int threads) {
    require(!similarity->cuda && similarity->ndim == 2, "similarity: expected a CPU matrix");
    ZipArgs a{};
    a.dtype = similarity->dtype;
    a.similarity = similarity->data;
    a.row_stride = similarity->strides[0];
    a.col_stride = similarity->strides[1];
    a.n = n;
    a.models = static_cast<int>(models);
    a.merges = merges;
    a.attenuation = attenuation;
    a.threads = threads;
    require(merges >= 0 && merges < std::max<int64_t>(n, 1), "merges: out of range");
    return a;
}

void require_in_range(const TensorArg& similarity, const int64_t* units, const int32_t* model_of, int64_t count,
                      int64_t models) {
    const int64_t rows = std::min(similarity->shape[0], similarity->shape[1]);
    for (int64_t i = 0; i < count; ++i) {
        require(units[i] >= 0 && units[i] < rows, "units: out of range");
        require(model_of[i] >= 0 && model_of[i] < models, "model_of: out of range");
    }
}

// Returns (total, merges made); the owner of each unit and the budgets left are written in place.
std::pair<double, int64_t> zip(const py::object& similarity_obj, const py::object& units_obj,
                               const py::object& model_obj, int64_t merges, double attenuation,
                               const py::object& budget_obj, const py::object& block_budget_obj,
                               const py::object& owner_obj, int threads, bool trusted) {
    TensorArg similarity(similarity_obj, "similarity"), units(units_obj, "units"), model(model_obj, "model_of"),
        budget(budget_obj, "budget"), block_budget(block_budget_obj, "block_budget"), owner(owner_obj, "owner");
    require(units->ndim == 1, "units: expected a vector");
    require(budget->ndim == 1, "budget: expected a vector");
    ZipArgs a = common(similarity, units->shape[0], budget->shape[0], merges, attenuation, threads);
    a.units = vector_of<int64_t>(units, Dtype::i64, a.n, "units");
    a.model_of = vector_of<int32_t>(model, Dtype::i32, a.n, "model_of");
    require_in_range(similarity, a.units, a.model_of, a.n, a.models);
    a.budget = vector_of<int64_t>(budget, Dtype::i64, a.models, "budget");
    a.block_budget = vector_of<int64_t>(block_budget, Dtype::i64, a.models, "block_budget");
    a.owner = vector_of<int64_t>(owner, Dtype::i64, a.n, "owner");
    a.trusted = trusted;
    double total = 0;
    int64_t made = 0;
    a.total = &total;
    a.made = &made;
    SignalPoll signals;
    a.poll = signals.poll();
    const Status status = signals.outcome(without_gil([&](const KernelTable& table) { return table.zip(a); }));
    if (status != Status::infeasible) check(status, "similarity");
    return {total, made};
}

// units, model_of and owner are (unions, n). Returns (total, merges made) of each union up to the first that falls
// short; the owner of each unit and the budget left are written in place.
std::vector<std::pair<double, int64_t>> zip_all(const py::object& similarity_obj, const py::object& units_obj,
                                                const py::object& model_obj, int64_t merges, double attenuation,
                                                const py::object& budget_obj, int64_t block_budget,
                                                const py::object& owner_obj, int threads) {
    TensorArg similarity(similarity_obj, "similarity"), units(units_obj, "units"), model(model_obj, "model_of"),
        budget(budget_obj, "budget"), owner(owner_obj, "owner");
    require(units->ndim == 2, "units: expected one row a union");
    require(budget->ndim == 1, "budget: expected a vector");
    ZipUnions all{};
    all.each = common(similarity, units->shape[1], budget->shape[0], merges, attenuation, threads);
    all.count = units->shape[0];
    const int64_t rows = all.count * all.each.n;
    all.units = flat_of<int64_t>(units, Dtype::i64, rows, "units");
    all.model_of = flat_of<int32_t>(model, Dtype::i32, rows, "model_of");
    require_in_range(similarity, all.units, all.model_of, rows, all.each.models);
    all.owner = flat_of<int64_t>(owner, Dtype::i64, rows, "owner");
    all.budget = vector_of<int64_t>(budget, Dtype::i64, all.each.models, "budget");
    all.block_budget = block_budget;
    SignalPoll signals;
    all.each.poll = signals.poll();
    const Status status =
        signals.outcome(without_gil([&](const KernelTable& table) { return zip_unions(table, all); }));
    if (status != Status::infeasible) check(status, "similarity");
    std::vector<std::pair<double, int64_t>> found;
    for (size_t k = 0; k < all.made.size(); ++k) found.emplace_back(all.total[k], all.made[k]);
    return found;
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
    m.def("zip_unions", &zip_all, py::arg("similarity"), py::arg("units"), py::arg("model_of"), py::arg("merges"),
          py::arg("attenuation"), py::arg("budget"), py::arg("block_budget"), py::arg("owner"), py::arg("threads"));
#ifdef MUDSC_FAST_CUDA_ARCHS
    m.def("zip_scratch_cuda", &zip_scratch_cuda, py::arg("n"), py::arg("problems"), py::arg("models"), py::arg("wide"));
    m.def("zip_cuda", &zip_cuda, py::arg("similarity"), py::arg("units"), py::arg("model_of"), py::arg("merges"),
          py::arg("attenuation"), py::arg("budget"), py::arg("block_budget"), py::arg("owner"), py::arg("total"),
          py::arg("made"), py::arg("status"), py::arg("scratch"), py::arg("stream"));
#endif
}

}  // namespace mudsc::bindings
