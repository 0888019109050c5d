"""Covariances in Triton's interpreter: dtypes, means, sizes, layouts, unusual inputs, states."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from interpreted_setup import ADD, DTYPES, JUDGED, OBLONG, POINTERS, RAW, SMALL, Case, Error, cut_as, distance, features
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast.backends.triton.configs import ProductConfig


def covariance_error(
    batches: list[list[Tensor]],
    scope: str = "full",
    dim: int = -1,
    config: ProductConfig = SMALL,
    raw: bool | None = None,
    near: ProductConfig | None = None,
) -> float:
    """Error of the correlations of a stream; infinity where `raw` is not what the rule chose, or the means are off."""
    models, width = len(batches[0]), batches[0][0].shape[dim]
    with cut_as(config, near):
        found = mf.Covariance(width, models, scope, backend="triton")
        wanted = mf.reference.Covariance(width, models, scope)
        for batch in batches:
            found.update(batch, dim)
            wanted.update(batch, dim)
        if raw is not None and found._sums.raw is not raw:
            return float("inf")
        got = found.correlation()
    size = (wanted.variance + wanted.mean.square()).sqrt()
    if bool(((found.mean - wanted.mean).abs() > 1e-6 * size).any()):
        return float("inf")
    if scope == "full" and got.dtype == torch.float32 and not torch.equal(got, got.T):
        return float("inf")
    return distance(got, wanted.correlation())


def _stream(dtype: str, ratio: float, scope: str, width: int = 41, models: int = 2, samples: int = 101) -> Error:
    def error(seed: int) -> float:
        whole = [x.to(DTYPES[dtype]) for x in features(samples, width, models, ratio, seed)]
        first = samples * 2 // 3
        batches = [[x[:first] for x in whole], [x[first:] for x in whole]]
        raw = None if dtype == "float32" or 0 < ratio < 3 else ratio == 0
        return covariance_error([b for b in batches if len(b[0])], scope, raw=raw)

    return error


def _changing(parts: list[tuple[int, float]], dtype: str, scope: str, raw: bool) -> Error:
    """A stream whose batches have other means: (samples, mean/deviation) of each."""
    models = 3 if scope == "cross" else 2

    def error(seed: int) -> float:
        batches = [
            [x.to(DTYPES[dtype]) for x in features(n, 70, models, ratio, seed + k)]
            for k, (n, ratio) in enumerate(parts)
        ]
        return covariance_error(batches, scope, config=OBLONG, near=SMALL, raw=raw)

    return error


def layouts(dtype: torch.dtype, seed: int) -> dict[str, tuple[list[Tensor], int]]:
    """Ways in which activations lie in memory: the inputs of two models, and the unit axis."""
    generator = torch.Generator().manual_seed(seed)

    def two(*shape: int) -> list[Tensor]:
        return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(2)]

    def each(change: Callable[[Tensor], Tensor], *shape: int) -> list[Tensor]:
        return [change(x) for x in two(*shape)]

    return {
        "images, aligned": (two(3, 40, 5, 8), 1),
        "images, odd": (two(3, 35, 5, 7), 1),
        "one image": (two(1, 40, 9, 8), 1),
        "channels last": (each(lambda x: x.contiguous(memory_format=torch.channels_last), 3, 40, 4, 5), 1),
        "transposed image": (each(lambda x: x.transpose(2, 3), 2, 33, 4, 6), 1),
        "every second": (each(lambda x: x[:, ::2], 3, 66, 4, 4), 1),
        "tokens": (two(4, 9, 40), -1),
        "token slice": (each(lambda x: x[:, 1:, 40:80], 4, 9, 120), 2),
        "expanded": (each(lambda x: x.expand(3, 9, 40), 1, 9, 40), -1),
        "columns": (two(40, 48), 0),
        "vector": (two(33), 0),
        "a slice of rows": (each(lambda x: x[:45], 90, 40), 1),
        "two kinds": ([two(3, 40, 16)[0], two(3, 16, 40)[0].transpose(1, 2)], 1),
        "unaligned start": (each(lambda x: x[:, 1:41], 50, 64), 1),
    }


IN_PLACE = (
    "images, aligned", "one image", "channels last", "every second", "tokens", "columns", "a slice of rows",
    "unaligned start",
)  # fmt: skip


def _layout(name: str, dtype: str, config: ProductConfig = SMALL) -> Error:
    def error(seed: int) -> float:
        batch, dim = layouts(DTYPES[dtype], seed)[name]
        batch[1] = batch[1] + batch[0].roll(1, dim)
        return covariance_error([batch], dim=dim, config=config)

    return error


def _unusual(name: str) -> Error:
    def error(seed: int) -> float:
        half = [x.bfloat16() for x in features(70, 18, 2, 0.0, seed)]
        if name == "not finite":
            half[0][3, 2], half[0][0, 1], half[1][7, 13] = float("nan"), float("inf"), -float("inf")
            return max(covariance_error([half]), covariance_error([[x.float() for x in half]]))
        if name == "not finite midway":
            whole = features(140, 41, 2, 1.0, seed)
            batches = [[x[40 * k : 40 * k + 50].bfloat16() for x in whole] for k in range(3)]
            batches[1][1][7, 33], batches[2][0][0, 0] = float("inf"), float("nan")
            return max(covariance_error(batches, scope, raw=True) for scope in ("full", "cross"))
        if name == "tiny units":
            # Squares below float32: the rule has to see that these are not zero.
            small = [torch.logspace(-32, -25, 18, dtype=torch.float64).mul(x.double()).bfloat16() for x in half]
            small[0][:, 3] = 0.0
            return covariance_error([small], raw=False)
        if name == "dead units":
            half[0][:, 5], half[1][:, 0] = 0.1, 0.0
            return max(covariance_error([half], raw=True), covariance_error([[x.float() for x in half]]))
        if name == "types change":
            x = features(90, 18, 2, 1.0, seed)
            parts = [[y[30 * k : 30 * k + 30].to(t) for y in x] for k, t in enumerate(DTYPES.values())]
            return max(covariance_error(parts), covariance_error(parts[::-1]))
        if name == "types differ between models":
            return covariance_error([[half[0], features(70, 18, 2, 0.0, seed)[1].half()]])
        if name == "means grow":
            return covariance_error(
                [[(x + 0.7 * k).bfloat16() for x in features(70, 18, seed=seed + k)] for k in range(8)]
            )
        if name == "magnitudes":
            sizes = [s * torch.logspace(-12, 12, 18, dtype=torch.float64) for s in (1.0, 1e-6)]
            both = [x * size for x, size in zip(features(70, 18, 2, 2.0, seed), sizes, strict=True)]
            return max(covariance_error([[x.to(t) for x in both]]) for t in (torch.float32, torch.bfloat16))
        wide = [features(40, 18, seed=seed), [x.float() for x in features(30, 18, seed=seed)]]
        return max(covariance_error(wide), covariance_error(wide[::-1]))

    return error


def _far_apart(seed: int) -> float:
    """Strides past 32 bits; only the pages that are touched take memory."""
    store = torch.empty(2**31 * 5 // 4 + 64, dtype=torch.bfloat16)
    views = [store.as_strided((34, 6), steps) for steps in ((2**31 // 30, 1), (1, 2**31 // 4))]
    worst = 0.0
    for x in views:
        x.copy_(torch.randn(34, 6, generator=torch.Generator().manual_seed(seed)))
        worst = max(worst, covariance_error([[x, x.roll(1, 1)]]), covariance_error([[x, x]], config=POINTERS))
    return worst


def _state(seed: int) -> float:
    """Merging, and states that go to the CPU's accumulators and back."""
    whole = [x.float() for x in features(70, 34, 2, 3.0, seed)]
    worst = 0.0
    for scope in ("full", "cross"):
        truth = mf.reference.Covariance(34, 2, scope)
        truth.update(whole)
        with cut_as(SMALL):
            made = []
            for part in (slice(0, 1), slice(1, 70)):
                made.append(mf.Covariance(34, 2, scope, backend="triton"))
                made[-1].update([x[part] for x in whole])
            made[0].merge(made[1])
            worst = max(worst, distance(made[0].correlation(), truth.correlation()))
            moved = mf.Covariance.from_state_dict(made[0].state_dict(), backend="cpu")
            worst = max(worst, distance(moved.correlation(), truth.correlation()))
            back = mf.Covariance.from_state_dict(moved.state_dict(), backend="triton")
            back.update(whole)
            truth.update(whole)
            worst = max(worst, distance(back.correlation(), truth.correlation()))
            if scope == "full":
                blocks = mf.reference.covariance.cross_blocks(truth.correlation(), 2)
                worst = max(worst, distance(back.correlation_blocks("cross"), blocks))
    return worst


def cases() -> Iterator[Case]:
    """Every comparison of covariances."""
    for dtype in DTYPES:
        raw = ADD if dtype == "float32" else RAW
        for ratio in (0, 1.5, 3, 10, 100):
            scope = "cross" if ratio == 1.5 else "full"
            kernels = raw if ratio == 0 or dtype == "float32" else JUDGED
            yield Case(f"covariance, {dtype}, mean/std {ratio}, {scope}", kernels, _stream(dtype, ratio, scope))
        for width in (1, 31, 32, 33, 65):
            extra = dtype == "float16" or (dtype == "float32" and width in (31, 32))
            error = _stream(dtype, 0, "full", width, 3, 40)
            kernels = ADD if width == 1 else raw  # one unit is a vector, which is copied
            yield Case(f"covariance, {dtype}, width {width}", kernels, error, extra=extra)
        for samples in (1, 31, 32, 33, 64, 65, 130):
            extra = (dtype == "float16" and samples != 33) or (dtype == "float32" and samples in (31, 32, 64, 65))
            error = _stream(dtype, 0, "cross", 41, 2, samples)
            kernels = ADD if samples == 1 else raw
            yield Case(f"covariance, {dtype}, {samples} samples", kernels, error, extra=extra)
    yield Case("covariance, bfloat16, many samples, mean/std 100", JUDGED, _stream("bfloat16", 100, "full", 19, 2, 900))
    for dtype, scope in (("bfloat16", "full"), ("bfloat16", "cross"), ("float16", "cross")):
        kept, left = [(70, 0.0), (33, 1.5), (150, -1.0), (65, 10.0)], [(20, 0.0), (30, 1.0), (330, 10.0), (40, 0.0)]
        for name, parts, stays in (("stay raw", kept, True), ("leave", left, False)):
            title = f"covariance, {dtype}, {scope}, means change and {name}"
            extra = scope == "full" and stays
            yield Case(title, RAW if stays else JUDGED, _changing(parts, dtype, scope, stays), extra=extra)
    for name in layouts(torch.bfloat16, 0):
        yield Case(f"covariance, bfloat16, {name}", RAW if name in IN_PLACE else ADD, _layout(name, "bfloat16"))
    for name in ("images, aligned", "images, odd", "token slice"):
        yield Case(f"covariance, float32, {name}", ADD, _layout(name, "float32"))
    for name in ("images, aligned", "a slice of rows", "tokens"):
        yield Case(
            f"covariance, bfloat16, pointers, {name}",
            ADD if "images" in name else RAW,
            _layout(name, "bfloat16", POINTERS),
        )
    for name in (
        "not finite", "not finite midway", "tiny units", "dead units", "types change", "types differ between models",
        "means grow", "magnitudes", "float64",
    ):  # fmt: skip
        mixed = name in ("types differ between models", "float64")
        yield Case(f"covariance, {name}", ADD if mixed else RAW if name == "means grow" else JUDGED, _unusual(name))
    yield Case("covariance, strides past 32 bits", ADD, _far_apart)
    yield Case("covariance, merging and states", (*ADD, "correlation.mirror_kernel"), _state)
