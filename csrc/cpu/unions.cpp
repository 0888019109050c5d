#include "cpu/unions.h"

#include <algorithm>

namespace mudsc {
namespace {

// Unions side by side, a thread each.
struct Round {
    const KernelTable& table;
    ZipUnions& all;
    const int64_t first, n, models;
    std::vector<int64_t> budget, left;  // [unions, models]
    std::vector<double> total;
    std::vector<int64_t> made;
    std::vector<Status> status;
    SharedPoll polls;

    Round(const KernelTable& kernel_table, ZipUnions& unions, int64_t from)
        : table(kernel_table),
          all(unions),
          first(from),
          n(unions.each.n),
          models(unions.each.models),
          polls(unions.each.poll) {
        const auto here = static_cast<size_t>(all.count - first);
        for (size_t k = 0; k < here; ++k) budget.insert(budget.end(), all.budget, all.budget + models);
        left.assign(here * static_cast<size_t>(models), all.block_budget);
        total.assign(here, 0);
        made.assign(here, 0);
        status.assign(here, Status::ok);
    }

    void zip(int64_t k, int threads, Poll poll) {
        ZipArgs a = all.each;
        a.units = all.units + (first + k) * n;
        a.model_of = all.model_of + (first + k) * n;
        a.owner = all.owner + (first + k) * n;
        a.budget = budget.data() + k * models;
        a.block_budget = left.data() + k * models;
        a.total = &total[static_cast<size_t>(k)];
        a.made = &made[static_cast<size_t>(k)];
        a.threads = threads;
        a.poll = poll;
        status[static_cast<size_t>(k)] = table.zip(a);
    }

    void run() {
        parallel_each(all.each.threads, all.count - first, polls, [&](int64_t k, int, Poll poll) { zip(k, 1, poll); });
    }

    // What a model may spend in one union.
    int64_t allowed(int64_t of_all) const { return std::min(of_all, all.block_budget); }

    // Every union had all of the budget that was left before the first of the round. That is right for one that would
    // not have come to the end of what those before it leave.
    bool holds(int64_t k, const std::vector<int64_t>& before) const {
        for (int64_t m = 0; m < models; ++m) {
            const int64_t given = allowed(before[static_cast<size_t>(m)]), truly = allowed(all.budget[m]);
            if (given != truly && all.block_budget - left[static_cast<size_t>(k * models + m)] >= truly) return false;
        }
        return true;
    }
};

}  // namespace

Status zip_unions(const KernelTable& table, ZipUnions& all) {
    all.total.clear();
    all.made.clear();
    while (static_cast<int64_t>(all.made.size()) < all.count) {
        const auto first = static_cast<int64_t>(all.made.size());
        Round round(table, all, first);
        const bool together = all.each.threads > 1 && all.count - first > 1;
        if (together) {
            round.run();
            if (round.polls.stopped())
                return Status::interrupted;  // even if no union that counts saw it: an exception is set
        } else {
            round.zip(0, all.each.threads, all.each.poll);
        }
        const std::vector<int64_t> before(all.budget, all.budget + all.each.models);
        for (int64_t k = 0; k < (together ? all.count - first : 1); ++k) {
            if (!round.holds(k, before)) break;
            const auto at = static_cast<size_t>(k);
            if (round.status[at] != Status::ok && round.status[at] != Status::infeasible) return round.status[at];
            for (int m = 0; m < all.each.models; ++m)
                all.budget[m] -=
                    all.block_budget - round.left[at * static_cast<size_t>(all.each.models) + static_cast<size_t>(m)];
            all.total.push_back(round.total[at]);
            all.made.push_back(round.made[at]);
            if (round.status[at] == Status::infeasible) return Status::infeasible;
        }
    }
    return Status::ok;
}

}  // namespace mudsc
