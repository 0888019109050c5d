// The module itself: what this build is, which instruction set it uses, and the ceilings that benchmarks measure.
#include "bindings/arguments.h"

namespace mudsc::bindings {

namespace {

// Floating-point operations a second that one thread reaches; 0 where the instruction set has no such instruction.
double peak_flops(bool bf16) {
    const KernelTable& table = kernels();
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

py::dict build_info() {
    py::list built, usable;
    for (int i = 0; i < isa_count(); ++i) {
        built.append(isa_name(i));
        if (isa_usable(i)) usable.append(isa_name(i));
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

}  // namespace mudsc::bindings

PYBIND11_MODULE(_core, m) {
    using namespace mudsc::bindings;
    m.doc() = "Compiled kernels of mudsc_fast. Private: call the functions of the package instead.";
    m.attr("__version__") = MUDSC_FAST_VERSION;
    m.def("build_info", &build_info);
    m.def("isa", [] { return mudsc::kernels().isa; }, "The instruction set in use.");
    m.def(
        "use_isa", [](const std::optional<std::string>& name) { mudsc::use_isa(name ? name->c_str() : nullptr); },
        py::arg("name"), "Switches the instruction set; None chooses again.");
    m.def("peak_flops", &peak_flops, py::arg("bf16"));
    bind_regroup(m);
    bind_zip(m);
    bind_assign(m);
    bind_covariance(m);
    bind_similarity(m);
    bind_network(m);
}
