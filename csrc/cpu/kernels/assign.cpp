// Linear assignment of one matrix or of a batch: which layout is solved, on which threads, and whether the result is
// proven. The algorithm is in assign_solver.h.
#include <new>

#include "cpu/common.h"
#include "cpu/kernels.h"
#include "cpu/kernels/assign_solver.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

// The largest gap that counts as optimal, relative to the sum of the magnitudes taken; beside it, what rounding in
// float64 leaves where those cancel or vanish.
constexpr double kProof = 1e-6;
constexpr double kRounding = 1e-13;

// A result that starting duals led to must be as good as one without, or the problem is solved again from zero: duals
// of another scale lose digits, in the gap too.
constexpr double kProofOfWarmStart = 1e-12;
constexpr double kEpsilon = 0x1p-52;

// One thread's solver, and memory for what a layout needs copied.
template <class T>
class Worker {
  public:
    bool allocate(const AssignArgs& a, int threads) {
        const bool rows_in_place = a.col_stride == 1 || a.n == 1, columns_in_place = a.row_stride == 1;
        transposed_ = !rows_in_place && columns_in_place;
        packed_ = !rows_in_place && !columns_in_place;
        return solver_.allocate(static_cast<int>(a.n), threads) && (!packed_ || copy_.allocate(a.n * a.n)) &&
               (!transposed_ || row_of_.allocate(a.n));
    }

    Status solve(const AssignArgs& a, int64_t problem, Poll poll) {
        const T* s = static_cast<const T*>(a.similarity) + problem / a.shape[1] * a.strides[0] +
                     problem % a.shape[1] * a.strides[1];
        int64_t stride = transposed_ ? a.col_stride : a.row_stride;
        if (packed_) {
            for (int64_t i = 0; i < a.n; ++i) {
                for (int64_t j = 0; j < a.n; ++j) copy_[i * a.n + j] = s[i * a.row_stride + j * a.col_stride];
            }
            s = copy_.get();
            stride = a.n;
        }
        int64_t* indices = a.indices + problem * a.n;
        double *u = a.u + problem * a.n, *v = a.v + problem * a.n;
        const double* start = a.start == nullptr ? nullptr : a.start + (2 * problem + (transposed_ ? 0 : 1)) * a.n;
        if (transposed_) {
            double* swap = u;
            u = v;
            v = swap;
        }
        Outcome outcome;
        Status status = Status::not_converged;
        if (start != nullptr) {
            status = solver_.solve(s, stride, a.trusted, start, poll, indices, u, v, &outcome);
            const double gap = outcome.gap + kEpsilon * outcome.duals;
            if (status == Status::ok && !(gap <= kProofOfWarmStart * outcome.size)) status = Status::not_converged;
        }
        if (status == Status::not_converged) {
            status = solver_.solve(s, stride, a.trusted, nullptr, poll, indices, u, v, &outcome);
            const double allowed = kProof * outcome.size + kRounding * outcome.duals;
            const bool proven = outcome.gap <= allowed && outcome.size + outcome.duals < kFar;
            if (status == Status::ok && !proven) status = Status::not_converged;
        }
        if (status != Status::ok) return status;
        if (transposed_) {
            for (int64_t j = 0; j < a.n; ++j) row_of_[indices[j]] = j;
            for (int64_t i = 0; i < a.n; ++i) indices[i] = row_of_[i];
        }
        a.value[problem] = outcome.taken / static_cast<double>(a.n);
        a.gap[problem] = outcome.gap;
        return Status::ok;
    }

  private:
    Solver<T> solver_;
    bool transposed_ = false, packed_ = false;
    Buffer<T> copy_;
    Buffer<int64_t> row_of_;
};

template <class T>
Status run(const AssignArgs& a) {
    const int64_t problems = a.shape[0] * a.shape[1];
    if (problems == 1) {
        Worker<T> worker;
        if (!worker.allocate(a, a.threads)) return Status::no_memory;
        return worker.solve(a, 0, a.poll);
    }
    const int workers = static_cast<int>(max64(1, min64(a.threads, problems)));
    Worker<T>* worker = new (std::nothrow) Worker<T>[static_cast<size_t>(workers)];
    if (worker == nullptr) return Status::no_memory;
    int status = static_cast<int>(Status::ok);
    for (int w = 0; w < workers; ++w) {
        if (!worker[w].allocate(a, 1)) status = static_cast<int>(Status::no_memory);
    }
    if (status == static_cast<int>(Status::ok)) {
        SharedPoll shared(a.poll);
        parallel_each(workers, problems, shared, [&](int64_t problem, int w, Poll poll) {
            if (poll() || __atomic_load_n(&status, __ATOMIC_RELAXED) != static_cast<int>(Status::ok)) return;
            const Status mine = worker[w].solve(a, problem, poll);
            if (mine != Status::ok) __atomic_store_n(&status, static_cast<int>(mine), __ATOMIC_RELAXED);
        });
        if (shared.stopped()) status = static_cast<int>(Status::interrupted);
    }
    delete[] worker;
    return static_cast<Status>(status);
}

}  // namespace

Status assign(const AssignArgs& a);
Status assign(const AssignArgs& a) {
    if (a.n == 0 || a.shape[0] * a.shape[1] == 0) return Status::ok;
    if (a.n > INT32_MAX / 4) return Status::no_memory;
    switch (a.dtype) {
        case Dtype::f32: return run<float>(a);
        case Dtype::f64: return run<double>(a);
        default: return Status::unsupported;
    }
}

}  // namespace MUDSC_ISA
}  // namespace mudsc
