// Units of nine numbers of 16 bits, three at a time: the 3 x 3 kernels of a convolution's input channels, gathered, or
// in bfloat16 averaged when two models are zipped. 27 of 32 lanes are used, where one unit at a time uses nine of
// sixteen.
#pragma once

#include "cpu/kernels/regroup_sums.h"

namespace mudsc {
namespace MUDSC_ISA {
namespace {

#if defined(__AVX512BW__)
constexpr int64_t kNine = 9, kThree = 3;
constexpr int64_t kNinesRead = 16, kNinesWritten = 32;  // elements from each member's first, and from the result's
constexpr int64_t kNinesBytes = kNine * static_cast<int64_t>(sizeof(uint16_t)), kNinesGroup = 30;

// Asks for what kNinesGroup units need soon, each a sum of `Members`.
template <int64_t Members>
inline void ask_for_nines(Ahead& ahead, const void* to, bool usual) {
    if (usual) {
        ahead.ask<Ahead::lines(kNinesGroup * Members, kNinesBytes), Ahead::lines(kNinesGroup, kNinesBytes)>(to);
    } else {
        for (int64_t j = 0; j < kNinesGroup; j += Ahead::kGroup)
            ahead.ask(static_cast<const char*>(to) + j * kNinesBytes);
    }
}

// Three units of one member each.
inline __m512i three_nines(const uint16_t* in, const int32_t* at) {
    // Places of elements in two vectors of 32, of which the second holds the unit that is added.
    const __m512i two = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 40, 39, 38, 37, 36, 35, 34, 33, 32,
                                         8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i three = _mm512_set_epi16(0, 0, 0, 0, 0, 40, 39, 38, 37, 36, 35, 34, 33, 32, 17, 16, 15, 14, 13, 12,
                                           11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const auto unit = [&](int k) {
        return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + at[k])));
    };
    return _mm512_permutex2var_epi16(_mm512_permutex2var_epi16(unit(0), two, unit(1)), three, unit(2));
}

// A row of `n` units, at least three, of one member each; kNinesRead elements can be read from each member's first.
void move_row_of_nines(uint16_t* out, const uint16_t* in, const int32_t* at, int64_t n, Ahead ahead) {
    const int64_t last = n - kThree;  // written apart, as a vector would go past the row's end
    const bool usual = ahead.usual(kNinesBytes, 1);
    for (int64_t j = 0; j < last;) {
        ask_for_nines<1>(ahead, out + kNine * j, usual);
        for (const int64_t stop = min64(j + kNinesGroup, last); j < stop; j += kThree)
            _mm512_storeu_si512(out + kNine * j, three_nines(in, at + j));
    }
    uint16_t part[kNinesWritten];
    _mm512_storeu_si512(part, three_nines(in, at + last));
    memcpy(out + kNine * last, part, kThree * kNine * sizeof(uint16_t));
}
#endif

#if defined(__AVX512BF16__)
template <typename T>
constexpr bool kBf16 = false;
template <>
constexpr bool kBf16<bf16> = true;

// Three units of two members each. Returns the lanes that were rounded wrongly, as Sum::quick does.
inline __mmask16 sum_nines(bf16* to, const bf16* in, const int32_t* at, __m512 by) {
    // As floats: the first unit and seven elements of the second; two of the second and the third. Each is the upper
    // half of a lane, and these are the elements' places in two vectors of 32, of which the second holds that unit.
    constexpr __mmask32 upper = 0xaaaaaaaa;
    const __m512i front =
        _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 32, 33, 34, 35, 36, 37, 38), 16);
    const __m512i back = _mm512_slli_epi32(_mm512_setr_epi32(39, 40, 0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8, 8), 16);
    const auto member = [&](int k) {
        return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + at[k])));
    };
    const auto floats = [](__m512i unit, __m512i places, __m512i second) {
        return _mm512_castsi512_ps(_mm512_maskz_permutex2var_epi16(upper, unit, places, second));
    };
    const __m512i x = member(2), y = member(3);
    const __m512 a = _mm512_add_ps(floats(member(0), front, x), floats(member(1), front, y)) * by;
    const __m512 b = _mm512_add_ps(floats(member(4), back, x), floats(member(5), back, y)) * by;
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
    return _kor_mask16(_mm512_fpclass_ps_mask(a, kSubnormal), _mm512_fpclass_ps_mask(b, kSubnormal));
}

// A row of `n` units, at least three, of two members each; kNinesRead elements can be read from each member's first.
void sum_row_of_nines(bf16* out, const bf16* in, const int32_t* at, float factor, int64_t n, Ahead ahead) {
    const __m512 by = _mm512_set1_ps(factor);
    bf16 part[kNinesWritten];
    const auto exact = [&](int64_t j, int64_t stop) {
        for (; j < stop; ++j) {
            Sum<bf16, kNinesRead * 2> sum;
            sum.start(in + at[2 * j]);
            sum.add(in + at[2 * j + 1]);
            sum.exact(part, factor);
            memcpy(out + kNine * j, part, kNine * sizeof(bf16));
        }
    };
    const int64_t last = n - kThree;  // written apart, as a vector would go past the row's end
    const bool usual = ahead.usual(kNinesBytes, 2);
    for (int64_t j = 0; j < last;) {
        const int64_t begin = j, stop = min64(j + kNinesGroup, last);
        __mmask16 again = 0;
        ask_for_nines<2>(ahead, out + kNine * j, usual);
        for (; j < stop; j += kThree) again = _kor_mask16(again, sum_nines(out + kNine * j, in, at + 2 * j, by));
        if (again != 0) exact(begin, min64(j, last));
    }
    if (sum_nines(part, in, at + 2 * last, by) != 0) return exact(last, n);
    memcpy(out + kNine * last, part, kThree * kNine * sizeof(bf16));
}
#endif

}  // namespace
}  // namespace MUDSC_ISA
}  // namespace mudsc
