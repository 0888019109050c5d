// What the parts of the emulator share: fibers, blocks, who is ready. Compiled without sanitizers; it tells them
// (SIMT_ASAN, SIMT_TSAN) about its stacks and about the only order that CUDA promises, that of barriers.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cuda_runtime.h"

#ifdef SIMT_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** fake, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake, const void** bottom, size_t* size);
void __asan_unpoison_memory_region(void const volatile* memory, size_t size);
}
#endif
#ifdef SIMT_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber(void);
void __tsan_acquire(void* tag);
void __tsan_release(void* tag);
}
#endif

namespace simt {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 128 * 1024;
constexpr size_t kSharedWithoutAsking = 48 * 1024, kSharedMost = 227 * 1024;
constexpr unsigned long long kMostSteps = 20'000'000;  // of one launch: a kernel that does not end is a finding
constexpr unsigned char kGarbage = 0xff;               // NaN in every floating type

#ifdef SIMT_TSAN
constexpr size_t kMostFibers = 8000;  // TSan has room for 8128 threads
#endif

enum class State { ready, running, at_block, at_grid, at_warp, done };

struct Block;

struct Fiber {
    Self self;
    Block* block;
    int lane, warp;
    State state;
    const void* stack;
    size_t stack_bytes;
    void* sp;
    uint64_t key;
    // of the wait it is in
    int line;
    Op op;
    unsigned mask;
    int argument;
    uint64_t value;
#ifdef SIMT_ASAN
    void* fake;
#endif
#ifdef SIMT_TSAN
    void* tsan;
#endif
};

struct Static {
    const void* type;
    void* memory;
};

struct Warp {
    Fiber* lane[kLanes];
    int syncs;
    char tag[2];
};

struct Block {
    Fiber* fibers;
    int threads, arrived, gone, line;
    int barriers;  // passed
    Warp warps[kMaxThreads / kLanes];
    char tag[2];
    void* dynamic;
    Static kept[8];
    int n_kept;
    uint64_t priority;
};

// ---- the launch that runs, and who runs in it ----

extern Fiber main_fiber, *current;
extern uint64_t switches, switches_before;
extern const Launch* launching;
extern Block* blocks;
extern int n_blocks, grid_arrived, grid_line, grid_barriers;
extern bool grid_left;
extern char grid_tag[2], start_tag, launch_tag;

// ---- schedule.cpp: who goes on ----

void seed_schedule();
uint64_t random_bits();
void make_ready(Fiber* f);
Fiber* next_ready();  // null: nobody is

// ---- fibers.cpp: stacks, switches, beginning and end ----

void switch_to(Fiber* to);
void wait();  // lets the next one that is ready go on
void release(char* tag);
void acquire(char* tag);
void make_fiber(Fiber* f);
void unmake_fiber(Fiber* f);

// ---- blocks.cpp: their memory and threads ----

void start_block(int index);
void end_block(Block& b, bool launch_ends);
void forget_shared_memory();  // of the launch before
void* garbage(size_t bytes);
[[noreturn]] void report_deadlock();

// ---- runtime.cpp ----

int dynamic_limit(const void* kernel);

}  // namespace simt
