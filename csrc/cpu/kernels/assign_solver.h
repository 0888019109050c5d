// One assignment problem: maximise the sum of s[i, column of i].
//   1. Lists of every row's best columns at the starting prices.
//   2. Bidding: most rows find a column.
//   3. Shortest augmenting paths for the rest.
//   4. Row duals as exact maxima, and the duality gap that proves the result.
#pragma once

#include "cpu/kernels.h"
#include "cpu/kernels/assign_bidding.h"
#include "cpu/kernels/assign_paths.h"
#include "cpu/kernels/assign_small.h"
#include "cpu/short_buffer.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

#ifdef MUDSC_ASSIGN_STATS
static int kSmall = kSmallAssignment;
#else
constexpr int kSmall = kSmallAssignment;
#endif

template <class T>
class Solver {
  public:
    // Scratch for problems of size n, reused from one to the next.
    bool allocate(int n, int threads) {
        threads_ = threads;
        is_small_ = n <= kSmall;
        for (int pass = 0; pass < 2; ++pass) {
            Carver memory(pass == 0 ? nullptr : memory_.get());
            if (is_small_) {
                small_.carve(memory, n);
            } else {
                market_.carve(memory, n);
                paths_.carve(memory, n);
                memory.take(&displaced_, n);
            }
            if (pass == 0 && !memory_.allocate(memory.used())) return false;
        }
        return true;
    }

    // Solves s[i * stride + j]. trusted: all of it is finite. start: [n] column duals or null. Results: indices, u, v:
    // [n] and *outcome. not_converged: the duals left the range of float64, or those given are of no help.
    Status solve(const T* s, int64_t stride, bool trusted, const double* start, Poll poll, int64_t* indices, double* u,
                 double* v, Outcome* outcome) {
        if (is_small_) return small_.solve(s, stride, trusted, start, indices, u, v, outcome);
        const int n = market_.size();
        market_.begin(s, stride, threads_, poll, start);
        paths_.begin(n);
        Status status = market_.make_all_lists(start != nullptr, !trusted);
        if (status == Status::ok && start != nullptr) {
            const int without = market_.rows_without_a_column_of_their_own();
            if (!worth_starting_from(without, n)) return Status::not_converged;
        }
        if (status == Status::ok) status = bid(market_, displaced_);
        MUDSC_STAT(stat_free0 += market_.free_count);
        for (int f = 0; f < market_.free_count && status == Status::ok; ++f) {
            status = paths_.augment(market_, market_.free[f]);
        }
        if (status != Status::ok) return status;
        *outcome = Outcome{};
        for (int i = 0; i < n; ++i) {
            if (i % 256 == 255 && poll()) return Status::interrupted;
            const int j = market_.column_of(i);
            const double entry = market_.taken(i);
            indices[i] = j;
            v[i] = market_.price(i);
            u[i] = market_.row_dual(i);
            outcome->add(entry, u[i], v[i], market_.price(j));
        }
        return Status::ok;
    }

  private:
    int threads_ = 1;
    bool is_small_ = false;
    SmallSolver<T> small_;
    ShortBuffer<char, 6144> memory_;  // what 64 units need lies inside
    Market<T> market_;
    Paths<T> paths_;
    int32_t* displaced_ = nullptr;
};

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
