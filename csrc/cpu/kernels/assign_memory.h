// What the solvers of one assignment problem share: scratch memory cut from one block, and what a solution is judged
// by.
#pragma once

#include <math.h>
#include <stdint.h>

#include "cpu/common.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

#ifdef MUDSC_ASSIGN_STATS
static int64_t stat_steps, stat_rebuilds, stat_dense, stat_paths, stat_pops, stat_entries, stat_free0, stat_duals;
#define MUDSC_STAT(x) (x)
static int tune_passes = 3, tune_budget8 = 32, tune_least = 0, tune_room = 0, tune_wide = 0, tune_first = 0;
static double tune_a = 0, tune_b = 0, tune_c = 0, tune_d = 0;
#else
#define MUDSC_STAT(x) ((void)0)
#endif

constexpr double kFar = INFINITY;

// Whether prices from elsewhere are worth going on with: after one reading, as many rows want a column that others want
// too. Prices of zero leave about 0.37 n such rows; those of a similar problem about 0.25 n, and those of one that has
// changed altogether more than half, and then cost twice the time of a start from zero.
inline bool worth_starting_from(int free_rows, int n) { return free_rows <= n / 2; }

// Cuts pieces from one block of memory; with a null block it only counts.
class Carver {
  public:
    explicit Carver(char* base) : base_(base) {}
    template <class U>
    void take(U** pointer, int64_t count) {
        if (base_ != nullptr) *pointer = reinterpret_cast<U*>(base_ + used_);
        used_ += (count * static_cast<int64_t>(sizeof(U)) + kCacheLine - 1) / kCacheLine * kCacheLine;
    }
    int64_t used() const { return used_; }

  private:
    char* base_;
    int64_t used_ = 0;
};

struct Outcome {
    double taken = 0;  // sum of the entries taken
    double size = 0;   // sum of their magnitudes
    double duals = 0;  // sum of the magnitudes of all duals
    double gap = 0;    // sum(u) + sum(v) - taken, added up row by row so that large duals do not hide it

    void add(double entry, double u, double v, double v_of_taken) {
        gap += u - (entry - v_of_taken);
        taken += entry;
        size += fabs(entry);
        duals += fabs(u) + fabs(v);
    }
};

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
