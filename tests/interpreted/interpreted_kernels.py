"""The Triton kernels on CPU tensors: import this before anything else of the package's Triton code, with
TRITON_INTERPRET=1.

Cases are functions of a seed that return the largest error against the float64 reference; what is tolerated stands
beside them. The tests run them with seed 0, `make prove` with the seed it is given, and mutants of the kernels must
fail them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("these kernels run in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts")

import interpreter_fixes
import torch
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import backends
from mudsc_fast import similarity as terms_of
from mudsc_fast.backends.triton import candidates, configs, covariance_sums, similarity_tiles
from mudsc_fast.backends.triton.configs import ProductConfig

interpreter_fixes.apply()
# The launchers with CPU tensors: in this process alone.
backends.BACKENDS = (
    *backends.BACKENDS,
    backends.Backend("triton", "cpu", frozenset({"covariance", "similarity", "assign_tile"})),
)

_tables = getattr(terms_of, "checked_tables", None) or terms_of._tables
CORRELATION = 1e-5  # docs/method.md; usual errors are a hundredth of it
USUAL = 1e-6  # where float32 and its planes lose nothing systematically
SMALL = ProductConfig(32, 32, 32, 4, 2, True, "small tiles: all edges at little cost", chunk=64)
POINTERS = ProductConfig(32, 32, 32, 4, 2, False, "no descriptors", chunk=64, slices=2)
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Error = Callable[[int], float]


@dataclass(frozen=True)
class Case:
    """One comparison: which kernels take part, and how far the result may be from the reference."""

    name: str
    kernels: tuple[str, ...]
    error: Error
    tolerance: float = CORRELATION
    extra: bool = False  # left to `make prove`: another of its kind is among the tests


@contextmanager
def cut_as(config: ProductConfig) -> Iterator[None]:
    """Take this configuration for all products."""
    before = {use: dict(configs.TABLES[use]) for use in ("add", "blend")}
    for use in before:
        configs.TABLES[use] = dict.fromkeys((80, 90, 100), (config,))
    try:
        yield
    finally:
        configs.TABLES.update(before)


def features(samples: int, width: int, models: int = 2, ratio: float = 0.0, seed: int = 0) -> list[Tensor]:
    """Correlated units of standard deviation about 1 and mean `ratio`, float64."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    made = []
    for m in range(models):
        mixed = shared.roll(m, 1) + 0.7 * torch.randn(samples, width, generator=generator, dtype=torch.float64)
        made.append(mixed / 1.22 + ratio * (1 if m % 2 == 0 else -1))
    return made


def matrices(width: int, columns: int, models: int = 2, seed: int = 0) -> list[Tensor]:
    """Related weights, (width, columns) a model, float64."""
    generator = torch.Generator().manual_seed(1000 * width + columns + seed)
    shared = torch.randn(width, columns, generator=generator, dtype=torch.float64)
    noise = torch.randn(models, width, columns, generator=generator, dtype=torch.float64)
    return [shared.roll(m, 0) + 0.5 * noise[m] for m in range(models)]


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference; infinity where shapes differ or anything is NaN."""
    if found.shape != wanted.shape:
        return float("inf")
    gap = (found.double() - wanted.double()).abs()
    return float("inf") if bool(gap.isnan().any()) else float(gap.max())


def covariance_error(
    batches: list[list[Tensor]],
    scope: str = "full",
    dim: int = -1,
    config: ProductConfig = SMALL,
    raw: bool | None = None,
) -> float:
    """Error of the correlations of a stream; infinity where `raw` is not what the rule chose."""
    models, width = len(batches[0]), batches[0][0].shape[dim]
    with cut_as(config):
        found = mf.Covariance(width, models, scope, backend="triton")
        wanted = mf.reference.Covariance(width, models, scope)
        for batch in batches:
            found.update(batch, dim)
            wanted.update(batch, dim)
        if raw is not None and found._sums.raw is not raw:
            return float("inf")
        got = found.correlation()
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


def _layout(name: str, dtype: str, config: ProductConfig = SMALL) -> Error:
    def error(seed: int) -> float:
        batch, dim = layouts(DTYPES[dtype], seed)[name]
        batch[1] = batch[1] + batch[0].roll(1, dim)
        return covariance_error([batch], dim=dim, config=config)

    return error


def _config(use: str, config: ProductConfig, dtype: str) -> Error:
    """One past each tile: a unit, a step and a chunk."""

    def error(seed: int) -> float:
        width, samples = max(config.rows, config.columns) + 1, config.depth + 3
        if use == "add":
            batch = [x.to(DTYPES[dtype]) for x in features(samples, width, 2, 0.0, seed)]
            return covariance_error([batch], "cross", config=config)
        with cut_as(config):
            return similarity_error([[w.to(DTYPES[dtype]) for w in matrices(width, samples, 2, seed)]], "full")

    return error


def _unusual(name: str) -> Error:
    def error(seed: int) -> float:
        half = [x.bfloat16() for x in features(70, 18, 2, 0.0, seed)]
        if name == "not finite":
            half[0][3, 2], half[0][0, 1], half[1][7, 13] = float("nan"), float("inf"), -float("inf")
            return max(covariance_error([half]), covariance_error([[x.float() for x in half]]))
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


def similarity_error(
    terms: list[list[Any]],
    scope: str = "cross",
    activation: list[Tensor] | None = None,
    balance: float = 1.0,
    kept: str = "full",
) -> float:
    """Error of a similarity under the configuration in force."""

    def theirs(entry: Any) -> Any:
        if isinstance(entry, Tensor):
            return entry
        return mf.reference.Term(entry.tensor, entry.dim, entry.labels, entry.scale)

    other = [[theirs(entry) for entry in row] for row in terms]
    if activation is None:
        found = mf.weight_similarity(terms, scope, backend="triton")
        return distance(found, mf.reference.weight_similarity(other, scope))
    models, width = len(activation), activation[0].shape[1]
    seen = mf.Covariance(width, models, kept, backend="triton")
    truth = mf.reference.Covariance(width, models, kept)
    seen.update(activation)
    truth.update(activation)
    found = mf.dual_similarity(terms, seen, balance, scope, backend="triton")
    if scope == "full" and not torch.equal(found, found.T):
        return float("inf")
    return distance(found, mf.reference.dual_similarity(other, truth, balance, scope))


def _weights(width: int, columns: int, dtype: str, scope: str, models: int = 2) -> Error:
    def error(seed: int) -> float:
        with cut_as(SMALL):
            return similarity_error([[w.to(DTYPES[dtype]) for w in matrices(width, columns, models, seed)]], scope)

    return error


def labelled_terms(seed: int) -> list[list[Any]]:
    """Terms whose other axes are in merged coordinates: permuted, zipped, scaled, by factors, and one that lacks a
    unit."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[Any]] = [[], [], [], []]
    scale = torch.rand(20, generator=generator) + 0.5
    for m in range(2):
        labels = torch.randint(0, 20 - m, (26,), generator=generator)
        linear = torch.randn(37, 26, generator=generator)
        rows[0].append(mf.Term(linear, 0, {1: torch.randperm(26, generator=generator)}))
        rows[1].append(mf.Term(torch.randn(26, 37, 3, generator=generator), 1, {0: labels}, scale))
        viewed = torch.randn(37, 2, 13, 5, generator=generator).bfloat16()
        rows[2].append(mf.Term(viewed, 0, {(1, 2): labels}))
        heads, inner = torch.tensor([0, 2, 1, 1]), torch.randint(0, 5, (6,), generator=generator)
        rows[3].append(mf.Term(torch.randn(37, 4, 6, generator=generator), 0, {1: heads, -1: inner}))
    return rows


def _labelled(seed: int) -> float:
    with cut_as(SMALL):
        return similarity_error(labelled_terms(seed))


def weight_layouts(dtype: torch.dtype, seed: int) -> dict[str, list[Any]]:
    """Ways in which a space's tensors lie in memory; 33 units each."""
    generator = torch.Generator().manual_seed(seed)

    def two(*shape: int) -> list[Tensor]:
        return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(2)]

    return {
        "rows": list(two(33, 50)),
        "bias": list(two(33)),
        "in axis": [mf.Term(w, 1) for w in two(50, 33)],
        "conv out": [mf.Term(w, 0) for w in two(33, 6, 3, 3)],
        "conv in": [mf.Term(w, 1) for w in two(6, 33, 3, 3)],
        "channels last": [mf.Term(w.contiguous(memory_format=torch.channels_last), -3) for w in two(6, 33, 3, 3)],
        "fused": [mf.Term(w.view(3, 3, 11, 40)[1], (0, 1)) for w in two(99, 40)],
        "two row dims": [mf.Term(w, (2, 0)) for w in two(3, 40, 11)],
        "every second": [w[:, ::2] for w in two(33, 50)],
        "stride 0": [mf.Term(w[:, None].expand(33, 4, 20), 0) for w in two(33, 20)],
        "different strides": [two(33, 20)[0], two(20, 33)[0].T],
    }


def _weight_layouts(dtype: str) -> Error:
    def error(seed: int) -> float:
        with cut_as(SMALL):
            return similarity_error(list(weight_layouts(DTYPES[dtype], seed).values()), "cross")

    return error


def _blend(dtype: str, kept: str, scope: str, balance: float, pieces: bool = False) -> Error:
    def error(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        seen = [torch.randn(60, 45, generator=generator) for _ in range(3)]
        seen[0][:, 2] = 5.0
        terms: list[list[Any]] = [
            [w.to(DTYPES[dtype]) for w in matrices(45, 150, 3, seed)],
            [w[:, 0].float() for w in seen_like(seed)],
        ]
        before = similarity_tiles.WORKSPACE
        try:
            similarity_tiles.WORKSPACE = 1 if pieces else before
            with cut_as(SMALL):
                return similarity_error(terms, scope, seen, balance, kept)
        finally:
            similarity_tiles.WORKSPACE = before

    return error


def seen_like(seed: int) -> list[Tensor]:
    """Biases of three models."""
    return matrices(45, 1, 3, seed)


def _kept_only(pieces: bool) -> Error:
    """Candidates, reduced costs and single rows of a similarity that is never whole, against the whole."""

    def error(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        width, k = 75, 9
        seen = [torch.randn(60, width, generator=generator) for _ in range(2)]
        activation = mf.Covariance(width, 2, "cross", backend="triton")
        truth = mf.reference.Covariance(width, 2, "cross")
        activation.update(seen)
        truth.update(seen)
        terms = [[w.float() for w in matrices(width, 150, 2, seed)]]
        wanted = mf.reference.dual_similarity(terms, truth, 0.4, "cross")[0].float()
        u, v = torch.rand(width, generator=generator), torch.rand(width, generator=generator)
        before = similarity_tiles.WORKSPACE, similarity_tiles.STRIP
        try:
            similarity_tiles.WORKSPACE = 1 if pieces else before[0]
            similarity_tiles.STRIP = 32
            with cut_as(SMALL), few_columns():
                tiles = similarity_tiles.Similarities(_tables(terms)[0], width, 2, 0.4, activation, CPU)
                indices, values = tiles.candidates(k, v)
                best = tiles.largest(u, v)
                some = torch.tensor([70, 3, 3, 40, 33])
                rows = tiles.rows(some)
        finally:
            similarity_tiles.WORKSPACE, similarity_tiles.STRIP = before
        priced = wanted - v
        return max(
            distance(priced.gather(1, indices), priced.topk(k, dim=1).values),
            distance(values, wanted.gather(1, indices)),
            distance(best, (priced - u[:, None]).amax(dim=1)),
            distance(rows, wanted[some]),
        )

    return error


def _listed(kind: str, n: int, room: int) -> Error:
    """Lists of a tile against all worths: the best columns up to float32's rounding, and bounds that hold exactly."""

    def error(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        store = torch.randn(3, n + 7, generator=generator)
        prices = torch.rand(n, generator=generator, dtype=torch.float64)
        if kind == "ties":
            store, prices = (3 * store).round(), (2 * prices).round()
        if kind == "equal":
            store[:], prices[:] = 0.1, 0.3
            store[1:, n // 2] = 0.7
        if kind == "close":  # what is left of the entries cannot be told apart in float32 before the difference
            prices = 0.5 + 1e-10 * torch.randn(n, generator=generator, dtype=torch.float64)
            store[:] = 0.5
        if kind == "first":  # the column that is met last where a row's turn begins at the second
            store[:, 0] += 10
        if kind == "clumped":  # the best columns fall into few groups
            store[:, 3 :: candidates.BLOCK] += 10
        tile = store.double()[:, :n] if kind == "float64" else store[:, :n]
        worth = tile.double() - prices
        columns, values, threshold, maxima = candidates.assign_tile(tile, seed, prices, room)
        if columns.shape != (3, room) or not torch.equal(maxima, worth.amax(dim=1)):
            return float("inf")
        if room == 0:
            return float(len(threshold))
        index = columns.long()
        distinct = bool((index.sort(dim=1).values.diff(dim=1) > 0).all()) and 0 <= int(index.min()) < n
        left = worth.scatter(1, index, -torch.inf).amax(dim=1)
        if not distinct or not torch.equal(values, tile.double().gather(1, index)) or bool((threshold < left).any()):
            return float("inf")
        if kind == "clumped":  # a bound that is not tight is the price of a kernel that keeps few columns
            return 0.0
        if not torch.equal(threshold, left):
            return float("inf")
        kept = worth.gather(1, index)
        best = worth.topk(room, dim=1).values
        scale = best.abs().amax(dim=1, keepdim=True)
        return float(((kept.sort(dim=1, descending=True).values - best).abs() / scale).max())

    return error


def _spread(seed: int) -> float:
    """Equal columns go to different rows: together the lists of a constant tile have most columns in them."""
    n = 40
    columns = candidates.assign_tile(torch.zeros(n, n), seed, torch.zeros(n, dtype=torch.float64), 4)[0]
    return 0.0 if len(columns.unique()) > n // 2 else float("inf")


def _hybrid(kind: str) -> Error:
    """An assignment whose tiles, lists and proof are the kernels', against the whole similarity's optimum."""

    def error(seed: int) -> float:
        width = 37
        weights = matrices(width, 70, 2, seed)
        if kind == "dead units":
            for w in weights:
                w[::3] = 0.0
        terms = [[w.float() for w in weights]]
        seen = None
        if kind == "both spaces":
            seen = [torch.randn(50, width, generator=torch.Generator().manual_seed(seed + m)) for m in range(2)]
        with cut_as(SMALL), few_columns():
            source = mf.SimilarityTiles(terms, seen, 0.5, backend="triton")
            found = mf.assign_tiled(source, candidates=3, tile_bytes=4 * width * 20, backend="triton")
        whole = mf.SimilarityTiles(terms, seen, 0.5, backend="cpu").tile(torch.arange(width))
        wanted = mf.reference.assign(whole)
        taken = whole.double()[torch.arange(width), found.indices]
        if len(found.indices.unique()) != width or float(found.gap) > 1e-6 * width:
            return float("inf")
        return max(float((wanted.value - taken.mean()).abs()), distance(found.value, wanted.value))

    return error


@contextmanager
def few_columns() -> Iterator[None]:
    """Blocks of few columns, so that a row has several."""
    before = candidates.BLOCK
    candidates.BLOCK = 32
    try:
        yield
    finally:
        candidates.BLOCK = before


def _in_blocks(error: Error) -> Error:
    def inner(seed: int) -> float:
        with few_columns():
            return error(seed)

    return inner


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


_ADD = ("product.add_kernel", "split.split_kernel", "correlation.correlation_kernel")
_BLENDED = ("product.blend_kernel", "split.split_kernel")
_LISTED = ("candidates.collect_kernel", "candidates.order_kernel")


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for ratio in (0, 1.5, 3, 10, 100):
            scope = "cross" if ratio == 1.5 else "full"
            yield Case(f"covariance, {dtype}, mean/std {ratio}, {scope}", _ADD, _stream(dtype, ratio, scope))
        for width in (1, 31, 32, 33, 65):
            extra = dtype == "float16" or (dtype == "float32" and width in (31, 32))
            error = _stream(dtype, 0, "full", width, 3, 40)
            yield Case(f"covariance, {dtype}, width {width}", _ADD, error, extra=extra)
        for samples in (1, 31, 32, 33, 64, 65, 130):
            extra = (dtype == "float16" and samples != 33) or (dtype == "float32" and samples in (31, 32, 64, 65))
            error = _stream(dtype, 0, "cross", 9, 2, samples)
            yield Case(f"covariance, {dtype}, {samples} samples", _ADD, error, extra=extra)
    yield Case("covariance, bfloat16, many samples, mean/std 100", _ADD, _stream("bfloat16", 100, "full", 19, 2, 900))
    for name in layouts(torch.bfloat16, 0):
        yield Case(f"covariance, bfloat16, {name}", _ADD, _layout(name, "bfloat16"))
    for name in ("images, aligned", "images, odd", "token slice"):
        yield Case(f"covariance, float32, {name}", _ADD, _layout(name, "float32"))
    for name in ("images, aligned", "a slice of rows", "tokens"):
        yield Case(f"covariance, bfloat16, pointers, {name}", _ADD, _layout(name, "bfloat16", POINTERS))
    for name in (
        "not finite", "dead units", "types change", "types differ between models", "means grow", "magnitudes", "float64"
    ):  # fmt: skip
        yield Case(f"covariance, {name}", _ADD, _unusual(name))
    yield Case("covariance, strides past 32 bits", _ADD, _far_apart)
    yield Case("covariance, merging and states", (*_ADD, "correlation.mirror_kernel"), _state)
    for use in ("add", "blend"):
        seen = set()
        for chip in configs.TABLES[use].values():
            for config in chip:
                if isinstance(config, ProductConfig) and config.name not in seen:
                    seen.add(config.name)
                    kernels = _ADD if use == "add" else _BLENDED
                    yield Case(f"{use}, one past each tile of {config.name}", kernels, _config(use, config, "bfloat16"))
    for dtype in DTYPES:
        for width, columns in ((1, 40), (31, 32), (33, 65), (65, 31)):
            extra = dtype != "float32" and width != 33
            error = _weights(width, columns, dtype, "full", 3)
            yield Case(f"similarity, {dtype}, {width} x {columns}", _BLENDED, error, extra=extra)
        half = dtype == "float16"
        yield Case(f"similarity, {dtype}, 40 x 300, in chunks", _BLENDED, _weights(40, 300, dtype, "cross"), extra=half)
        yield Case(f"similarity, {dtype}, 9 x 2", _BLENDED, _weights(9, 2, dtype, "cross"))
        yield Case(f"similarity, {dtype}, layouts", _BLENDED, _weight_layouts(dtype), extra=half)
    yield Case("similarity, labelled", _BLENDED, _labelled)
    for kept, scope, balance in (("full", "full", 0.5), ("full", "cross", 0.25), ("cross", "cross", 0.75)):
        yield Case(f"similarity, blend {kept} into {scope}", _BLENDED, _blend("float32", kept, scope, balance))
    yield Case("similarity, blend in pieces", _BLENDED, _blend("bfloat16", "full", "full", 0.5, True))
    kept = (*_BLENDED, *_LISTED)
    yield Case("candidates, reduced costs and rows", kept, _kept_only(False))
    yield Case("candidates, reduced costs and rows, in pieces", (*kept, "product.add_kernel"), _kept_only(True))
    for kind, n, room in (
        ("any", 1, 1), ("any", 31, 31), ("any", 32, 5), ("any", 33, 16), ("any", 65, 17), ("any", 200, 30),
        ("ties", 97, 9), ("equal", 70, 8), ("close", 64, 7), ("clumped", 1700, 16), ("first", 33, 4), ("any", 150, 0),
    ):  # fmt: skip
        error = _in_blocks(_listed(kind, n, room))
        kernels = _LISTED if room else _LISTED[:1]
        yield Case(f"lists of a tile, {kind}, {n} columns, {room} kept", kernels, error, USUAL)
    yield Case("lists of a tile, any, 1100 columns, 128 kept", _LISTED, _listed("any", 1100, 128), USUAL)
    yield Case("lists of a tile, float64, by torch", (), _listed("float64", 40, 6), 0.0)
    yield Case("lists of a tile, any, longer than the kernel's, by torch", (), _listed("any", 300, 129), 0.0)
    yield Case("lists of a tile, equal columns go to different rows", _LISTED, _in_blocks(_spread), 0.0)
    for kind in ("weights", "both spaces", "dead units"):
        yield Case(f"assignment, {kind}", kept, _hybrid(kind), extra=kind == "weights")


CASES = tuple(_cases())
__all__ = ["CASES", "Case", "covariance_sums"]
