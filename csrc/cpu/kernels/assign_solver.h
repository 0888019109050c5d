// One assignment problem: maximise the sum of s[i, column of i].
//   1. Lists of every row's best columns at the starting prices.
//   2. Bidding: most rows find a column.
//   3. Shortest augmenting paths for the rest.
//   4. Row duals as exact maxima, and the duality gap that proves the result.
#pragma once

#include "cpu/kernels/assign_bidding.h"
#include "cpu/kernels/assign_paths.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

struct Outcome {
    double taken = 0;  // sum of the entries taken
    double size = 0;   // sum of their magnitudes
    double duals = 0;  // sum of the magnitudes of all duals
    double gap = 0;    // sum(u) + sum(v) - taken, added up row by row so that large duals do not hide it
};

template <class T>
class Solver {
  public:
    // Scratch for problems of size n, reused from one to the next.
    bool allocate(int n, int threads) {
        threads_ = threads;
        for (int pass = 0; pass < 2; ++pass) {
            Carver memory(pass == 0 ? nullptr : memory_.get());
            market_.carve(memory, n);
            paths_.carve(memory, n);
            memory.take(&displaced_, n);
            if (pass == 0 && !memory_.allocate(memory.used())) return false;
        }
        return true;
    }

    // Solves s[i * stride + j]. start: [n] column duals or null. Results: indices, u, v: [n] and *outcome.
    // not_converged: the duals left the range of float64.
    Status solve(const T* s, int64_t stride, const double* start, Poll poll, int64_t* indices, double* u, double* v,
                 Outcome* outcome) {
        const int n = market_.size();
        market_.begin(s, stride, threads_, poll, start);
        paths_.begin(n);
        Status status = market_.make_all_lists(start != nullptr);
        if (status == Status::ok) status = bid(market_, displaced_);
        MUDSC_STAT(stat_free0 += market_.free_count);
        for (int f = 0; f < market_.free_count && status == Status::ok; ++f) {
            status = paths_.augment(market_, market_.free[f]);
        }
        if (status != Status::ok) return status;
        *outcome = Outcome{};
        for (int i = 0; i < n; ++i) {
            const int j = market_.column_of(i);
            const double entry = market_.taken(i);
            indices[i] = j;
            v[i] = market_.price(i);
            u[i] = market_.row_dual(i);
            outcome->gap += u[i] - (entry - market_.price(j));
            outcome->taken += entry;
            outcome->size += fabs(entry);
            outcome->duals += fabs(u[i]) + fabs(v[i]);
        }
        return Status::ok;
    }

  private:
    int threads_ = 1;
    Buffer<char> memory_;
    Market<T> market_;
    Paths<T> paths_;
    int32_t* displaced_ = nullptr;
};

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
