// Many small assignments: one warp a problem, lane l looks after columns l, l + 32, ... Bids place most rows, shortest
// augmenting paths the rest (Jonker and Volgenant, 1987), all prices in float64; exact row duals and the gap that
// proves the result come last. Semantics of csrc/cpu/kernels/assign.cpp; among equal optima it may choose another.
//
// Everything that lanes tell each other goes through shuffles, or through shared memory between two __syncwarp().
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/run.h"
#include "cuda/shared.h"

namespace mudsc {
namespace cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kLanes = 32;
constexpr int kMost = static_cast<int>(kSmallAssign);
constexpr int kNone = 2 * kMost;
constexpr int kBidRounds = 2;
constexpr int kBidsARow = 8;  // bids stop there: equal entries could go round for ever

// As on the CPU (csrc/cpu/kernels/assign.cpp).
constexpr double kProof = 1e-6;
constexpr double kRounding = 1e-13;
constexpr double kProofOfWarmStart = 1e-12;
constexpr double kEpsilon = 2.220446049250313e-16;
constexpr double kFar = 1.7976931348623157e308;

template <typename T>
struct Params {
    const T* similarity;
    int64_t problems, inner, strides[2];  // problem q is at q / inner * strides[0] + q % inner * strides[1]
    int n;
    int64_t row_stride, col_stride;
    const double* start;
    int64_t* indices;
    double *value, *gap, *u, *v;
    int32_t* status;
};

struct Outcome {
    double taken = 0, size = 0, duals = 0, gap = 0;
};

// The largest of the lanes' keys. Among equal keys free columns come first, then lower ones: `rank` is the column, plus
// kMost where it is taken, and kNone when nothing is above -inf.
struct Best {
    double key;
    int rank;
    __device__ int column() const { return rank % kMost; }
    __device__ bool found() const { return rank < kNone; }
};
__device__ bool better(const Best& a, const Best& b) { return a.key > b.key || (a.key == b.key && a.rank < b.rank); }

__device__ Best best_of_warp(Best mine) {
    for (int by = kLanes / 2; by > 0; by /= 2) {
        Best other;
        other.key = __shfl_xor_sync(kAll, mine.key, by);
        other.rank = __shfl_xor_sync(kAll, mine.rank, by);
        if (better(other, mine)) mine = other;
    }
    return mine;
}

__device__ double largest_of_warp(double mine) {
    for (int by = kLanes / 2; by > 0; by /= 2) {
        const double other = __shfl_xor_sync(kAll, mine, by);
        mine = other > mine ? other : mine;
    }
    return mine;
}

struct Shared {
    double price[kMost];     // v, [column]
    double distance[kMost];  // [column] of the path search; a lane touches its own columns alone
    int before[kMost];       // [column] the row from which the path reaches it
    int row_of[kMost];       // [column] -1: free
    int column_of[kMost];    // [row]
    int queue[kMost];        // rows without a column
    bool settled[kMost];     // [column] in this path search; a lane touches its own columns alone
};

template <typename T>
class Solver {
  public:
    __device__ explicit Solver(const Params<T>& params) : p(params), shared(static_shared<Shared>()) {
        lane = static_cast<int>(threadIdx.x);
        n = p.n;
    }

    __device__ void run(int64_t problem) {
        s = p.similarity + problem / p.inner * p.strides[0] + problem % p.inner * p.strides[1];
        int status = kAssignNotConverged;
        Outcome outcome;
        if (!finite()) {
            status = kAssignNotFinite;
        } else {
            if (p.start != nullptr && solve(p.start + (2 * problem + 1) * n, problem, &outcome)) {
                const double gap = outcome.gap + kEpsilon * outcome.duals;
                if (gap <= kProofOfWarmStart * outcome.size) status = kAssignOk;
            }
            if (status != kAssignOk && solve(nullptr, problem, &outcome)) {
                const double tolerated = kProof * outcome.size + kRounding * outcome.duals;
                if (outcome.gap <= tolerated && outcome.size + outcome.duals < kFar) status = kAssignOk;
            }
        }
        if (lane != 0) return;
        p.value[problem] = outcome.taken / n;
        p.gap[problem] = outcome.gap;
        p.status[problem] = status;
    }

  private:
    __device__ double entry(int i, int j) const { return static_cast<double>(s[i * p.row_stride + j * p.col_stride]); }

    __device__ int rank(int j) const { return shared.row_of[j] >= 0 ? j + kMost : j; }

    __device__ bool finite() const {
        bool all = true;
        for (int i = 0; i < n; ++i) {
            for (int j = lane; j < n; j += kLanes) {
                const T x = s[i * p.row_stride + j * p.col_stride];
                all = all && (x < 0 ? -x : x) < static_cast<T>(INFINITY);
            }
        }
        return __all_sync(kAll, all);
    }

    // False when prices leave the range of float64.
    __device__ bool solve(const double* start, int64_t problem, Outcome* outcome) {
        __syncwarp();
        for (int j = lane; j < n; j += kLanes) {
            shared.price[j] = start != nullptr ? start[j] : 0.0;
            shared.row_of[j] = -1;
            shared.column_of[j] = -1;
            shared.queue[j] = j;
        }
        __syncwarp();
        int waiting = n;
        for (int round = 0; round < kBidRounds && waiting > 0; ++round) waiting = bid(waiting);
        for (int f = 0; f < waiting; ++f) {
            if (!augment(shared.queue[f])) return false;
        }
        return prove(problem, outcome);
    }

    // Each row that waits takes its best column and raises the price until the second best is as good; whoever had the
    // column bids next. Returns how many rows wait afterwards.
    __device__ int bid(int waiting) {
        int bids = kBidsARow * n, left = 0, next = 0;
        int i = -1;
        while (i >= 0 || next < waiting) {
            if (i < 0) i = shared.queue[next++];
            Best mine{-INFINITY, kNone};
            double second = -INFINITY;
            for (int j = lane; j < n; j += kLanes) {
                const Best candidate{entry(i, j) - shared.price[j], rank(j)};
                if (candidate.key > -INFINITY && better(candidate, mine)) {
                    second = mine.key;
                    mine = candidate;
                } else if (candidate.key > second) {
                    second = candidate.key;
                }
            }
            const Best top = best_of_warp(mine);
            if (mine.rank != top.rank && mine.key > second) second = mine.key;
            second = largest_of_warp(second);
            const int column = top.column();
            const bool raises = top.key > second && second > -INFINITY;
            int loser = top.found() ? shared.row_of[column] : i;
            if (loser >= 0 && !raises) loser = i;  // nothing to gain: wait for the paths
            __syncwarp();
            if (lane == 0) {
                if (loser != i) {
                    if (raises) shared.price[column] += top.key - second;
                    if (loser >= 0) shared.column_of[loser] = -1;
                    shared.row_of[column] = i;
                    shared.column_of[i] = column;
                }
                // Never ahead of `next`: a row is put back only after one was taken out.
                if (loser >= 0 && (loser == i || bids == 0)) shared.queue[left] = loser;
            }
            __syncwarp();
            if (loser >= 0 && (loser == i || bids == 0)) {
                ++left;
                i = -1;
            } else {
                i = loser;
            }
            if (bids > 0) --bids;
        }
        return left;
    }

    // The shortest path from a row without a column to a column without a row, and the prices that keep all rows
    // content.
    __device__ bool augment(int row) {
        for (int j = lane; j < n; j += kLanes) {
            shared.distance[j] = shared.price[j] - entry(row, j);
            shared.before[j] = row;
            shared.settled[j] = false;
        }
        double reached;
        int sink;
        for (;;) {
            Best nearest{-INFINITY, kNone};
            for (int j = lane; j < n; j += kLanes) {
                const Best candidate{-shared.distance[j], rank(j)};
                if (!shared.settled[j] && candidate.key > -INFINITY && better(candidate, nearest)) nearest = candidate;
            }
            nearest = best_of_warp(nearest);
            if (!nearest.found()) return false;
            sink = nearest.column();
            reached = -nearest.key;
            const int i = shared.row_of[sink];
            if (i < 0) break;
            if (sink % kLanes == lane) shared.settled[sink] = true;
            const double base = shared.price[sink] - entry(i, sink) - reached;
            for (int j = lane; j < n; j += kLanes) {
                const double length = shared.price[j] - entry(i, j) - base;
                if (!shared.settled[j] && length < shared.distance[j]) {
                    shared.distance[j] = length;
                    shared.before[j] = i;
                }
            }
        }
        __syncwarp();
        for (int j = lane; j < n; j += kLanes) {
            if (shared.settled[j]) shared.price[j] += reached - shared.distance[j];
        }
        if (lane == 0) {
            for (int j = sink, i = -1; i != row;) {
                i = shared.before[j];
                shared.row_of[j] = i;
                const int onward = shared.column_of[i];
                shared.column_of[i] = j;
                j = onward;
            }
        }
        __syncwarp();
        return true;
    }

    // Row duals as exact maxima; the gap is added up row by row, so that large duals do not hide it.
    __device__ bool prove(int64_t problem, Outcome* outcome) {
        Outcome sum;
        for (int i = 0; i < n; ++i) {
            double dual = -INFINITY;
            for (int j = lane; j < n; j += kLanes) {
                const double key = entry(i, j) - shared.price[j];
                dual = key > dual ? key : dual;
            }
            dual = largest_of_warp(dual);
            const int j = shared.column_of[i];
            const double taken = entry(i, j), price = shared.price[j];
            sum.gap += dual - (taken - price);
            sum.taken += taken;
            sum.size += fabs(taken);
            sum.duals += fabs(dual) + fabs(price);
            if (lane == i % kLanes) {
                p.indices[problem * n + i] = j;
                p.u[problem * n + i] = dual;
            }
        }
        for (int j = lane; j < n; j += kLanes) p.v[problem * n + j] = shared.price[j];
        *outcome = sum;
        return sum.gap < INFINITY;
    }

    const Params<T>& p;
    Shared& shared;
    int lane, n;
    const T* s = nullptr;
};

template <typename T>
__global__ void __launch_bounds__(kLanes) assign_kernel(const __grid_constant__ Params<T> params) {
    Solver<T> solver(params);
    for (int64_t problem = blockIdx.x; problem < params.problems; problem += gridDim.x) solver.run(problem);
}

template <typename T>
std::string run(const AssignArgs& a, int32_t* status, const OnDevice& device, void* stream) {
    Params<T> p{};
    p.similarity = static_cast<const T*>(a.similarity);
    p.problems = a.shape[0] * a.shape[1];
    p.inner = a.shape[1];
    p.strides[0] = a.strides[0];
    p.strides[1] = a.strides[1];
    p.n = static_cast<int>(a.n);
    p.row_stride = a.row_stride;
    p.col_stride = a.col_stride;
    p.start = a.start;
    p.indices = a.indices;
    p.value = a.value;
    p.gap = a.gap;
    p.u = a.u;
    p.v = a.v;
    p.status = status;
    const int64_t resident = static_cast<int64_t>(device.multiprocessors()) * 32;
    return launch("assign_kernel", assign_kernel<T>, Shape{min_of(p.problems, resident), kLanes}, stream, p);
}

}  // namespace

std::string assign(const AssignArgs& a, int32_t* status, int device, void* stream) {
    if (a.n == 0 || a.shape[0] * a.shape[1] == 0) return {};
    if (a.n > kSmallAssign) return "assign_kernel: expected at most 256 rows, got " + std::to_string(a.n);
    const OnDevice on(device);
    if (!on.error().empty()) return "assign_kernel: " + on.error();
    switch (a.dtype) {
        case Dtype::f64: return run<double>(a, status, on, stream);
        case Dtype::f32: return run<float>(a, status, on, stream);
        default: return "assign_kernel: unsupported dtype";
    }
}

}  // namespace cuda
}  // namespace mudsc
