// Threads that stay awake between the short steps of one long job. Waking a sleeping thread takes longer than a step of
// a few microseconds; here the others watch a word of memory. No step needs them: a part that nobody has taken is done
// by the leader, so a thread that the machine has no time for costs nothing but its help.
#pragma once

#include <sched.h>

#include "cpu/common.h"
#include "cpu/parallel.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

class Crew {
  public:
    // Calls lead(crew) on the calling thread, with at most threads - 1 others at hand.
    template <typename Lead>
    static void run(int threads, const Lead& lead) {
        Crew crew(threads > 1);
        parallel_each(threads, threads, [&](int64_t, int worker) {
            if (worker != 0) {
                crew.follow();
            } else if (!__atomic_load_n(&crew.finished_, __ATOMIC_ACQUIRE)) {
                lead(crew);
                __atomic_store_n(&crew.finished_, true, __ATOMIC_RELEASE);
            }
        });
    }

    // Calls fn(part) once for each part below `parts` (at most 255), in any order; returns when all are done.
    template <typename Fn>
    void each(int parts, const Fn& fn) {
        if (!shared_ || parts == 1) {
            for (int part = 0; part < parts; ++part) fn(part);
            return;
        }
        call_ = [](const void* ctx, int part) { (*static_cast<const Fn*>(ctx))(part); };
        ctx_ = &fn;
        __atomic_store_n(&done_, 0, __ATOMIC_RELAXED);
        // Others may just be trying, in vain, to take a part of the step before: this read is one among theirs.
        const uint64_t step = (__atomic_load_n(&ticket_, __ATOMIC_RELAXED) >> 8) + 1;
        __atomic_store_n(&ticket_, step << 8 | static_cast<uint64_t>(parts), __ATOMIC_RELEASE);
        while (work()) {
        }
        for (int waited = 0; __atomic_load_n(&done_, __ATOMIC_ACQUIRE) < parts; ++waited) rest(waited);
    }

  private:
    explicit Crew(bool shared) : shared_(shared) {}

    // Takes a part and does it; false when there is none to take.
    bool work() {
        uint64_t seen = __atomic_load_n(&ticket_, __ATOMIC_ACQUIRE);
        if ((seen & 0xff) == 0) return false;
        if (!__atomic_compare_exchange_n(&ticket_, &seen, seen - 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
            return true;
        call_(ctx_, static_cast<int>(seen & 0xff) - 1);
        __atomic_fetch_add(&done_, 1, __ATOMIC_RELEASE);
        return true;
    }

    void follow() {
        for (int waited = 0; !__atomic_load_n(&finished_, __ATOMIC_ACQUIRE);) {
            waited = work() ? 0 : waited + 1;
            if (waited > 0) rest(waited);
        }
    }

    // Some tens of cycles; after some tens of microseconds the core is offered to others.
    static void rest(int waited) {
        if (waited >= kPatience) {
            sched_yield();
            return;
        }
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    static constexpr int kPatience = 1000;

    // The number of the step, and in the last byte how many of its parts are still to be taken.
    alignas(kCacheLine) uint64_t ticket_ = 0;
    void (*call_)(const void*, int) = nullptr;
    const void* ctx_ = nullptr;
    bool finished_ = false;
    const bool shared_;
    alignas(kCacheLine) int done_ = 0;
};

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
