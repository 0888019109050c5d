// The queue of a shortest path search.
#pragma once

#include <stdint.h>

namespace mudsc {
namespace MUDSC_ISA {
namespace {

struct Waiting {
    double length;
    int32_t id;  // a column, or n + row for a row whose list may be too short from this length on
};

// A binary heap, shortest first, in which what waits can be moved forward.
class Heap {
  public:
    template <class Carver>
    void carve(Carver& memory, int64_t ids) {
        memory.take(&items_, ids);
        memory.take(&at_, ids);
    }
    void clear() { size_ = 0; }
    bool empty() const { return size_ == 0; }
    double shortest() const { return items_[0].length; }
    void push(double length, int32_t id) { rise(size_++, length, id); }
    void move_forward(double length, int32_t id) { rise(at_[id], length, id); }

    Waiting pop() {
        const Waiting top = items_[0], last = items_[--size_];
        int k = 0;
        for (;;) {
            int down = 2 * k + 1;
            if (down >= size_) break;
            if (down + 1 < size_ && items_[down + 1].length < items_[down].length) ++down;
            if (items_[down].length >= last.length) break;
            put(k, items_[down]);
            k = down;
        }
        put(k, last);
        return top;
    }

  private:
    void put(int k, Waiting w) {
        items_[k] = w;
        at_[w.id] = k;
    }

    void rise(int k, double length, int32_t id) {
        while (k > 0) {
            const int up = (k - 1) / 2;
            if (items_[up].length <= length) break;
            put(k, items_[up]);
            k = up;
        }
        put(k, Waiting{length, id});
    }

    Waiting* items_ = nullptr;
    int32_t* at_ = nullptr;  // [id] place among the items
    int size_ = 0;
};

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
