// What an emulated CUDA thread can do. Every CUDA thread is a fiber of one OS thread; it runs until it waits for others
// (a barrier, a warp collective) or pauses (an atomic), and then a seeded schedule says which one goes on.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace simt {

struct Index {
    unsigned x, y, z;
};

struct Self {
    Index thread, block, block_size, grid_size;
};
const Self& self();

enum class Op {
    sync,
    index,
    up,
    down,
    exclusive_or,
    ballot,
    any,
    all,
    add,
    minimum,
    maximum,
    minimum_signed,
    maximum_signed
};

// All wait; `line` is the caller's, so that divergence and deadlock can be reported. Kernels write one such call a
// line.
void block_barrier(int line);
void grid_barrier(int line);
uint64_t warp_collective(Op op, unsigned mask, uint64_t value, int argument, int line);
void pause();  // lets the schedule run others first

void* dynamic_shared();                              // of the block, as large as the launch asked for
void* static_shared(const void* type, size_t size);  // of the block, one a type, filled with garbage at first use

// Whether the deliberate fault `number` of this source is on; see mutants.py.
bool mutant(int number);

struct Launch {
    const char* name;
    const void* kernel;
    Index grid, block;
    size_t shared_bytes;
    bool cooperative;
    void (*run)(const void* arguments);
    const void* arguments;
};
int launch(const Launch& launch);  // a cudaError_t

// ---- for the harness ----

struct Options {
    uint64_t seed = 0;
    int policy = 0;  // one of kPolicies
    int multiprocessors = 2;
    int mutant = -1;
    int device = 0;                   // where launches must be; 0 is the current one before and after
    const char* fail_call = nullptr;  // this runtime call returns fail_code
    int fail_code = 0;
};
constexpr int kPolicies = 6;  // uniform, by warp, by thread, newest first, oldest first, by block
Options& options();
int injected(const char* call);  // fail_code when `call` shall fail, else 0
uint64_t steps();                // fiber switches so far

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace simt
