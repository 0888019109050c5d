// regroup, and the segments that it works on.
#include "bindings/arguments.h"
#ifdef MUDSC_FAST_CUDA_ARCHS
#include "cuda/launch.h"
#endif

namespace mudsc::bindings {

namespace {

RegroupArgs regroup_args(const TensorView& in, const TensorView& out, int dim, int threads) {
    require(in.ndim == out.ndim && in.ndim > 0 && dim >= 0 && dim < in.ndim, "regroup: in, out and dim disagree");
    require(in.dtype == out.dtype && in.element_bytes == out.element_bytes, "regroup: in and out differ in dtype");
    for (int d = 0; d < in.ndim; ++d)
        require(d == dim || in.shape[d] == out.shape[d], "regroup: in and out differ in shape");
    RegroupArgs a{};
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
    RegroupArgs a = regroup_args(*in, *out, dim, threads);
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
    check(without_gil([&](const KernelTable& table) { return table.regroup(a); }), "regroup");
}

#ifdef MUDSC_FAST_CUDA_ARCHS
// The index vectors live on the device too and were made and checked there by the caller.
void regroup_cuda(const py::object& in_obj, const py::object& out_obj, int dim, const py::object& ptr_obj,
                  const py::object& members_obj, const std::optional<py::object>& scale_obj, bool single,
                  uintptr_t stream) {
    TensorArg in(in_obj, "tensor"), out(out_obj, "out"), ptr(ptr_obj, "ptr"), members(members_obj, "members");
    RegroupArgs a = regroup_args(*in, *out, dim, 0);
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
    launch([&] { return cuda::regroup(a, in->shape[dim], single, in->device, reinterpret_cast<void*>(stream)); });
}

#endif

}  // namespace

void bind_regroup(py::module_& m) {
    m.def("segments", &segments, py::arg("labels"), py::arg("ptr"), py::arg("members"));
    m.def("regroup", &regroup, py::arg("tensor"), py::arg("out"), py::arg("dim"), py::arg("ptr"), py::arg("members"),
          py::arg("scale"), py::arg("threads"));
#ifdef MUDSC_FAST_CUDA_ARCHS
    m.def("regroup_cuda", &regroup_cuda, py::arg("tensor"), py::arg("out"), py::arg("dim"), py::arg("ptr"),
          py::arg("members"), py::arg("scale"), py::arg("single"), py::arg("stream"));
#endif
}

}  // namespace mudsc::bindings
