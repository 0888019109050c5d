// The module itself: what this build is, which instruction set it uses, and the ceilings that benchmarks measure.
#include <atomic>
#include <thread>

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

// Seconds in which a cache line goes from one core to another and back, the least of many times 20; 0 where there is
// one core. Takes about 50 ms at most.
double round_trip() {
    if (std::thread::hardware_concurrency() < 2) return 0;
    py::gil_scoped_release release;
    constexpr int most = 20000, some = 20;
    alignas(64) std::atomic<int> turn{0};  // odd: the other thread's; negative: it is over
    std::thread other([&turn] {
        for (int seen = 0; seen >= 0;) {
            seen = turn.load(std::memory_order_acquire);
            if (seen > 0 && seen % 2 == 1) turn.store(seen + 1, std::memory_order_release);
        }
    });
    double least = 1, all = 0;
    for (int trips = 0; trips < most && all < 0.05;) {
        const auto start = std::chrono::steady_clock::now();
        for (const int end = trips + some; trips < end; ++trips) {
            turn.store(2 * trips + 1, std::memory_order_release);
            while (turn.load(std::memory_order_acquire) != 2 * trips + 2) {
            }
        }
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        least = std::min(least, taken.count() / some);
        all += taken.count();
    }
    turn.store(-1, std::memory_order_release);
    other.join();
    return least;
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
    m.def("round_trip", &round_trip);
    bind_regroup(m);
    bind_zip(m);
    bind_assign(m);
    bind_covariance(m);
    bind_similarity(m);
    bind_network(m);
}
