// Blocks: their threads, their shared memory, and what is said when they wait for ever.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "emulator.h"

namespace simt {

// Shared memory of a block. TSan must not see who fills it, so there it comes from a heap that TSan does not know.
#ifdef SIMT_TSAN
namespace {
alignas(16) unsigned char heap_of_launch[64 << 20];
size_t heap_used;
}  // namespace

void* garbage(size_t bytes) {
    const size_t rounded = (bytes + 31) & ~size_t{15};
    if (heap_used + rounded > sizeof(heap_of_launch)) fail("too much shared memory for the emulator");
    unsigned char* memory = heap_of_launch + heap_used;
    heap_used += rounded;
    for (volatile unsigned char* p = memory; p < memory + bytes; ++p) *p = kGarbage;
    return memory;
}
void forget_shared_memory() { heap_used = 0; }
static void give_back(void*) {}
#else
void* garbage(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, bytes == 0 ? 1 : bytes) != 0) fail("no memory");
    memset(memory, kGarbage, bytes);
    return memory;
}
void forget_shared_memory() {}
static void give_back(void* memory) { free(memory); }
#endif

void start_block(int index) {
    Block& b = blocks[index];
    const Launch& l = *launching;
    b.threads = static_cast<int>(l.block.x);
    b.fibers = static_cast<Fiber*>(calloc(static_cast<size_t>(b.threads), sizeof(Fiber)));
    b.dynamic = garbage(l.shared_bytes);
    for (int t = 0; t < b.threads; ++t) {
        Fiber& f = b.fibers[t];
        f.self = Self{{static_cast<unsigned>(t), 0, 0}, {static_cast<unsigned>(index), 0, 0}, l.block, l.grid};
        f.block = &b;
        f.lane = t % kLanes;
        f.warp = t / kLanes;
        b.warps[f.warp].lane[f.lane] = &f;
        make_fiber(&f);
        make_ready(&f);
    }
    release(&start_tag);
}

// Under TSan stacks and fibers are kept until the launch ends: reuse would order two blocks that nothing orders.
void end_block(Block& b, bool launch_ends) {
#ifdef SIMT_TSAN
    if (!launch_ends) return;
#else
    if (launch_ends) return;
#endif
    for (int t = 0; t < b.threads; ++t) unmake_fiber(&b.fibers[t]);
    for (int s = 0; s < b.n_kept; ++s) give_back(b.kept[s].memory);
    give_back(b.dynamic);
    free(b.fibers);
    b.fibers = nullptr;
}

[[noreturn]] void report_deadlock() {
    fprintf(stderr, "simt: deadlock; waiting threads by line:\n");
    for (int i = 0; i < n_blocks; ++i) {
        const Block& b = blocks[i];
        for (int t = 0; b.fibers != nullptr && t < b.threads; ++t) {
            const Fiber& f = b.fibers[t];
            const bool repeated = t > 0 && b.fibers[t - 1].state == f.state && b.fibers[t - 1].line == f.line;
            if (f.state == State::done || repeated) continue;
            const char* what = f.state == State::at_block  ? "block barrier"
                               : f.state == State::at_grid ? "grid barrier"
                                                           : "warp collective";
            fprintf(stderr, "  block %d thread %d: %s at line %d\n", i, t, what, f.line);
        }
    }
    fail("deadlock");
}

// ---- what kernels call ----

void* dynamic_shared() { return current->block->dynamic; }

void* static_shared(const void* type, size_t size) {
    Block& b = *current->block;
    for (int s = 0; s < b.n_kept; ++s) {
        if (b.kept[s].type == type) return b.kept[s].memory;
    }
    if (b.n_kept == 8) fail("more than 8 types of static shared memory");
    void* memory = garbage(size);
    b.kept[b.n_kept++] = {type, memory};
    return memory;
}

}  // namespace simt
