"""Every kernel that this machine can run, held against the float64 reference: what ``mudsc-fast check`` prints."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import _core, backends, reference

# Largest absolute error that is right, by what an operation computes. Correlations and their means are O(1) and are
# accumulated in float32 or better, and written as float32: docs/method.md asks for 1e-5 also at mean/std = 1000.
# bfloat16 has 8 bits: a sum of a few members is within 2**-7 of its size. A permutation moves bits, so it is exact, and
# a labelling is right or wrong.
CORRELATION, HALF_SUM, SUM, EXACT = 1e-5, 2.0**-5, 1e-5, 0.0
VALUE = 1e-5

PIPELINE = "pipeline"
_WIDTH, _SAMPLES = 67, 301  # odd: the last vector and the last block are cut


@dataclass(frozen=True)
class Outcome:
    """One comparison: the largest error of an op on one backend and instruction set, and what is tolerated."""

    op: str
    case: str
    device: str
    backend: str
    isa: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def place(self) -> str:
        """Where it ran: the instruction set of CPU kernels, else the backend."""
        return self.isa if self.backend == "cpu" else f"{self.device} {self.backend} {self.isa}".removesuffix(" -")

    @property
    def ok(self) -> bool:
        """Whether the error is tolerated; NaN is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class _Case:
    op: str
    name: str
    tolerance: float
    error: Callable[[torch.device, str], float]


def run_checks(devices: Sequence[str] = ("cpu",)) -> Iterator[Outcome]:
    """Compare each op on each usable backend of these devices, CPU kernels on each instruction set; one at a time.

    An op that raises has the error infinity and the message as its note. The instruction set in use is as before
    afterwards.
    """
    for device in devices:
        for case in _CASES:
            for backend, isa in _places(case.op, torch.device(device).type):
                yield _outcome(case, device, backend, isa)


def _places(op: str, device_type: str) -> Iterator[tuple[str, str]]:
    """The usable backends of an op, those that call the CPU's kernels once for each instruction set."""
    isas = [str(name) for name in _core.build_info()["isas_usable"]]
    if op == PIPELINE:
        # All ops together, each where `auto` sends it.
        for isa in isas if device_type == "cpu" else ["-"]:
            yield device_type if device_type == "cpu" else "auto", isa
        return
    for backend in backends.BACKENDS:
        if op in backend.ops and backend.device_type == device_type and backend.why_not() is None:
            # host: the CPU's kernels, with tensors moved there and back
            for isa in isas if backend.name in ("cpu", "host") else ["-"]:
                yield backend.name, isa


def _outcome(case: _Case, device: str, backend: str, isa: str) -> Outcome:
    try:
        with _isa(isa):
            error, note = case.error(torch.device(device), backend), ""
    except Exception as raised:  # noqa: BLE001 (whatever goes wrong is the finding)
        error, note = float("inf"), f"{type(raised).__name__}: {raised}"
    return Outcome(case.op, case.name, device, backend, isa, error, case.tolerance, note)


@contextmanager
def _isa(name: str) -> Iterator[None]:
    if name == "-":
        yield
        return
    before = _core.isa()
    _core.use_isa(name)
    try:
        yield
    finally:
        _core.use_isa(before)


def _call(function: Callable[..., Any], backend: str, *args: Any, **options: Any) -> Any:
    """The op on one backend, where it can be told which."""
    if "backend" in inspect.signature(function).parameters:
        options["backend"] = backend
    return function(*args, **options)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _features(seed: int, models: int = 2) -> list[Tensor]:
    """(samples, width) a model, float64: the same features in another order each, with noise."""
    generator = _generator(seed)
    shared = torch.randn(_SAMPLES, _WIDTH, generator=generator, dtype=torch.float64)
    noise = torch.randn(models, _SAMPLES, _WIDTH, generator=generator, dtype=torch.float64)
    return [shared[:, torch.randperm(_WIDTH, generator=generator)] + 0.5 * noise[m] for m in range(models)]


def _similarity(seed: int, models: int = 2) -> Tensor:
    full = torch.corrcoef(torch.cat(_features(seed, models), dim=1).T)
    return ((full + full.T) / 2).float()


def _largest(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        raise ValueError(f"expected shape {tuple(wanted.shape)}, got {tuple(found.shape)}")
    # fmax-like reductions would hide a NaN
    return float((found.double().cpu() - wanted.double().cpu()).abs().max())


def _covariance(dtype: torch.dtype, scope: str, offset: float = 0.0) -> Callable[[torch.device, str], float]:
    def error(device: torch.device, backend: str) -> float:
        features = [(x + offset).to(dtype) for x in _features(1)]
        found = mf.Covariance(_WIDTH, scope=scope, device=device, backend=backend)
        wanted = reference.Covariance(_WIDTH, scope=scope)
        for rows in (slice(0, 100), slice(100, None)):
            found.update([x[rows].to(device) for x in features])
            wanted.update([x[rows] for x in features])
        return _largest(found.correlation(), wanted.correlation())

    return error


def _weight_terms(term: type, device: torch.device) -> list[list[Any]]:
    """A space's linear layer, its bias, and a convolution that reads it, whose outputs are zipped already."""
    generator = _generator(2)
    joined = torch.arange(40) % 29
    scale = 2.0 / torch.bincount(joined, minlength=29)
    terms: list[list[Any]] = [[], [], []]
    for _ in range(2):
        weight, bias, conv = (
            torch.randn(shape, generator=generator).to(device)
            for shape in ((_WIDTH, 50), (_WIDTH,), (40, _WIDTH, 3, 3))
        )
        terms[0].append(weight)
        terms[1].append(term(bias, 0))
        terms[2].append(term(conv, 1, {0: joined.to(device)}, scale.to(device)))
    return terms


def _weights(scope: str) -> Callable[[torch.device, str], float]:
    def error(device: torch.device, backend: str) -> float:
        found = _call(mf.weight_similarity, backend, _weight_terms(mf.Term, device), scope=scope)
        wanted = reference.weight_similarity(_weight_terms(reference.Term, torch.device("cpu")), scope=scope)
        return _largest(found, wanted)

    return error


def _dual(device: torch.device, backend: str) -> float:
    features = [x.float() for x in _features(3)]
    seen, wanted_seen = mf.Covariance(_WIDTH, device=device), reference.Covariance(_WIDTH)
    seen.update([x.to(device) for x in features])
    wanted_seen.update(features)
    found = _call(mf.dual_similarity, backend, _weight_terms(mf.Term, device), seen, 0.3)
    wanted = reference.dual_similarity(_weight_terms(reference.Term, torch.device("cpu")), wanted_seen, 0.3)
    return _largest(found, wanted)


def _assign(n: int, tiled: bool = False) -> Callable[[torch.device, str], float]:
    def error(device: torch.device, backend: str) -> float:
        similarity = torch.corrcoef(torch.randn(2 * n, 50, generator=_generator(4)))[:n, n:]
        if tiled:
            found = _call(mf.assign_tiled, backend, mf.MatrixTiles(similarity.to(device)), candidates=8)
        else:
            found = _call(mf.assign, backend, similarity.to(device))
        indices = found.indices.cpu()
        if not torch.equal(indices.sort().values, torch.arange(n)):
            raise ValueError("the assignment is no permutation")
        # What the permutation is worth, not what the op says it is: another optimum is as right.
        worth = similarity.double()[torch.arange(n), indices].mean()
        best = reference.assign(similarity).value
        return max(_largest(worth, best), _largest(found.value.reshape(()), best))

    return error


def _assign_blocks(device: torch.device, backend: str) -> float:
    similarity = _similarity(5)[:60, _WIDTH : _WIDTH + 60].contiguous()
    found = _call(mf.assign_blocks, backend, similarity.to(device), 5)
    return _largest(found.value.reshape(()), reference.assign_blocks(similarity, 5).value)


def _zip(blocks: int, models: int) -> Callable[[torch.device, str], float]:
    def error(device: torch.device, backend: str) -> float:
        size = 30
        keep = torch.cat([torch.arange(size) + m * _WIDTH for m in range(models)])
        similarity = _similarity(6, models)[keep][:, keep]
        options: dict[str, Any] = {"models": models, "blocks": blocks, "budget": 0.5}
        if blocks > 1:
            options["block_indices"] = torch.stack([torch.arange(blocks).roll(m) for m in range(models)])
        found = _call(mf.zip_units, backend, similarity.to(device), **options)
        wanted = reference.zip_units(similarity, **options)
        if not torch.equal(found.labels.cpu(), wanted.labels):
            raise ValueError(f"{int((found.labels.cpu() != wanted.labels).sum())} units went elsewhere")
        return _largest(found.value.reshape(()), wanted.value)

    return error


def _regroup(dtype: torch.dtype, permutation: bool) -> Callable[[torch.device, str], float]:
    def error(device: torch.device, backend: str) -> float:
        generator = _generator(7)
        tensor = torch.randn(19, _WIDTH, 5, generator=generator).to(dtype)
        order = torch.randperm(_WIDTH, generator=generator)
        size = _WIDTH if permutation else 31
        labels = order if permutation else order % size
        scale = None if permutation else torch.rand(size, generator=generator)
        on = None if scale is None else scale.to(device)
        found = _call(mf.regroup, backend, tensor.to(device), labels.to(device), 1, size, scale=on)
        return _largest(found, reference.regroup(tensor, labels, 1, size, scale))

    return error


def _networks() -> tuple[list[dict[str, Tensor]], dict[str, list[Tensor]]]:
    """Two MLPs and their activations: one is the other in another order of units, with a little noise."""
    generator = _generator(8)
    widths = {"fc1": 24, "fc2": 18, "head": 5}
    states: list[dict[str, Tensor]] = [{}, {}]
    features: dict[str, list[Tensor]] = {}
    before, size = torch.arange(11), 11
    for layer, width in widths.items():
        order = torch.arange(width) if layer == "head" else torch.randperm(width, generator=generator)
        weight, bias = torch.randn(width, size, generator=generator), torch.randn(width, generator=generator)
        for state, rows, columns in ((states[0], slice(None), slice(None)), (states[1], order, before)):
            noisy = weight + 0.1 * torch.randn(weight.shape, generator=generator)
            state[f"{layer}.weight"], state[f"{layer}.bias"] = noisy[rows][:, columns], bias[rows].clone()
        shared = torch.randn(90, width, generator=generator)
        features[layer] = [shared, shared[:, order] + 0.1 * torch.randn(shared.shape, generator=generator)]
        before, size = order, width
    del features["head"]
    return states, features


def _pipeline(method: str) -> Callable[[torch.device, str], float]:
    def error(device: torch.device, backend: str) -> float:
        states, features = _networks()
        spec = mf.specs.mlp((24, 18))
        merged = []
        for package, where in ((mf, device), (reference, torch.device("cpu"))):
            there = [{name: tensor.to(where) for name, tensor in state.items()} for state in states]
            stats: dict[str, Any] = {}
            for space, seen in features.items():
                stats[space] = package.Covariance(seen[0].shape[1], device=where)
                stats[space].update([x.to(where) for x in seen])
            options = {"progress": False} if package is mf else {}
            plan = package.match(there, spec, stats, method=method, balance=0.5, **options)
            merged.append(plan.merge(there))
        found, wanted = merged
        return max(_largest(found[name], wanted[name]) for name in wanted)

    return error


_CASES = (
    _Case("covariance", "float32, full", CORRELATION, _covariance(torch.float32, "full")),
    _Case("covariance", "float32, cross", CORRELATION, _covariance(torch.float32, "cross")),
    _Case("covariance", "bfloat16, full", CORRELATION, _covariance(torch.bfloat16, "full")),
    _Case("covariance", "float32, mean/std 1000", CORRELATION, _covariance(torch.float32, "full", 1000.0)),
    _Case("similarity", "weights, cross", CORRELATION, _weights("cross")),
    _Case("similarity", "weights, full", CORRELATION, _weights("full")),
    _Case("similarity", "weights and activations", CORRELATION, _dual),
    _Case("assign", "one to one", VALUE, _assign(backends.SMALL_ASSIGN + 44)),
    _Case("assign_small", "one to one", VALUE, _assign(_WIDTH)),
    _Case("assign_small", "blocks", VALUE, _assign_blocks),
    _Case("assign_tile", "lists and proof", VALUE, _assign(_WIDTH, tiled=True)),
    _Case("assign_lists", "one to one", VALUE, _assign(_WIDTH, tiled=True)),
    _Case("zip", "two models", VALUE, _zip(1, 2)),
    _Case("zip", "three models, blocks", VALUE, _zip(3, 3)),
    _Case("regroup", "float32, permutation", EXACT, _regroup(torch.float32, True)),
    _Case("regroup", "bfloat16, permutation", EXACT, _regroup(torch.bfloat16, True)),
    _Case("regroup", "float32, sums", SUM, _regroup(torch.float32, False)),
    _Case("regroup", "bfloat16, sums", HALF_SUM, _regroup(torch.bfloat16, False)),
    _Case(PIPELINE, "match, align and merge", SUM, _pipeline("align")),
    _Case(PIPELINE, "match, zip and merge", SUM, _pipeline("zip")),
)
