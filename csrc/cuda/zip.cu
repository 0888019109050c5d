// Greedy zip in one persistent launch. Each block of a team owns the rows of every blocks-th chunk of 32: it keeps
// their best partners and writes their entries. A step is one barrier of the team:
//   publish the best pair among the rows owned -> barrier -> all read all and agree on the pair (i, j) -> each updates
//   row i and column i at the columns it owns, and searches again those of its rows that lost their partner.
// Row i's own maximum is spread over all blocks; its parts are published beside the pairs and meet at the next barrier.
//
// A large problem is one team, a cooperative grid. Many small ones are teams of one block each, side by side. A launch
// makes some steps and leaves the rest to the next, so that none is long and the caller can stop between two.
// Ties, budgets and results are those of csrc/cpu/kernels/zip.cpp, bit for bit (docs/method.md rules 5 and 7).
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/run.h"
#include "cuda/shared.h"
#include "cuda/zip_check.h"
#include "cuda/zip_problem.h"

namespace mudsc {
namespace cuda {
namespace {

template <typename T, bool Grid>
class Zipper {
  public:
    __device__ explicit Zipper(const Params<T>& params) : p(params), shared(static_shared<Shared>()) {
        problem = Grid ? 0 : static_cast<int>(blockIdx.x);
        team = Grid ? static_cast<int>(gridDim.x) : 1;
        block = Grid ? static_cast<int>(blockIdx.x) : 0;
        threads = static_cast<int>(blockDim.x);
        thread = static_cast<int>(threadIdx.x);
        const int64_t first = static_cast<int64_t>(problem) * p.n;
        units = p.units + first;
        model = p.model_of + first;
        work = p.work + first * p.ld;
        best = p.best + first;
        partner = p.partner + first;
        alive = p.alive + first;
        owner = p.owner + first;
        published = p.published + static_cast<int64_t>(problem) * 4 * team;
        left = p.left + static_cast<int64_t>(blockIdx.x) * p.models;
        slots = (p.n + kTile * team - 1) / (kTile * team) * kTile;
    }

    __device__ void run() {
        int last = -1, step = p.first_step, status = kZipOk;
        Pair<T> part = no_pair<T>();  // of row `last`
        double total = 0;
        if (step == 0) {
            begin();
            if (!load()) return;
            for (int slot = 0; slot < slots; ++slot) {
                const int k = row_of(slot);
                if (k < p.n) search(k, slot);
            }
        } else {
            if (p.status[problem] != kZipOk) return;  // it ended in a launch before
            total = p.total[problem];
            resume(p.check[problem].last);
        }
        for (; step < p.end_step; ++step) {
            const Pair<T> top = choose(step, last, part);
            if (top.value == nothing<T>()) {
                status = kZipInfeasible;
                break;
            }
            total += static_cast<double>(top.value);
            part = merge(top.row, top.column);
            last = p.attenuation > 0 ? top.row : -1;
        }
        if (block != 0) return;
        if (status != kZipOk || step == p.merges) {
            report(step, total, status);
        } else {
            pause(last, total);
        }
    }

  private:
    struct Shared {
        Pair<T> part[2][kMostWarps];
        unsigned lost[kMostWarps];
        int barred;
        T tile[kTile][kTile + 1];
    };

    // ---- who owns what ----

    __device__ int row_of(int slot) const { return (slot / kTile * team + block) * kTile + slot % kTile; }
    __device__ int64_t at(int row, int column) const { return static_cast<int64_t>(row) * p.ld + column; }

    __device__ void team_barrier() const {
        if (Grid) {
            cooperative_groups::this_grid().sync();
        } else {
            __syncthreads();
        }
    }

    // The best of all threads' pairs, and of their second pairs, for all threads.
    __device__ void best_of_block(Pair<T>* first, Pair<T>* second) {
        *first = best_of_warp(*first);
        *second = best_of_warp(*second);
        if (thread % 32 == 0) {
            shared.part[0][thread / 32] = *first;
            shared.part[1][thread / 32] = *second;
        }
        __syncthreads();
        for (int w = 0; w < threads / 32; ++w) {
            const Pair<T> a = shared.part[0][w], b = shared.part[1][w];
            if (better(a, *first)) *first = a;
            if (better(b, *second)) *second = b;
        }
        __syncthreads();
    }

    // ---- before the first step ----

    __device__ bool spent_at_first(int m) const {
        const int64_t at = static_cast<int64_t>(problem) * p.models + m;
        return p.budget[at] <= 0 || p.block_budget[at] <= 0;
    }

    __device__ void begin() {
        for (int slot = thread; slot < slots; slot += threads) {
            const int k = row_of(slot);
            if (k >= p.n) continue;
            owner[k] = k;
            alive[k] = 1;
        }
        if (thread == 0) {
            for (int m = 0; m < p.models; ++m) {
                const int64_t at = static_cast<int64_t>(problem) * p.models + m;
                left[m] = p.budget[at] < p.block_budget[at] ? p.budget[at] : p.block_budget[at];
            }
        }
    }

    // Copies the upper triangle tile by tile onto both halves of the working copy, with what is barred from the start
    // as -inf, and compares the lower triangle with it. False, for all threads of the team, when the input is refused.
    __device__ bool load() {
        Seen seen;
        const int tiles = static_cast<int>(p.ld / kTile);
        int turn = 0;
        for (int ti = 0; ti < tiles; ++ti) {
            for (int tj = ti; tj < tiles; ++tj) {
                if (turn == block) load_tile(ti * kTile, tj * kTile, &seen);
                turn = turn + 1 == team ? 0 : turn + 1;
            }
        }
        seen.add_to(p.check + problem, thread);
        team_barrier();
        const int status = verdict(p.check[problem]);
        if (status != kZipOk && block == 0) report(0, 0.0, status);
        return status == kZipOk;
    }

    __device__ void load_tile(int row0, int column0, Seen* seen) {
        const int lane = thread % 32;
        for (int r = thread / 32; r < kTile; r += threads / 32) {
            const int i = row0 + r, k = column0 + lane;
            if (i >= p.n || k >= p.n) continue;
            const T x = p.similarity[units[i] * p.row_stride + units[k] * p.col_stride];
            if (k > i) seen->note(x);
            shared.tile[r][lane] = x;
        }
        __syncthreads();
        for (int r = thread / 32; r < kTile; r += threads / 32) {
            // The upper half as it is read, with the padding right of the last column.
            int i = row0 + r, k = column0 + lane;
            if (i < p.n && k >= i)
                work[at(i, k)] = k < p.n && k > i ? allowed(i, k, shared.tile[r][lane]) : nothing<T>();
            // The lower half, transposed, and what the input has in its place.
            i = column0 + r;
            k = row0 + lane;
            if (i >= p.n || k >= i) continue;
            const T upper = shared.tile[lane][r];
            const T lower = p.similarity[units[i] * p.row_stride + units[k] * p.col_stride];
            seen->note(lower);
            seen->compare(upper, lower);
            work[at(i, k)] = allowed(i, k, upper);
        }
        __syncthreads();
    }

    __device__ T allowed(int i, int k, T x) const {
        return model[i] == model[k] && spent_at_first(model[i]) ? nothing<T>() : x;
    }

    // Row k's best entry right of the diagonal; all threads of its block look, the one that owns the slot keeps it.
    __device__ void search(int k, int slot) {
        constexpr int kLanes = 16 / sizeof(T);
        Pair<T> found = no_pair<T>(), none = no_pair<T>();
        const Packet<T>* row = reinterpret_cast<const Packet<T>*>(work + at(k, 0));
        const int packets = static_cast<int>(p.ld) / kLanes;
#pragma unroll 4
        for (int c = (k + 1) / kLanes + thread; c < packets; c += threads) {
            const Packet<T> x = row[c];
#pragma unroll
            for (int l = 0; l < kLanes; ++l) {
                const int column = c * kLanes + l;
                if (column > k && x.lane[l] > found.value) found = Pair<T>{x.lane[l], k, column};
            }
        }
        best_of_block(&found, &none);
        if (slot % threads == thread) {
            best[k] = found.value;
            partner[k] = found.column;
        }
    }

    // ---- one step ----

    // All threads of the team learn the best pair. `part` is this thread's share of the maximum of row `last`.
    __device__ Pair<T> choose(int step, int last, Pair<T> part) {
        Pair<T> mine = no_pair<T>();
        for (int slot = thread; slot < slots; slot += threads) {
            const int k = row_of(slot);
            if (k >= p.n || k == last || alive[k] == 0) continue;
            const Pair<T> candidate{best[k], k, partner[k]};
            if (better(candidate, mine)) mine = candidate;
        }
        best_of_block(&mine, &part);
        // Two sets by turns: a block that is ahead must not overwrite what another still reads.
        Pair<T>* set = published + (step & 1) * 2 * team;
        if (thread == 0) {
            set[2 * block] = mine;
            set[2 * block + 1] = part;
        }
        team_barrier();
        Pair<T> top = no_pair<T>(), row = no_pair<T>();
        for (int b = thread; b < team; b += threads) {
            const Pair<T> first = set[2 * b], second = set[2 * b + 1];
            if (better(first, top)) top = first;
            if (better(second, row)) row = second;
        }
        best_of_block(&top, &row);
        if (last >= 0 && last / kTile % team == block) {
            const int slot = last / kTile / team * kTile + last % kTile;
            if (slot % threads == thread) {
                best[last] = row.value;
                partner[last] = row.column;
            }
        }
        return better(row, top) ? row : top;
    }

    // j joins i. Returns this thread's share of the new maximum of row i.
    __device__ Pair<T> merge(int i, int j) {
        if (block == 0 && thread == 0) owner[j] = i;
        const int barred = model[i] == model[j] ? spend(model[i]) : -1;
        if (barred >= 0) bar(barred, j);
        Pair<T> part = no_pair<T>();
        for (int first = 0; first < slots; first += threads) {
            const int slot = first + thread, k = slot < slots ? row_of(slot) : p.n;
            const bool lost = k < p.n && update(k, i, j, barred, &part);
            const unsigned mask = __ballot_sync(kAll, lost);
            if (thread % 32 == 0) shared.lost[thread / 32] = mask;
            __syncthreads();
            for (int w = 0; w < threads / 32; ++w) {
                for (unsigned rows = shared.lost[w]; rows != 0; rows &= rows - 1) {
                    const int again = first + w * 32 + __ffs(static_cast<int>(rows)) - 1;
                    search(row_of(again), again);
                }
            }
            __syncthreads();
        }
        return part;
    }

    // One merge less inside model m; m when that was the last, else -1.
    __device__ int spend(int m) {
        if (thread == 0) shared.barred = --left[m] == 0 ? m : -1;
        __syncthreads();
        return shared.barred;
    }

    // Written into the matrix, because a barred entry also bars what it is merged with (rule 5's minimum).
    __device__ void bar(int m, int j) {
        for (int slot = 0; slot < slots; ++slot) {
            const int k = row_of(slot);
            if (k >= p.n || k == j || model[k] != m || alive[k] == 0) continue;
            for (int c = thread; c < p.n; c += threads) {
                if (model[c] == m) work[at(k, c)] = nothing<T>();
            }
        }
        team_barrier();
    }

    // What the merge means for unit k: its entries in rows and columns i and j. True when row k has to be searched.
    __device__ bool update(int k, int i, int j, int barred, Pair<T>* part) {
        const bool keeps = p.attenuation > 0;
        if (k == j || (k == i && !keeps)) {
            alive[k] = 0;
            if (k == j) work[at(i, j)] = nothing<T>();
            return false;
        }
        if (k == i || alive[k] == 0) return false;
        const int with = partner[k];
        const bool lost = with == i || with == j;
        bool again = barred >= 0 && with != kNobody && model[k] == barred && model[with] == barred;
        work[at(k, j)] = nothing<T>();
        if (!keeps) {
            work[at(k, i)] = nothing<T>();
            return again || (k < j && lost);
        }
        const T a = work[at(i, k)], b = work[at(j, k)], x = (b < a ? b : a) * p.attenuation;
        work[at(i, k)] = x;
        work[at(k, i)] = x;
        if (k > i) {
            const Pair<T> candidate{x, i, k};
            if (x > nothing<T>() && better(candidate, *part)) *part = candidate;
            return again || (k < j && with == j);
        }
        if (again) return true;
        if (x > best[k] || (x == best[k] && (lost || i < with) && x > nothing<T>())) {
            best[k] = x;
            partner[k] = i;
            return false;
        }
        return lost;
    }

    // ---- between two launches, and the end ----

    // The parts of the last merged row's maximum are lost with the launch: the block that owns it searches it again.
    __device__ void resume(int last) {
        if (last < 0 || last / kTile % team != block) return;
        search(last, last / kTile / team * kTile + last % kTile);
    }

    __device__ void pause(int last, double total) {
        if (thread != 0) return;
        p.total[problem] = total;
        p.status[problem] = kZipOk;
        p.check[problem].last = last;
    }

    __device__ void report(int made, double total, int status) {
        if (thread != 0) return;
        p.total[problem] = total;
        p.made[problem] = made;
        p.status[problem] = status;
        for (int m = 0; m < p.models; ++m) {
            const int64_t at = static_cast<int64_t>(problem) * p.models + m;
            const int64_t lower = p.budget[at] < p.block_budget[at] ? p.budget[at] : p.block_budget[at];
            const int64_t used = lower - left[m];
            p.budget[at] -= used;
            p.block_budget[at] -= used;
        }
    }

    const Params<T>& p;
    Shared& shared;
    int problem, team, block, threads, thread;
    int slots;  // rows that the block may own; row_of(slot) >= n: none
    const int64_t* units;
    const int32_t* model;
    T* work;
    T* best;
    int *partner, *alive;
    int64_t* owner;
    Pair<T>* published;
    int64_t* left;
};

template <typename T, bool Grid>
__global__ void __launch_bounds__(kMostThreads, 1) zip_kernel(const __grid_constant__ Params<T> params) {
    Zipper<T, Grid>(params).run();
}

// ---- the launcher ----

template <typename T>
std::string run(const ZipCudaArgs& a, const OnDevice& device, void* stream) {
    const ZipArgs& z = a.zip;
    const Plan plan = plan_of(z.n, a.problems, device.multiprocessors());
    const int64_t blocks = plan.team * a.problems;
    Params<T> p{};
    const int64_t needed = carve(a, blocks, &p, static_cast<char*>(a.scratch));
    if (needed > a.scratch_bytes) return "zip_kernel: needs " + std::to_string(needed) + " bytes of scratch memory";
    p.similarity = static_cast<const T*>(z.similarity);
    p.row_stride = z.row_stride;
    p.col_stride = z.col_stride;
    p.units = z.units;
    p.model_of = z.model_of;
    p.n = static_cast<int>(z.n);
    p.models = z.models;
    p.merges = static_cast<int>(z.merges);
    p.attenuation = z.attenuation > 0 ? held_attenuation<T>(z.attenuation) : 0;
    p.budget = z.budget;
    p.block_budget = z.block_budget;
    p.owner = z.owner;
    p.total = z.total;
    p.made = z.made;
    p.status = a.status;
    const cudaError_t error =
        cudaMemsetAsync(p.check, 0, static_cast<size_t>(a.problems) * sizeof(Check), static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return describe(error, "zip_kernel");
    Shape shape{blocks, plan.threads};
    shape.cooperative = plan.team > 1;
    const auto kernel = shape.cooperative ? zip_kernel<T, true> : zip_kernel<T, false>;
    const int64_t steps = a.steps_a_launch > 0 ? a.steps_a_launch : kStepsALaunch;
    for (int64_t first = 0;; first += steps) {
        p.first_step = static_cast<int>(first);
        p.end_step = static_cast<int>(min_of(z.merges, first + steps));
        const std::string failed = launch("zip_kernel", kernel, shape, stream, p);
        if (!failed.empty() || p.end_step == p.merges) return failed;
        // Nothing is queued behind a launch that the caller may want to be the last.
        const cudaError_t ended = cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
        if (ended != cudaSuccess) return describe(ended, "zip_kernel");
        if (z.poll()) return "zip_kernel: interrupted";
    }
}

}  // namespace

// The largest that any device needs.
int64_t zip_scratch_bytes(const ZipCudaArgs& a) {
    const int64_t blocks = a.problems > 1 ? a.problems : ceil_of(a.zip.n, 2 * kTile) + 1;
    Params<float> narrow{};
    Params<double> wide{};
    return a.zip.dtype == Dtype::f64 ? carve(a, blocks, &wide, nullptr) : carve(a, blocks, &narrow, nullptr);
}

std::string zip(const ZipCudaArgs& a, int device, void* stream) {
    if (a.problems == 0 || a.zip.n == 0) return {};
    if (a.zip.n > kNobody / 2 || a.problems > kNobody) return "zip_kernel: too many units";
    const OnDevice on(device);
    if (!on.error().empty()) return "zip_kernel: " + on.error();
    switch (a.zip.dtype) {
        case Dtype::f64: return run<double>(a, on, stream);
        case Dtype::f32: return run<float>(a, on, stream);
        default: return "zip_kernel: unsupported dtype";
    }
}

}  // namespace cuda
}  // namespace mudsc
