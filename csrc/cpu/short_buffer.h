// Scratch memory for an index of units: from the heap only where it is long, since a call of a microsecond or two
// spends 0.1 there on each.
#pragma once

#include "cpu/common.h"

namespace mudsc {
namespace {

template <typename T>
class ShortBuffer {
  public:
    explicit ShortBuffer(int64_t count) : data_(inside_) {
        if (count > kInside) data_ = heap_.allocate(count) ? heap_.get() : nullptr;
    }
    ShortBuffer(const ShortBuffer&) = delete;
    ShortBuffer& operator=(const ShortBuffer&) = delete;

    T* get() const { return data_; }
    T& operator[](int64_t i) const { return data_[i]; }
    explicit operator bool() const { return data_ != nullptr; }

  private:
    static constexpr int64_t kInside = 256;
    alignas(kCacheLine) T inside_[kInside];  // uninitialised, as a Buffer
    Buffer<T> heap_;
    T* data_;
};

}  // namespace
}  // namespace mudsc
