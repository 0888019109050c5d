// Who goes on: the ready fiber with the smallest key, which a seed and a policy draw.
#include <stdlib.h>

#include "emulator.h"

namespace simt {
namespace {

Options settings;
uint64_t random_state, enqueued;
Fiber** heap;
size_t heap_size, heap_room;

uint64_t hash(uint64_t a, uint64_t b) {
    uint64_t z = a * 0x9e3779b97f4a7c15ull + b + 1;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

}  // namespace

Options& options() { return settings; }
bool mutant(int number) { return settings.mutant == number; }

void seed_schedule() { random_state = settings.seed * 977 + static_cast<uint64_t>(settings.policy); }

uint64_t random_bits() {
    uint64_t z = (random_state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

namespace {

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

}  // namespace

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

}  // namespace simt
