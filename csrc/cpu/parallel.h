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

// A Poll for several threads: only the calling thread may ask it, the others see what that one heard.
class SharedPoll {
  public:
    explicit SharedPoll(Poll poll) : poll_(poll) {}
    Poll of(int worker) { return worker == 0 ? Poll{&SharedPoll::ask, this} : Poll{&SharedPoll::heard, this}; }
    bool stopped() const { return __atomic_load_n(&stopped_, __ATOMIC_RELAXED); }

    static bool ask(void* self_ptr) {
        auto* self = static_cast<SharedPoll*>(self_ptr);
        if (!self->stopped() && self->poll_()) __atomic_store_n(&self->stopped_, true, __ATOMIC_RELAXED);
        return self->stopped();
    }

  private:
    static bool heard(void* self) { return static_cast<SharedPoll*>(self)->stopped(); }

    const Poll poll_;
    bool stopped_ = false;
};

// The same for tasks that poll: fn(task, worker, poll). The calling thread asks while it waits for the others, too.
template <typename Fn>
[[maybe_unused]] void parallel_each(int threads, int64_t n_tasks, SharedPoll& poll, const Fn& fn) {
    struct Polled {
        SharedPoll& poll;
        const Fn& fn;
    } polled{poll, fn};
    parallel_for(
        threads, n_tasks,
        [](void* ctx, int64_t task, int worker) {
            auto* it = static_cast<Polled*>(ctx);
            it->fn(task, worker, it->poll.of(worker));
        },
        &polled, [](void* ctx) { SharedPoll::ask(&static_cast<Polled*>(ctx)->poll); });
}

}  // namespace
}  // namespace mudsc
