// Stands in for csrc/cuda/shared.h: shared memory of the emulated block.
#pragma once

#include "simt.h"

namespace mudsc {
namespace cuda {

template <typename T>
T& static_shared() {
    static const char type = 0;
    return *static_cast<T*>(simt::static_shared(&type, sizeof(T)));
}

template <typename T>
T* dynamic_shared() {
    return static_cast<T*>(simt::dynamic_shared());
}

}  // namespace cuda
}  // namespace mudsc
