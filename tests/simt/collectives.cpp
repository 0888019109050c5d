// Barriers and warp collectives: who waits for whom, and what each lane gets.
#include "emulator.h"

namespace simt {
namespace {

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

}  // namespace simt
