// covariance.
#include "bindings/covariance.h"

#include "cpu/common.h"

namespace mudsc::bindings {

void bind_covariance(py::module_& m) {
    m.attr("gram_panel") = kGramPanel;
    m.attr("gram_depth") = kGramDepth;
    m.def("covariance_sizes", &covariance_sizes, py::arg("width"), py::arg("models"), py::arg("cross"));
    m.def(
        "prefer_huge_pages",
        [](uintptr_t memory, size_t bytes) { prefer_huge_pages(reinterpret_cast<void*>(memory), bytes); },
        py::arg("memory"), py::arg("bytes"));
    py::class_<CovarianceBuffers>(m, "CovarianceBuffers")
        .def(py::init<int64_t, int64_t, bool, const py::object&, const py::object&, const py::object&,
                      const py::object&, const py::object&>(),
             py::arg("width"), py::arg("models"), py::arg("cross"), py::arg("gram"), py::arg("panels"),
             py::arg("vectors"), py::arg("raw"), py::arg("counts"))
        .def("update", &CovarianceBuffers::update, py::arg("features"), py::arg("dim"), py::arg("threads"))
        .def("update_plain", &CovarianceBuffers::update_plain, py::arg("features"), py::arg("dim"), py::arg("threads"))
        .def("counts", &CovarianceBuffers::counts)
        .def("flush", &CovarianceBuffers::flush, py::arg("threads"))
        .def("merge", &CovarianceBuffers::merge, py::arg("other"), py::arg("threads"))
        .def("rebase", &CovarianceBuffers::rebase, py::arg("shift"), py::arg("scale"), py::arg("threads"));
}

}  // namespace mudsc::bindings
