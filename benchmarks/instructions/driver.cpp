// Runs one kernel on a fixed problem, for counting its instructions: driver KERNEL. Only what happens inside `measured`
// is counted (callgrind's --toggle-collect).
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <functional>
#include <string>
#include <vector>

#include "cpu/kernels.h"

using namespace mudsc;

// Kept out of line and by this name: callgrind switches counting on when it is entered.
extern "C" __attribute__((noinline)) Status measured(const std::function<Status()>& kernel) {
    const Status status = kernel();
    asm volatile("" ::: "memory");
    return status;
}

namespace {

uint64_t state = 42;

// Uniform in [-1, 1), the same on every machine.
float random_unit() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<int64_t>(state >> 40) - (1 << 23)) / (1 << 23);
}

std::vector<float> matrix(int64_t n, bool symmetric, bool related) {
    std::vector<float> s(static_cast<size_t>(n * n));
    for (float& x : s) x = 0.2f * random_unit();
    if (related) {
        for (int64_t i = 0; i < n; ++i) s[static_cast<size_t>(i * n + (i * 7 + 3) % n)] += 0.8f;
    }
    if (symmetric) {
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < i; ++j) s[static_cast<size_t>(i * n + j)] = s[static_cast<size_t>(j * n + i)];
        }
    }
    return s;
}

Status run_zip(int64_t n) {
    const std::vector<float> s = matrix(n, true, false);
    std::vector<int64_t> units(n), budget(2, n / 4), block_budget(2, n / 4), owner(n);
    std::vector<int32_t> model(n);
    for (int64_t i = 0; i < n; ++i) {
        units[i] = i;
        model[i] = i * 2 / n;
    }
    double total = 0;
    int64_t made = 0;
    ZipArgs a{};
    a.dtype = Dtype::f32;
    a.similarity = s.data();
    a.row_stride = n;
    a.col_stride = 1;
    a.units = units.data();
    a.model_of = model.data();
    a.n = n;
    a.models = 2;
    a.merges = n / 2;
    a.attenuation = 0.5;
    a.budget = budget.data();
    a.block_budget = block_budget.data();
    a.owner = owner.data();
    a.total = &total;
    a.made = &made;
    a.threads = 1;
    return measured([&] { return kernels().zip(a); });
}

Status run_regroup(int64_t n, bool gather) {
    const std::vector<float> x = matrix(n, false, false);
    const int64_t size = gather ? n : n / 2;
    std::vector<float> out(static_cast<size_t>(n * size));
    std::vector<int64_t> ptr(size + 1), members(n);
    std::vector<double> scale(size, 0.5);
    for (int64_t j = 0; j <= size; ++j) ptr[j] = j * (n / size);
    for (int64_t i = 0; i < n; ++i) members[i] = (i * 7 + 3) % n;
    const int64_t shape[2] = {n, size}, in_strides[2] = {n, 1}, out_strides[2] = {size, 1};
    RegroupArgs a{};
    a.dtype = Dtype::f32;
    a.element_bytes = 4;
    a.ndim = 2;
    a.dim = 1;
    a.shape = shape;
    a.in = x.data();
    a.in_strides = in_strides;
    a.out = out.data();
    a.out_strides = out_strides;
    a.ptr = ptr.data();
    a.members = members.data();
    a.scale = gather ? nullptr : scale.data();
    a.threads = 1;
    return measured([&] { return kernels().regroup(a); });
}

Status run_assign(int64_t problems, int64_t n, bool related) {
    std::vector<float> s;
    for (int64_t p = 0; p < problems; ++p) {
        const std::vector<float> one = matrix(n, false, related);
        s.insert(s.end(), one.begin(), one.end());
    }
    std::vector<int64_t> indices(problems * n);
    std::vector<double> value(problems), gap(problems), u(problems * n), v(problems * n);
    AssignArgs a{};
    a.dtype = Dtype::f32;
    a.similarity = s.data();
    a.shape[0] = 1;
    a.shape[1] = problems;
    a.strides[0] = 0;
    a.strides[1] = n * n;
    a.n = n;
    a.row_stride = n;
    a.col_stride = 1;
    a.indices = indices.data();
    a.value = value.data();
    a.gap = gap.data();
    a.u = u.data();
    a.v = v.data();
    a.threads = 1;
    return measured([&] { return kernels().assign(a); });
}

}  // namespace

int main(int argc, char** argv) {
    const std::string what = argc == 2 ? argv[1] : "";
    use_isa("avx2");
    Status status = Status::unsupported;
    if (what == "zip") status = run_zip(512);
    if (what == "regroup_gather") status = run_regroup(1024, true);
    if (what == "regroup_mean") status = run_regroup(1024, false);
    if (what == "assign_unrelated") status = run_assign(1, 1500, false);
    if (what == "assign_related") status = run_assign(1, 1500, true);
    if (what == "assign_batch") status = run_assign(64, 64, false);
    if (status != Status::ok) fprintf(stderr, "%s: failed\n", what.c_str());
    return status == Status::ok ? 0 : 1;
}
