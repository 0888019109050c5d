// Scratch memory, of an index of units mostly: from the heap only where it is long, since a call of a microsecond or
// two spends 0.1 there on each.
#pragma once

#include "cpu/common.h"

namespace mudsc {
namespace {

template <typename T, int64_t kInside = 256>
class ShortBuffer {
  public:
    ShortBuffer() = default;
    explicit ShortBuffer(int64_t count) { allocate(count); }
    ShortBuffer(const ShortBuffer&) = delete;
    ShortBuffer& operator=(const ShortBuffer&) = delete;

    bool allocate(int64_t count) {
        data_ = count <= kInside ? inside_ : heap_.allocate(count) ? heap_.get() : nullptr;
        return data_ != nullptr;
    }
    T* get() const { return data_; }
    T& operator[](int64_t i) const { return data_[i]; }
    explicit operator bool() const { return data_ != nullptr; }

  private:
    alignas(kCacheLine) T inside_[kInside];  // uninitialised, as a Buffer
    Buffer<T> heap_;
    T* data_ = nullptr;
};

}  // namespace
}  // namespace mudsc
