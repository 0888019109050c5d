// Zips on one, two and three threads: one matrix, and unions side by side. test_thread_sanitizer.py builds it with
// ThreadSanitizer. Ends with 0 where every number of threads made the same merges.
#include <stdio.h>

#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/unions.h"

namespace mudsc::MUDSC_ISA {
Status zip(const ZipArgs&);
}

namespace {

using namespace mudsc;

struct Problem {
    int64_t n;
    std::vector<float> similarity;
    std::vector<int64_t> units;
    std::vector<int32_t> model;

    // Blocks of `width` units, half of them of each model.
    Problem(int64_t count, int64_t width, unsigned seed) : n(count), similarity(static_cast<size_t>(n * n)) {
        std::mt19937 random(seed);
        std::uniform_real_distribution<float> entry(-1, 1);
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j <= i; ++j) at(i, j) = at(j, i) = entry(random);
            units.push_back(i);
            model.push_back(i % width >= width / 2);
        }
    }
    float& at(int64_t i, int64_t j) { return similarity[static_cast<size_t>(i * n + j)]; }

    ZipArgs args(int64_t width, int threads, Poll poll) const {
        ZipArgs a{};
        a.dtype = Dtype::f32;
        a.similarity = similarity.data();
        a.row_stride = n;
        a.col_stride = 1;
        a.n = width;
        a.models = 2;
        a.merges = width / 2;
        a.attenuation = 0.5;
        a.threads = threads;
        a.poll = poll;
        return a;
    }
};

bool stops(void* asked) { return ++*static_cast<int64_t*>(asked) > 3; }
bool goes_on(void* asked) { return ++*static_cast<int64_t*>(asked) < 0; }

// Each unit's owner; empty where the call was stopped.
std::vector<int64_t> zip_one(const Problem& problem, int threads, bool stop) {
    std::vector<int64_t> owner(problem.units.size()), budget(2, problem.n / 8), of_block = budget;
    double total = 0;
    int64_t made = 0, asked = 0;
    ZipArgs a = problem.args(problem.n, threads, {stop ? stops : goes_on, &asked});
    a.units = problem.units.data();
    a.model_of = problem.model.data();
    a.owner = owner.data();
    a.budget = budget.data();
    a.block_budget = of_block.data();
    a.total = &total;
    a.made = &made;
    return MUDSC_ISA::zip(a) == Status::ok ? owner : std::vector<int64_t>{};
}

std::vector<int64_t> zip_blocks(const Problem& problem, int64_t width, int threads, int64_t allowed, bool stop) {
    std::vector<int64_t> owner(problem.units.size()), budget(2, allowed);
    int64_t asked = 0;
    KernelTable table{};
    table.zip = MUDSC_ISA::zip;
    ZipUnions all{};
    all.each = problem.args(width, threads, {stop ? stops : goes_on, &asked});
    all.count = problem.n / width;
    all.units = problem.units.data();
    all.model_of = problem.model.data();
    all.owner = owner.data();
    all.budget = budget.data();
    all.block_budget = width / 4;
    return zip_unions(table, all) == Status::ok ? owner : std::vector<int64_t>{};
}

}  // namespace

int main() {
    int different = 0, calls = 0;
    const auto compare = [&](const auto& zipped) {
        const std::vector<int64_t> alone = zipped(1, false);
        for (int threads = 2; threads <= 3; ++threads) {
            different += alone.empty() || zipped(threads, false) != alone;
            zipped(threads, true);
            calls += 2;
        }
    };
    for (const int64_t n : {64, 1024, 2304}) {  // from 2048 units on, merges are shared by threads
        const Problem problem(n, n, static_cast<unsigned>(n));
        compare([&](int threads, bool stop) { return zip_one(problem, threads, stop); });
    }
    for (const int64_t width : {32, 128}) {
        const Problem problem(8 * width, width, static_cast<unsigned>(width));
        // A budget that all unions leave something of, and one that the first of them use up.
        for (const int64_t allowed : {2 * width, width / 2})
            compare([&](int threads, bool stop) { return zip_blocks(problem, width, threads, allowed, stop); });
    }
    printf("%d calls on several threads, %d with other merges than one thread makes\n", calls, different);
    return different;
}
