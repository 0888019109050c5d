// Fibers: one OS thread that switches from stack to stack, as each CUDA thread waits or ends.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "emulator.h"

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

Fiber main_fiber, *current = &main_fiber;
uint64_t switches, switches_before;

namespace {

#ifdef SIMT_ASAN
Fiber* came_from;
#endif
#ifdef SIMT_TSAN
void* spare_fiber[kMostFibers];  // making one takes milliseconds
size_t spare_fibers;
#endif
void** spare_stacks;
size_t spare, spare_room;

}  // namespace

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

namespace {

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

}  // namespace

void make_fiber(Fiber* f) {
    void* stack = take_stack();
    f->stack = stack;
    f->stack_bytes = kStack;
    void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + kStack);
    *--top = nullptr;  // enter() finds its stack aligned as after a call
    *--top = reinterpret_cast<void*>(&enter);
    for (int r = 0; r < 6; ++r) *--top = nullptr;
    f->sp = top;
#ifdef SIMT_TSAN
    if (spare_fibers == 0) spare_fiber[spare_fibers++] = __tsan_create_fiber(0);
    f->tsan = spare_fiber[--spare_fibers];
#endif
}

void unmake_fiber(Fiber* f) {
    give_stack(const_cast<void*>(f->stack));
#ifdef SIMT_TSAN
    spare_fiber[spare_fibers++] = f->tsan;
#endif
}

// ---- what kernels and the harness ask ----

const Self& self() { return current->self; }
uint64_t steps() { return switches; }

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

void pause() {
    make_ready(current);
    wait();
}

}  // namespace simt
