// Half precision on the emulator: storage and conversions; kernels compute in float32.
#pragma once

#include <stdint.h>
#include <string.h>

struct __half {
    uint16_t bits;
};
inline float __half2float(__half x) {
    _Float16 value;
    memcpy(&value, &x, sizeof(value));
    return static_cast<float>(value);
}
inline __half __float2half_rn(float x) {
    const _Float16 value = static_cast<_Float16>(x);
    __half result;
    memcpy(&result, &value, sizeof(result));
    return result;
}
