// The emulator: fibers, schedules, barriers, warp collectives, launches. Compiled without sanitizers; it tells them
// (SIMT_ASAN, SIMT_TSAN) about its stacks and about the only order that CUDA promises, that of barriers.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

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

#if !defined(__x86_64__)
#error "the emulator switches fibers in x86-64 assembly"
#endif
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch, .-simt_switch
.section .note.GNU-stack,"",@progbits
.text
)");

namespace simt {
namespace {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 128 * 1024;
constexpr size_t kSharedWithoutAsking = 48 * 1024, kSharedMost = 227 * 1024;
constexpr unsigned long long kMostSteps = 20'000'000;  // of one launch: a kernel that does not end is a finding
constexpr unsigned char kGarbage = 0xff;               // NaN in every floating type

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

Options settings;
uint64_t random_state, enqueued, switches, switches_before;
Fiber main_fiber, *current = &main_fiber;
#ifdef SIMT_ASAN
Fiber* came_from;
#endif
const Launch* launching;
Block* blocks;
int n_blocks, started, ended, grid_arrived, grid_line, grid_barriers;
bool grid_left;
char grid_tag[2], start_tag, launch_tag;
Fiber** heap;
size_t heap_size, heap_room;
#ifdef SIMT_TSAN
constexpr size_t kMostFibers = 8000;  // TSan has room for 8128 threads
void* spare_fiber[kMostFibers];       // making one takes milliseconds
size_t spare_fibers;
#endif
void** spare_stacks;
size_t spare, spare_room;

uint64_t random_bits() {
    uint64_t z = (random_state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

uint64_t hash(uint64_t a, uint64_t b) {
    uint64_t z = a * 0x9e3779b97f4a7c15ull + b + 1;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// ---- who goes on: the ready fiber with the smallest key ----

uint64_t key_of(const Fiber& f) {
    const uint64_t seed = settings.seed, block = static_cast<uint64_t>(f.block - blocks);
    switch (settings.policy) {
        case 1:
            return (hash(seed, block << 16 | static_cast<uint64_t>(f.warp)) & ~63ull) | static_cast<uint64_t>(f.lane);
        case 2: return hash(seed, block << 16 | static_cast<uint64_t>(f.warp * kLanes + f.lane));
        case 3: return ~enqueued;
        case 4: return enqueued;
        case 5: return (hash(seed, block) & ~0xffffull) | (random_bits() & 0xffff);
        default: return random_bits();
    }
}

void make_ready(Fiber* f) {
    f->state = State::ready;
    ++enqueued;
    f->key = key_of(*f);
    if (heap_size == heap_room) {
        heap_room = heap_room * 2 + 1024;
        heap = static_cast<Fiber**>(realloc(heap, heap_room * sizeof(Fiber*)));
    }
    size_t i = heap_size++;
    for (; i > 0 && heap[(i - 1) / 2]->key > f->key; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = f;
}

Fiber* next_ready() {
    if (heap_size == 0) return nullptr;
    Fiber *top = heap[0], *last = heap[--heap_size];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= heap_size) break;
        if (child + 1 < heap_size && heap[child + 1]->key < heap[child]->key) ++child;
        if (heap[child]->key >= last->key) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = last;
    return top;
}

void switch_to(Fiber* to) {
    Fiber* from = current;
    if (to == from) {
        from->state = State::running;
        return;
    }
    if (++switches - switches_before > kMostSteps) fail("no end after %llu steps", kMostSteps);
    current = to;
    to->state = State::running;
#ifdef SIMT_ASAN
    came_from = from;
    __sanitizer_start_switch_fiber(from->state == State::done ? nullptr : &from->fake, to->stack, to->stack_bytes);
#endif
#ifdef SIMT_TSAN
    __tsan_switch_to_fiber(to->tsan, 1);
#endif
    simt_switch(&from->sp, to->sp);
#ifdef SIMT_ASAN
    __sanitizer_finish_switch_fiber(from->fake, nullptr, nullptr);
#endif
}

void wait() {
    Fiber* next = next_ready();
    switch_to(next != nullptr ? next : &main_fiber);
}

void release(char* tag) {
    (void)tag;
#ifdef SIMT_TSAN
    __tsan_release(tag);
#endif
}
void acquire(char* tag) {
    (void)tag;
#ifdef SIMT_TSAN
    __tsan_acquire(tag);
#endif
}

// ---- life of a fiber ----

void finish() {
    Fiber* f = current;
    Block* b = f->block;
    if (b->arrived > 0) fail("a thread ended while others of its block wait at line %d", b->line);
    if (grid_arrived > 0) fail("a thread ended while others of the grid wait at line %d", grid_line);
    for (const Fiber* other : b->warps[f->warp].lane) {
        if (other != nullptr && other->state == State::at_warp && (other->mask >> f->lane & 1u) != 0)
            fail("line %d: the mask %08x names lane %d, which has ended", other->line, other->mask, f->lane);
    }
    release(&launch_tag);
    grid_left = true;
    f->state = State::done;
    if (++b->gone == b->threads) {
        switch_to(&main_fiber);
    } else {
        wait();
    }
    abort();
}

void enter() {
#ifdef SIMT_ASAN
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (came_from == &main_fiber) {
        main_fiber.stack = bottom;
        main_fiber.stack_bytes = bytes;
    }
#endif
    acquire(&start_tag);
    launching->run(launching->arguments);
    finish();
}

void* take_stack() {
    if (spare > 0) {
        void* stack = spare_stacks[--spare];
#ifdef SIMT_ASAN
        __asan_unpoison_memory_region(stack, kStack);
#endif
        return stack;
    }
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for a stack");
    return stack;
}

void give_stack(void* stack) {
    if (spare == spare_room) {
        spare_room = spare_room * 2 + 1024;
        spare_stacks = static_cast<void**>(realloc(spare_stacks, spare_room * sizeof(void*)));
    }
    spare_stacks[spare++] = stack;
}

// Shared memory of a block. TSan must not see who fills it, so there it comes from a heap that TSan does not know.
#ifdef SIMT_TSAN
alignas(16) unsigned char heap_of_launch[64 << 20];
size_t heap_used;

void* garbage(size_t bytes) {
    const size_t rounded = (bytes + 31) & ~size_t{15};
    if (heap_used + rounded > sizeof(heap_of_launch)) fail("too much shared memory for the emulator");
    unsigned char* memory = heap_of_launch + heap_used;
    heap_used += rounded;
    for (volatile unsigned char* p = memory; p < memory + bytes; ++p) *p = kGarbage;
    return memory;
}
void give_back(void*) {}
#else
void* garbage(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, bytes == 0 ? 1 : bytes) != 0) fail("no memory");
    memset(memory, kGarbage, bytes);
    return memory;
}
void give_back(void* memory) { free(memory); }
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
        void* stack = take_stack();
        f.stack = stack;
        f.stack_bytes = kStack;
        void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + kStack);
        *--top = nullptr;  // enter() finds its stack aligned as after a call
        *--top = reinterpret_cast<void*>(&enter);
        for (int r = 0; r < 6; ++r) *--top = nullptr;
        f.sp = top;
#ifdef SIMT_TSAN
        if (spare_fibers == 0) spare_fiber[spare_fibers++] = __tsan_create_fiber(0);
        f.tsan = spare_fiber[--spare_fibers];
#endif
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
    for (int t = 0; t < b.threads; ++t) {
        give_stack(const_cast<void*>(b.fibers[t].stack));
#ifdef SIMT_TSAN
        spare_fiber[spare_fibers++] = b.fibers[t].tsan;
#endif
    }
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

struct Limit {
    const void* kernel;
    int bytes;
};
Limit limits[64];
int n_limits;

int dynamic_limit(const void* kernel) {
    for (int i = 0; i < n_limits; ++i) {
        if (limits[i].kernel == kernel) return limits[i].bytes;
    }
    return static_cast<int>(kSharedWithoutAsking);
}

uint64_t to_signed(uint64_t x) { return static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(x))); }

uint64_t reduced(Op op, const Warp& w, unsigned mask) {
    uint64_t result = 0;
    bool first = true;
    for (int l = 0; l < kLanes; ++l) {
        if ((mask >> l & 1u) == 0) continue;
        const uint64_t x = w.lane[l]->value;
        const int64_t a = static_cast<int64_t>(to_signed(x)), b = static_cast<int64_t>(to_signed(result));
        switch (op) {
            case Op::ballot: result |= x << l; break;
            case Op::any: result |= x; break;
            case Op::all: result = (first || result != 0) && x != 0; break;
            case Op::add: result += x; break;
            case Op::minimum: result = first || x < result ? x : result; break;
            case Op::maximum: result = first || x > result ? x : result; break;
            case Op::minimum_signed: result = first || a < b ? x : result; break;
            case Op::maximum_signed: result = first || a > b ? x : result; break;
            default: break;
        }
        first = false;
    }
    return result;
}

// All lanes of the mask have arrived: gives each its result and lets them go on.
void complete(Warp& w, const Fiber& last) {
    const unsigned mask = last.mask;
    const Op op = last.op;
    uint64_t results[kLanes] = {};
    for (int l = 0; l < kLanes; ++l) {
        if ((mask >> l & 1u) == 0) continue;
        int from = l;
        switch (op) {
            case Op::index: from = w.lane[l]->argument & (kLanes - 1); break;
            case Op::exclusive_or: from = l ^ (w.lane[l]->argument & (kLanes - 1)); break;
            case Op::up: from = l - w.lane[l]->argument; break;
            case Op::down: from = l + w.lane[l]->argument; break;
            default: break;
        }
        if (from < 0 || from >= kLanes) from = l;
        if ((mask >> from & 1u) == 0)
            fail("line %d: a shuffle reads lane %d, which is not in the mask", last.line, from);
        results[l] = w.lane[from]->value;
    }
    const bool reduces = op >= Op::ballot;
    const uint64_t common = reduces ? reduced(op, w, mask) : 0;
    if (op == Op::sync) ++w.syncs;
    for (int l = 0; l < kLanes; ++l) {
        if ((mask >> l & 1u) == 0) continue;
        w.lane[l]->value = reduces ? common : results[l];
        if (w.lane[l] != current) make_ready(w.lane[l]);
    }
    make_ready(current);
}

}  // namespace

// ---- what kernels call ----

const Self& self() { return current->self; }
Options& options() { return settings; }
uint64_t steps() { return switches; }
bool mutant(int number) { return settings.mutant == number; }

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "simt: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, " (%s)\n", launching != nullptr ? launching->name : "no launch");
    va_end(arguments);
    fflush(nullptr);
    _exit(70);
}

int injected(const char* call) {
    return settings.fail_call != nullptr && strcmp(settings.fail_call, call) == 0 ? settings.fail_code : 0;
}

void pause() {
    make_ready(current);
    wait();
}

void block_barrier(int line) {
    Fiber* f = current;
    Block& b = *f->block;
    if (b.gone > 0) fail("line %d: a thread of the block has ended and will never reach this barrier", line);
    if (b.arrived > 0 && b.line != line) fail("threads of one block wait at barriers of lines %d and %d", b.line, line);
    char* tag = &b.tag[b.barriers & 1];
    release(tag);
    b.line = f->line = line;
    f->state = State::at_block;
    if (++b.arrived == b.threads) {
        b.arrived = 0;
        ++b.barriers;
        for (int t = 0; t < b.threads; ++t) make_ready(&b.fibers[t]);
    }
    wait();
    acquire(tag);
}

void grid_barrier(int line) {
    Fiber* f = current;
    if (!launching->cooperative) fail("line %d: a grid barrier in a launch that is not cooperative", line);
    if (grid_left) fail("line %d: a thread of the grid has ended and will never reach this barrier", line);
    if (grid_arrived > 0 && grid_line != line) fail("threads of one grid wait at lines %d and %d", grid_line, line);
    char* tag = &grid_tag[grid_barriers & 1];
    release(tag);
    grid_line = f->line = line;
    f->state = State::at_grid;
    if (++grid_arrived == n_blocks * f->block->threads) {
        grid_arrived = 0;
        ++grid_barriers;
        for (int i = 0; i < n_blocks; ++i) {
            for (int t = 0; t < blocks[i].threads; ++t) make_ready(&blocks[i].fibers[t]);
        }
    }
    wait();
    acquire(tag);
}

uint64_t warp_collective(Op op, unsigned mask, uint64_t value, int argument, int line) {
    Fiber* f = current;
    Warp& w = f->block->warps[f->warp];
    if ((mask >> f->lane & 1u) == 0)
        fail("line %d: lane %d is not in the mask %08x that it names", line, f->lane, mask);
    char* tag = &w.tag[w.syncs & 1];
    if (op == Op::sync) release(tag);
    f->state = State::at_warp;
    f->op = op;
    f->mask = mask;
    f->value = value;
    f->argument = argument;
    f->line = line;
    bool all_here = true;
    for (int l = 0; l < kLanes; ++l) {
        if ((mask >> l & 1u) == 0) continue;
        const Fiber* other = w.lane[l];
        if (other == nullptr || other->state == State::done)
            fail("line %d: the mask %08x names lane %d, which has ended", line, mask, l);
        if (other->state != State::at_warp) {
            all_here = false;
        } else if (other->line != line || other->op != op || other->mask != mask) {
            fail("lanes of one warp meet at different collectives: lines %d and %d", other->line, line);
        }
    }
    if (all_here) complete(w, *f);
    wait();
    if (op == Op::sync) acquire(tag);
    return f->value;
}

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

int launch(const Launch& l) {
    if (const int code = injected("cudaLaunchKernelEx")) return code;
    if (l.grid.x == 0 || l.block.x == 0 || l.block.x > kMaxThreads || l.block.x % kLanes != 0)
        return cudaErrorInvalidConfiguration;
    if (l.grid.y * l.grid.z * l.block.y * l.block.z != 1) return cudaErrorInvalidConfiguration;
    if (l.shared_bytes > static_cast<size_t>(dynamic_limit(l.kernel))) return cudaErrorInvalidValue;
    int room = 0;
    simtOccupancy(&room, l.kernel, static_cast<int>(l.block.x), l.shared_bytes);
    const int resident = room * settings.multiprocessors;
    if (resident == 0) return cudaErrorLaunchOutOfResources;
    if (l.cooperative && static_cast<int64_t>(l.grid.x) > resident) return cudaErrorCooperativeLaunchTooLarge;
    launching = &l;
    switches_before = switches;
    n_blocks = static_cast<int>(l.grid.x);
    blocks = static_cast<Block*>(calloc(static_cast<size_t>(n_blocks), sizeof(Block)));
    random_state = settings.seed * 977 + static_cast<uint64_t>(settings.policy);
    started = ended = grid_arrived = grid_barriers = 0;
    grid_left = false;
#ifdef SIMT_TSAN
    main_fiber.tsan = __tsan_get_current_fiber();
    heap_used = 0;
    if (static_cast<size_t>(n_blocks) * l.block.x > kMostFibers) fail("too many threads for TSan");
#endif
    int* order = static_cast<int*>(malloc(static_cast<size_t>(n_blocks) * sizeof(int)));
    for (int i = 0; i < n_blocks; ++i) {
        const int j = static_cast<int>(random_bits() % static_cast<uint64_t>(i + 1));
        order[i] = order[j];
        order[j] = i;
    }
    while (ended < n_blocks) {
        while (started < n_blocks && started - ended < resident) start_block(order[started++]);
        Fiber* next = next_ready();
        if (next == nullptr) report_deadlock();
        switch_to(next);
        for (int i = 0; i < n_blocks; ++i) {
            Block& b = blocks[i];
            if (b.fibers == nullptr || b.gone != b.threads || b.threads == 0) continue;
            b.gone = b.threads + 1;
            ++ended;
            end_block(b, false);
        }
    }
    acquire(&launch_tag);
    for (int i = 0; i < n_blocks; ++i) end_block(blocks[i], true);
    free(order);
    free(blocks);
    launching = nullptr;
    return cudaSuccess;
}

}  // namespace simt

// ---- the runtime ----

namespace {
int device_in_use = 0;
constexpr int kDevices = 2;
}  // namespace

cudaError_t cudaGetDevice(int* device) {
    if (const int code = simt::injected("cudaGetDevice")) return static_cast<cudaError_t>(code);
    *device = device_in_use;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    if (const int code = simt::injected("cudaSetDevice")) return static_cast<cudaError_t>(code);
    if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
    device_in_use = device;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    if (const int code = simt::injected("cudaDeviceGetAttribute")) return static_cast<cudaError_t>(code);
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = simt::options().multiprocessors; break;
        case cudaDevAttrCooperativeLaunch: *value = 1; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(simt::kSharedMost); break;
    }
    return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return static_cast<cudaError_t>(simt::injected("cudaStreamSynchronize"));  // launches have ended when they return
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
    if (const int code = simt::injected("cudaMemsetAsync")) return static_cast<cudaError_t>(code);
    memset(memory, value, bytes);
    return cudaSuccess;
}
cudaError_t simtFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
    if (const int code = simt::injected("cudaFuncSetAttribute")) return static_cast<cudaError_t>(code);
    if (value > static_cast<int>(simt::kSharedMost)) return cudaErrorInvalidValue;
    if (simt::n_limits == 64) simt::fail("more than 64 kernels with a limit of their own");
    for (int i = 0; i < simt::n_limits; ++i) {
        if (simt::limits[i].kernel != kernel) continue;
        simt::limits[i].bytes = value;
        return cudaSuccess;
    }
    simt::limits[simt::n_limits++] = {kernel, value};
    return cudaSuccess;
}
// Two blocks a multiprocessor where shared memory and 2048 threads allow it: few enough to emulate.
cudaError_t simtOccupancy(int* blocks, const void*, int threads, size_t shared) {
    if (const int code = simt::injected("cudaOccupancyMaxActiveBlocksPerMultiprocessor"))
        return static_cast<cudaError_t>(code);
    *blocks = threads <= 1024 && 2 * shared <= simt::kSharedMost ? 2 : 1;
    return cudaSuccess;
}
