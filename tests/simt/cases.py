"""Cases for the CUDA launchers, with what must come out: by the CPU kernels, the reference, or the definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import _core
from mudsc_fast.regrouping import segments
from simt.driver import ASSIGN, REGROUP, ZIP, Case

# Numbers of the C++ enum Dtype; what is not there is moved as bits.
DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
# One rounding of the result's type for each of a handful of members, and one of the scale.
TOLERANCE = {torch.float64: 1e-15, torch.float32: 4e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
OTHER = 10
OK, NOT_FINITE, NOT_SYMMETRIC, INFEASIBLE = range(4)


@dataclass
class Checked:
    """A case and what is wrong with its results, "" when nothing is."""

    kernel: str
    case: Case
    verdict: Callable[[], str]
    note: str = ""


def _bits(flat: Tensor) -> np.ndarray:
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.dtype in (torch.float32, torch.float64, torch.int64):
        return flat.numpy().copy()
    return flat.contiguous().view(_BITS[flat.element_size()]).numpy().copy()


def _memory(tensor: Tensor, before: int) -> Tensor:
    """All that lies between a tensor's first and last element, with ``before`` elements in front."""
    if tensor.numel() == 0:
        return tensor.new_zeros(before)
    reach = 1 + sum(stride * (length - 1) for stride, length in zip(tensor.stride(), tensor.shape, strict=True))
    flat = tensor.new_zeros(before + reach)
    flat[before:] = tensor.as_strided((reach,), (1,))
    return flat


# ---- regroup ----


def regroup(
    tensor: Tensor,
    labels: Tensor,
    dim: int,
    size: int,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    offsets: tuple[int, int] = (0, 0),
    **options: int,
) -> Checked:
    """One regrouping; ``out`` gives the strides of the result, ``offsets`` the elements before input and result."""
    shape = [*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]]
    out = torch.zeros(shape, dtype=tensor.dtype) if out is None else out
    ptr, members = segments(labels, tensor.shape[dim], size)[:2]
    single = bool((ptr.diff() == 1).all())
    item = tensor.element_size()
    arrays = [_bits(_memory(tensor, offsets[0])), _bits(_memory(out, offsets[1])), ptr.numpy(), members.numpy()]
    arrays.append(np.zeros(0) if scale is None else scale.double().numpy())
    integers = [DTYPES.get(tensor.dtype, OTHER), item, tensor.dim(), dim, int(single), tensor.shape[dim], *offsets]
    case = Case(REGROUP, [*integers, *shape, *tensor.stride(), *out.stride()], arrays, **options)
    before = case.arrays[1].copy()

    def verdict() -> str:
        if case.error:
            return case.error
        flat = torch.from_numpy(case.arrays[1].view(np.uint8)).view(tensor.dtype)
        got = flat.as_strided(shape, out.stride(), offsets[1])
        untouched = torch.ones(flat.numel(), dtype=torch.bool)
        untouched.as_strided(shape, out.stride(), offsets[1]).fill_(False)
        was = torch.from_numpy(before.view(np.uint8)).view(tensor.dtype)
        if not torch.equal(_whole(flat)[_spread(untouched, flat)], _whole(was)[_spread(untouched, was)]):
            return "wrote outside the result"
        if scale is None and int(ptr.diff().max() if size else 0) <= 1:
            want = mf.regroup(tensor, labels, dim, size)
            return "" if torch.equal(_whole(got.contiguous()), _whole(want.contiguous())) else "a gather is not exact"
        want = mf.reference.regroup(tensor, labels, dim, size, scale)
        allowed = TOLERANCE[tensor.dtype] * mf.reference.regroup(tensor.abs(), labels, dim, size, scale)
        error = (got.double() - want).abs() - allowed - (1e-7 if tensor.dtype == torch.float16 else 0)
        return (
            "" if got.numel() == 0 or float(error.max()) <= 0 else f"error {float(error.max()):g} beyond the tolerance"
        )

    return Checked("regroup", case, verdict, f"{tensor.dtype} {tuple(tensor.shape)} dim {dim} offsets {offsets}")


def _whole(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8) if x.numel() else x.reshape(-1)


def _spread(mask: Tensor, flat: Tensor) -> Tensor:
    return mask.repeat_interleave(flat.element_size()) if flat.numel() else mask


# ---- zip ----


def similarity_of(units: int, generator: torch.Generator, dtype: torch.dtype, ties: bool = False) -> Tensor:
    """A correlation of noisy features, symmetric; with ``ties`` many entries are equal."""
    x = torch.randn(max(8, units // 3), units, generator=generator, dtype=torch.float64)
    x[:, units // 2 :] += x[:, : units - units // 2]
    s = torch.corrcoef(x.T).reshape(units, units)
    s = (s + s.T) / 2
    return ((s * 4).round() / 4 if ties else s).to(dtype)


def zip_problems(
    similarity: Tensor,
    units: Tensor,
    model_of: Tensor,
    models: int,
    merges: int,
    attenuation: float,
    budget: Tensor,
    block_budget: Tensor,
    scratch_short: int = 0,
    steps_a_launch: int = 0,
    stop_at_poll: int = 0,
    **options: int,
) -> Checked:
    """``units``, ``model_of``: (problems, n); budgets: (problems, models). Equal to the CPU kernel, bit for bit.

    steps_a_launch: merges of one launch; 0: the launcher's own number. stop_at_poll: which question whether to stop is
    answered with yes; 0: none.
    """
    problems, n = units.shape
    arrays = [
        _memory(similarity, 0).numpy(),
        units.numpy().copy(),
        model_of.to(torch.int32).numpy(),
        budget.numpy().copy(),
        block_budget.numpy().copy(),
        np.full((problems, n), -7, dtype=np.int64),
        np.zeros(problems),
        np.zeros(problems, dtype=np.int64),
        np.full(problems, -7, dtype=np.int32),
    ]
    integers = [DTYPES[similarity.dtype], n, models, merges, problems, *similarity.stride()]
    integers += [steps_a_launch, stop_at_poll, scratch_short]
    case = Case(ZIP, integers, arrays, reals=[attenuation], **options)

    def verdict() -> str:
        if case.error:
            return case.error
        for q in range(problems):
            owner = torch.full((n,), -7, dtype=torch.int64)
            left, left_here = budget[q].clone(), block_budget[q].clone()
            total, made, status = 0.0, 0, OK
            try:
                total, made = _core.zip(
                    similarity, units[q], model_of[q].to(torch.int32), merges, attenuation, left, left_here, owner, 1
                )
                status = OK if made == merges else INFEASIBLE
            except ValueError as raised:
                status = NOT_FINITE if "finite" in str(raised) else NOT_SYMMETRIC
            got = {"status": case.arrays[8][q], "total": case.arrays[6][q], "made": case.arrays[7][q]}
            if got != {"status": status, "total": total, "made": made}:
                return f"problem {q}: got {got}, expected status {status}, total {total}, made {made}"
            if status not in (OK, INFEASIBLE):
                continue
            if not np.array_equal(case.arrays[5][q], owner.numpy()):
                return f"problem {q}: other units were merged"
            if not (np.array_equal(case.arrays[3][q], left) and np.array_equal(case.arrays[4][q], left_here)):
                return f"problem {q}: other budgets are left"
        return ""

    return Checked("zip", case, verdict, f"{problems} x {n} units, {models} models, {merges} merges")


def random_zip(generator: torch.Generator, most: int = 70, **options: int) -> Checked:
    """A problem of any kind: ties, budgets, several models, several problems side by side."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    models, problems = draw(1, 3), draw(1, 3) if draw(0, 1) else 1
    n = models * draw(1, max(1, most // models))
    dtype = torch.float64 if draw(0, 1) else torch.float32
    similarity = similarity_of(problems * n, generator, dtype, ties=bool(draw(0, 1)))
    units = torch.arange(problems * n).view(problems, n)
    if draw(0, 1):
        units = torch.randperm(problems * n, generator=generator).view(problems, n)
    if draw(0, 2) == 0:
        similarity = similarity.t()
    model_of = (torch.arange(n) * models // n).expand(problems, n).contiguous()
    budget = torch.randint(0, max(1, n // 2) + 1, (problems, models), generator=generator)
    block_budget = torch.randint(0, n + 1, (problems, models), generator=generator)
    attenuation = (0.5, 0.25, 1.0, 0.0)[draw(0, 3)]
    merges, steps = draw(0, n - 1), (0, 1, 2, 7)[draw(0, 3)]
    return zip_problems(
        similarity, units, model_of, models, merges, attenuation, budget, block_budget, steps_a_launch=steps, **options
    )


# ---- assign ----


def assignments(similarity: Tensor, start: Tensor | None = None, **options: int) -> Checked:
    """``similarity``: (a, b, n, n); ``start``: (a, b, 2, n). Held against the definition and the CPU kernel's value."""
    a, b, n, _ = similarity.shape
    problems = a * b
    arrays = [
        _memory(similarity, 0).numpy(),
        np.zeros(0) if start is None else start.double().numpy().copy(),
        np.full((problems, n), -7, dtype=np.int64),
        np.full(problems * (2 + 2 * n), math.nan),
        np.full(problems, -7, dtype=np.int32),
    ]
    integers = [DTYPES[similarity.dtype], n, a, b, *similarity.stride()]
    case = Case(ASSIGN, integers, arrays, **options)

    def verdict() -> str:
        if case.error:
            return case.error
        flat = similarity.reshape(problems, n, n)
        finite = torch.isfinite(flat).all(-1).all(-1).tolist()
        if case.arrays[4].tolist() != [0 if ok else 1 for ok in finite]:
            return f"status {case.arrays[4].tolist()}"
        value, gap, u, v = np.split(case.arrays[3], np.cumsum([problems, problems, problems * n]))
        for q in range(problems):
            if not finite[q]:
                continue
            s, indices = flat[q].double().numpy(), case.arrays[2][q]
            duals = u[q * n : (q + 1) * n], v[q * n : (q + 1) * n]
            if sorted(indices.tolist()) != list(range(n)):
                return f"problem {q}: not one-to-one: {indices.tolist()}"
            size = max(float(np.abs(s).max()), 1e-300)
            if (duals[0][:, None] + duals[1] < s - 1e-12 * size).any():
                return f"problem {q}: the duals are not feasible"
            taken = s[np.arange(n), indices]
            if abs(value[q] - taken.mean()) > 1e-12 * size:
                return f"problem {q}: value {value[q]}, taken {taken.mean()}"
            if not abs(gap[q]) <= 1e-9 * n * size:
                return f"problem {q}: gap {gap[q]}"
            best = float(mf.assign(flat[q]).value)
            if abs(value[q] - best) > 1e-9 * size:
                return f"problem {q}: value {value[q]}, optimum {best}"
        return ""

    return Checked("assign", case, verdict, f"{a} x {b} problems of {n}, {similarity.dtype}")


def random_assignments(generator: torch.Generator, most: int = 40, **options: int) -> Checked:
    """Problems of any kind: ties, dead rows, related features, batch strides, starting duals."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    a, b, n = draw(1, 2), draw(1, 3), draw(1, most)
    dtype = torch.float64 if draw(0, 1) else torch.float32
    kind = draw(0, 4)
    s = torch.randn(a, b, n, n, generator=generator, dtype=torch.float64)
    if kind == 1:
        s = (s * 2).round() / 2
    elif kind == 2:
        s[..., : n // 2, :] = 0
    elif kind == 3:
        i = torch.arange(n, dtype=torch.float64)
        s = (i[:, None] * i).expand(a, b, n, n).clone()
    elif kind == 4:
        s[..., torch.arange(n), torch.randperm(n, generator=generator)] += 6
    s = s.to(dtype)
    if draw(0, 1):
        s = s.view(a * n, b * n).view(a, n, b, n).transpose(1, 2) if s.is_contiguous() else s
    if draw(0, 1):
        s = s.transpose(-1, -2)
    start = None
    if draw(0, 1):
        start = torch.randn(a, b, 2, n, generator=generator, dtype=torch.float64)
    return assignments(s, start, **options)


# ---- regroup, at random ----


def random_regroup(generator: torch.Generator, most: int = 40, **options: int) -> Checked:
    """Any dtype, axis, order of axes, offset; sums, gathers, empty units."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    shape = [draw(1, most if k < 2 else 4) for k in range(draw(1, 4))]
    dtype = (*DTYPES, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex128)[draw(0, 8)]
    base = torch.randn(shape, generator=generator) * 30
    tensor = base.to(dtype)
    order = torch.randperm(len(shape), generator=generator).tolist()
    inverse = torch.tensor(order).argsort().tolist()
    if draw(0, 1):
        tensor = tensor.permute(order).contiguous().permute(inverse)
    if draw(0, 3) == 0:
        wide = torch.zeros([n + draw(0, 3) for n in shape], dtype=dtype)
        tensor = wide[tuple(slice(0, n) for n in shape)].copy_(tensor)
    dim = draw(0, len(shape) - 1)
    length = shape[dim]
    sums = dtype in DTYPES and draw(0, 1) == 1
    if sums:
        size = draw(1, length + 2)
        labels = torch.randint(size, (length,), generator=generator)
    else:
        size = length + (draw(0, 3) if draw(0, 1) else 0)
        labels = torch.randperm(size, generator=generator)[:length]
    scale = torch.rand(size, generator=generator) + 0.5 if sums and draw(0, 1) else None
    result = [*shape[:dim], size, *shape[dim + 1 :]]
    out = torch.zeros([result[d] for d in order], dtype=dtype).permute(inverse) if draw(0, 1) else None
    offsets = (draw(0, 8), draw(0, 8)) if draw(0, 2) == 0 else (0, 0)
    return regroup(tensor, labels, dim, size, scale, out, offsets, **options)


RANDOM = {"regroup": random_regroup, "zip": random_zip, "assign": random_assignments}
