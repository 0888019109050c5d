"""What Triton's interpreter computes wrongly, put right: bfloat16 rounding and products, and bulk reductions.

Without this, float32 becomes bfloat16 by cutting bits off, products of bfloat16 are products of their bit patterns, and
`descriptor.atomic_add` does not exist. And what it does again at every call is done once a launch: calls inside kernels
otherwise take a third of all time. Tests only: on a GPU none of this code runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def widened(bits: Any) -> Any:
    """bfloat16 bit patterns as float32."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded(values: Any) -> Any:
    """float32 as bfloat16 bit patterns, to nearest, ties to even, as cvt.rn.bf16 rounds; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    up = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, up).astype(np.uint16)


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    source, target = src.dtype.scalar, dst_type.scalar
    data = widened(src.data) if source == tl.bfloat16 else src.data
    if target == tl.bfloat16:
        made = data if source == tl.bfloat16 else rounded(np.asarray(data).astype(np.float32))
        return interpreter.TensorHandle(rounded(made) if source == tl.bfloat16 else made, target)
    return interpreter.TensorHandle(np.asarray(data).astype(interpreter._get_np_dtype(dst_type)), target)


def _fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    return _cast(self, src, dst_type)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    x, y = (widened(h.data) if h.dtype.scalar == tl.bfloat16 else np.asarray(h.data).astype(np.float32) for h in (a, b))
    return interpreter.TensorHandle(np.matmul(x, y).astype(d.data.dtype) + d.data, d.dtype.scalar)


def _descriptor_reduce(self: Any, kind: Any, desc: Any, value: Any, indices: Any) -> Any:
    pointers, mask = desc.materialize_pointers(indices)
    kept = np.where(mask.data, value.data, np.zeros_like(value.data))
    held = interpreter.TensorHandle(kept, value.dtype.scalar)
    other = interpreter.TensorHandle(np.zeros_like(kept), value.dtype.scalar)
    before = (
        self.create_masked_load(pointers, mask, other, None, False)
        if not _OLD
        else self.create_masked_load(pointers, mask, other, None, None, False)
    )
    total = interpreter.TensorHandle(before.data + held.data, value.dtype.scalar)
    return interpreter._interpreter.store(pointers.data, total.data, mask.data)


_OLD = "eviction_policy" in interpreter.InterpreterBuilder.create_masked_load.__code__.co_varnames


class _OnceALaunch:
    """The interpreter's functions in the place of the language's, for every namespace that a launch comes to.

    `_patch_lang` puts them there at every call of a function inside a kernel too, though nothing takes them away before
    the launch ends: it looks through all names of the language to find that nothing is left to do.
    """

    def __init__(self) -> None:
        self._patch, self._launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
        self._seen: set[int] = set()

    def patch(self, fn: Any) -> Any:
        if id(fn.__globals__) in self._seen:
            return None
        self._seen.add(id(fn.__globals__))
        return self._patch(fn)

    def launch(self, executor: Any, *args: Any, **options: Any) -> Any:
        self._seen.clear()
        try:
            return self._launch(executor, *args, **options)
        finally:
            self._seen.clear()


def apply() -> None:
    """Correct the interpreter of this process."""
    builder = interpreter.InterpreterBuilder
    builder.cast_impl = _cast
    builder.create_fp_to_fp = _fp_to_fp
    builder.create_dot = _dot
    builder.create_descriptor_reduce = _descriptor_reduce
    once = _OnceALaunch()
    interpreter._patch_lang = once.patch
    interpreter.GridExecutor.__call__ = lambda executor, *args, **options: once.launch(executor, *args, **options)
