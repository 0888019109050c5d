// Small tools for kernels. Everything here has internal linkage: a copy compiled for AVX-512 must never be the one that
// the linker keeps for baseline code. For the same reason kernels use no STL templates.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/status.h"

namespace mudsc {
namespace {

constexpr int64_t kCacheLine = 64;

[[maybe_unused]] constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
[[maybe_unused]] constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
[[maybe_unused]] constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Asks for huge pages where whole ones lie in memory that is not touched yet.
[[maybe_unused]] inline void prefer_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = uintptr_t{2} << 20, at = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t first = (at + page - 1) / page * page, last = (at + bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

// Scratch memory, aligned to a cache line (large ones to a huge page), uninitialised. get() is null when allocation
// failed.
template <typename T>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(int64_t count) { allocate(count); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { free(data_); }

    bool allocate(int64_t count) {
        free(data_);
        data_ = nullptr;
        const size_t bytes = static_cast<size_t>(count > 0 ? count : 1) * sizeof(T);
        const size_t alignment = bytes >= (size_t{8} << 20) ? size_t{2} << 20 : static_cast<size_t>(kCacheLine);
        void* memory = nullptr;
        if (posix_memalign(&memory, alignment, bytes) != 0) return false;
        if (alignment > static_cast<size_t>(kCacheLine)) prefer_huge_pages(memory, bytes);
        data_ = static_cast<T*>(memory);
        return true;
    }
    T* get() const { return data_; }
    T& operator[](int64_t i) const { return data_[i]; }
    explicit operator bool() const { return data_ != nullptr; }

  private:
    T* data_ = nullptr;
};

// Asks for the pages of memory that is about to be written all at once, which takes half the time of a fault each where
// the memory is new, and next to nothing where it is not.
template <typename T>
inline void ask_for_pages(T* memory, int64_t count) {
#if defined(__linux__)
    constexpr uintptr_t kPage = 4096;
    constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, Linux 5.14; kernels before refuse it and do nothing
    const uintptr_t from = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage,
                    to = reinterpret_cast<uintptr_t>(memory + count) / kPage * kPage;
    if (to >= from + 8 * kPage) madvise(reinterpret_cast<void*>(from), to - from, kPopulateWrite);
#else
    (void)memory;
    (void)count;
#endif
}

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

[[maybe_unused]] inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
[[maybe_unused]] inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

[[maybe_unused]] inline float to_f32(float x) { return x; }
[[maybe_unused]] inline float to_f32(double x) { return static_cast<float>(x); }
[[maybe_unused]] inline float to_f32(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
[[maybe_unused]] inline float to_f32(f16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x0400u) return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
    const float value = static_cast<float>(magnitude) * 0x1p-24f;  // subnormal: exact
    return sign != 0 ? -value : value;
}

template <typename T>
T from_f32(float x);
template <>
[[maybe_unused]] inline float from_f32<float>(float x) {
    return x;
}
template <>
[[maybe_unused]] inline double from_f32<double>(float x) {
    return x;
}
template <>
[[maybe_unused]] inline bf16 from_f32<bf16>(float x) {
    const uint32_t bits = float_to_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return bf16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
[[maybe_unused]] inline f16 from_f32<f16>(float x) {
    const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return f16{static_cast<uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return f16{static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65520 or more
    if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the last bits of the sum.
        const uint32_t rounded = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
        return f16{static_cast<uint16_t>(sign | rounded)};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23);
    return f16{static_cast<uint16_t>(sign | rounded >> 13)};
}

}  // namespace
}  // namespace mudsc
