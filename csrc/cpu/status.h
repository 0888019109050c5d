// What a kernel reports; the bindings turn it into a Python exception.
#pragma once

namespace mudsc {

enum class Status {
    ok = 0,
    no_memory,      // scratch memory could not be allocated
    interrupted,    // Poll asked to stop (Ctrl-C)
    not_finite,     // NaN or an infinity in an input that must be finite
    not_symmetric,  // a similarity that differs from its transpose by more than rounding
    infeasible,     // no allowed pair is left
    not_converged,  // a result could not be proven within its tolerance
    unsupported,    // a type that this kernel does not take
};

enum class Dtype : int { f64, f32, f16, bf16, i64, i32, i16, i8, u8, boolean, other };

}  // namespace mudsc
