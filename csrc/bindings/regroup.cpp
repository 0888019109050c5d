// regroup, and the segments that it works on.
#include "bindings/arguments.h"
#include "cpu/short_buffer.h"
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

// Labels in [0, size) as segments: member[start[j] .. start[j + 1]) are the positions labelled j, rising. Returns the
// length of the longest one, or -1 where a label is out of range.
int64_t fill_segments(const int64_t* label, int64_t n, int64_t size, int64_t* start, int64_t* member) {
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
    for (int64_t i = 0; i < n; ++i) member[start[label[i]]++] = i;
    std::copy_backward(start, start + size, start + size + 1);  // each has become the next one's
    start[0] = 0;
    return most;
}

int64_t segments(const py::object& labels_obj, const py::object& ptr_obj, const py::object& members_obj) {
    TensorArg labels(labels_obj, "labels"), ptr(ptr_obj, "ptr"), members(members_obj, "members");
    require(labels->ndim == 1 && ptr->ndim == 1 && ptr->shape[0] > 0, "segments: expected vectors");
    const int64_t n = labels->shape[0], size = ptr->shape[0] - 1;
    return fill_segments(vector_of<int64_t>(labels, Dtype::i64, n, "labels"), n, size,
                         vector_of<int64_t>(ptr, Dtype::i64, size + 1, "ptr"),
                         vector_of<int64_t>(members, Dtype::i64, n, "members"));
}

// First and last byte that a view touches.
std::pair<const char*, const char*> span_of(const TensorView& t) {
    const char *first = t.as<char>(), *last = first + t.element_bytes - 1;
    for (int d = 0; d < t.ndim; ++d) {
        const int64_t reach = t.strides[d] * (t.shape[d] - 1) * t.element_bytes;
        (reach < 0 ? first : last) += reach;
    }
    return {first, last};
}

// Whether `out` can take the result as it is: every element at an address of its own, none of them shared with `in`.
bool fits_out(const TensorView& in, const TensorView& out, int dim, int64_t size) {
    if (out.ndim != in.ndim || out.dtype != in.dtype) return false;
    std::pair<int64_t, int64_t> steps[kMaxDims];  // (stride, length), rising
    int count = 0;
    for (int d = 0; d < out.ndim; ++d) {
        if (out.shape[d] != (d == dim ? size : in.shape[d]) || out.shape[d] == 0 || in.shape[d] == 0) return false;
        if (out.shape[d] == 1) continue;
        int at = count++;
        for (; at > 0 && steps[at - 1].first > out.strides[d]; --at) steps[at] = steps[at - 1];
        steps[at] = {out.strides[d], out.shape[d]};
    }
    int64_t reach = 0;
    for (int d = 0; d < count; ++d) {
        const auto [stride, length] = steps[d];
        if (stride <= reach) return false;
        reach += stride * (length - 1);
    }
    const auto [out_first, out_last] = span_of(out);
    const auto [in_first, in_last] = span_of(in);
    return out_last < in_first || in_last < out_first;
}

// An int, and not one of another type that can be read as one.
bool whole(const py::handle& object, int64_t* value) {
    if (!PyLong_CheckExact(object.ptr())) return false;
    int overflow = 0;
    *value = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
    return overflow == 0;
}

// The usual call in one step: plain CPU tensors of a type that can be summed. False, and nothing written, for anything
// else, mistakes included: the public function then looks at each argument and says what is wrong.
bool regroup_plain(const py::handle& in_obj, const py::handle& labels_obj, const py::handle& dim_obj,
                   const py::handle& size_obj, const py::handle& scale_obj, const py::handle& out_obj) {
    int64_t dim = 0, size = 0;
    if (!whole(dim_obj, &dim) || !whole(size_obj, &size) || size < 0) return false;
    const bool scaled = !scale_obj.is_none();
    const Glimpse in_seen(in_obj), labels_seen(labels_obj), out_seen(out_obj), scale_seen(scale_obj);
    if (!in_seen.plain() || !labels_seen.plain() || !out_seen.plain() || Torch::requires_grad(out_obj)) return false;
    if (scaled && !scale_seen.plain()) return false;
    if (in_seen.dim() > kMaxDims || out_seen.dim() > kMaxDims) return false;
    const TensorArg in = in_seen.open("tensor"), labels = labels_seen.open("labels"), out = out_seen.open("out");
    const bool summable =
        in->dtype == Dtype::f32 || in->dtype == Dtype::bf16 || in->dtype == Dtype::f16 || in->dtype == Dtype::f64;
    if (!summable || dim < -in->ndim || dim >= in->ndim) return false;
    const int axis = static_cast<int>(dim < 0 ? dim + in->ndim : dim);
    const int64_t n = in->shape[axis];
    if (labels->dtype != Dtype::i64 || labels->ndim != 1 || labels->shape[0] != n ||
        (n > 1 && labels->strides[0] != 1) || !fits_out(*in, *out, axis, size)) {
        return false;
    }
    const ShortBuffer<double> scale(scaled ? size : 0);
    const ShortBuffer<int64_t> start(size + 1), member(n);
    if (!scale || !start || !member) throw std::bad_alloc();
    if (scaled) {
        const TensorArg given = scale_seen.open("scale");
        if (given->ndim != 1 || given->shape[0] != size) return false;
        if (given->dtype != Dtype::f32 && given->dtype != Dtype::f64) return false;
        for (int64_t j = 0; j < size; ++j) {
            const int64_t at = j * given->strides[0];
            scale[j] = given->dtype == Dtype::f64 ? given->as<double>()[at] : given->as<float>()[at];
        }
    }
    if (fill_segments(labels->as<int64_t>(), n, size, start.get(), member.get()) < 0) return false;
    RegroupArgs a = regroup_args(*in, *out, axis, Torch::threads());
    a.ptr = start.get();
    a.members = member.get();
    a.scale = scaled ? scale.get() : nullptr;
    check(without_gil([&](const KernelTable& table) { return table.regroup(a); }), "regroup");
    return true;
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
    m.def("regroup_plain", &regroup_plain, py::arg("tensor"), py::arg("labels"), py::arg("dim"), py::arg("size"),
          py::arg("scale"), py::arg("out"));
    m.def("regroup", &regroup, py::arg("tensor"), py::arg("out"), py::arg("dim"), py::arg("ptr"), py::arg("members"),
          py::arg("scale"), py::arg("threads"));
#ifdef MUDSC_FAST_CUDA_ARCHS
    m.def("regroup_cuda", &regroup_cuda, py::arg("tensor"), py::arg("out"), py::arg("dim"), py::arg("ptr"),
          py::arg("members"), py::arg("scale"), py::arg("single"), py::arg("stream"));
#endif
}

}  // namespace mudsc::bindings
