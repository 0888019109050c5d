// The package's own small thread pool. Kernels cut their work into tasks in a way that does not depend on the number
// of threads, so results do not either.
#pragma once

#include <stdint.h>

namespace mudsc {

// Runs fn(ctx, task, worker) once for each task in [0, n_tasks), on at most `threads` threads including the caller's.
// Tasks are taken in order, by whoever is free. `worker` is below `threads`: an index for per-thread scratch memory.
// A call from inside a task, or while another thread uses the pool, runs on the calling thread alone. While the calling
// thread has nothing left to do but to wait for the others, it calls waiting(ctx), if given, every few milliseconds.
void parallel_for(int threads, int64_t n_tasks, void (*fn)(void* ctx, int64_t task, int worker), void* ctx,
                  void (*waiting)(void* ctx) = nullptr);

// Asked by long kernels every few milliseconds on the calling thread; true means: stop, the user pressed Ctrl-C.
struct Poll {
    bool (*stop)(void* ctx) = nullptr;
    void* ctx = nullptr;
    bool operator()() const { return stop != nullptr && stop(ctx); }
};

namespace {

// parallel_for with a lambda: fn(task, worker).
template <typename Fn>
[[maybe_unused]] void parallel_each(int threads, int64_t n_tasks, const Fn& fn) {
    parallel_for(
        threads, n_tasks, [](void* ctx, int64_t task, int worker) { (*static_cast<const Fn*>(ctx))(task, worker); },
        const_cast<void*>(static_cast<const void*>(&fn)));
}

}  // namespace
}  // namespace mudsc
