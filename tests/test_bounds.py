"""Upper bounds of similarities inside a model: never too low, and a zip by them is the zip."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from pipeline_cases import assert_same, op_by_op
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import _core, network

ROUNDED = "avx512_bf16"  # the instruction set with products of 8-bit integers


def full_similarity(rows: list[list[Tensor]], balance: float, seen: mf.Covariance | None, bound: bool) -> Tensor:
    """Of terms [term][model] (width, columns), as the kernel gives it."""
    width, models = rows[0][0].shape[0], len(rows[0])
    wide = torch.float64 if rows[0][0].dtype == torch.float64 else torch.float32
    out = torch.empty(models * width, models * width, dtype=wide)
    terms = [[(x, (0,), []) for x in row] for row in rows]
    buffers = None if seen is None else seen._sums.buffers  # type: ignore[union-attr]
    assert _core.similarity(terms, width, models, False, balance, buffers, out, torch.get_num_threads(), bound) is None
    return out


def inside(models: int, width: int) -> Tensor:
    """Which entries are of two units of one model."""
    model = torch.arange(models).repeat_interleave(width)
    return model[:, None] == model[None, :]


KINDS = ["normal", "far from zero", "heavy tails", "one column", "tiny", "dead", "half precision", "double"]


def some_terms(kind: str, models: int, width: int, columns: tuple[int, ...], g: torch.Generator) -> list[list[Tensor]]:
    """Rows of every model, of one tensor for each number of columns; the first model has two that are nearly equal."""
    terms = [[torch.randn(width, c, generator=g) for _ in range(models)] for c in columns if c > 0]
    twins = terms[0][0]
    twins[-1] = twins[0]  # correlated by 1 up to the other tensor's columns
    for row in terms:
        for x in row:
            if kind == "far from zero":
                x += 3
            elif kind == "heavy tails":
                x.copy_(x**9)
            elif kind == "one column":
                x[:, 0] *= 1e4
            elif kind == "tiny":
                x *= 1e-18
            elif kind == "dead":
                x[::3] = 0
    other = {"half precision": torch.bfloat16, "double": torch.float64}.get(kind, torch.float32)
    return [[x.to(other) for x in row] for row in terms]


def activations(models: int, width: int, g: torch.Generator, shared: float = 0.0) -> mf.Covariance:
    """Of random samples; `shared`: what units of one number have in common in all models, beside noise of 1."""
    common = shared * torch.randn(400, width, generator=g)
    seen = mf.Covariance(width, models, "full")
    seen.update([common + torch.randn(400, width, generator=g) for _ in range(models)])
    seen._sums.flush()  # type: ignore[union-attr]
    return seen


# Columns in each of two tensors, around the kernel's chunks; sizes of rows; what the rows look like.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("width", "columns"), [(1, (3, 0)), (7, (5, 30)), (48, (64, 1)), (64, (511, 600)), (101, (513, 3))]
)
@pytest.mark.parametrize("models", [2, 3])
def test_bounds_are_never_too_low(isa: str, models: int, width: int, columns: tuple[int, int], kind: str) -> None:
    g = torch.Generator().manual_seed(width)
    terms = some_terms(kind, models, width, columns, g)
    for balance, activation in ((1.0, None), (0.6, activations(models, width, g))):
        exact = full_similarity(terms, balance, activation, bound=False)
        bounds = full_similarity(terms, balance, activation, bound=True)
        within = inside(models, width)
        assert torch.equal(bounds[~within], exact[~within])
        assert torch.equal(bounds, bounds.T)
        assert bool((bounds >= exact).all())
        if isa != ROUNDED or kind == "double":  # all columns are taken, and none is rounded
            assert torch.equal(bounds, exact)
        elif kind == "normal" and width == 64:
            gap = (bounds - exact)[within & ~torch.eye(models * width, dtype=torch.bool)]
            assert 1e-4 < float(gap.max()) / balance < 0.06  # close enough to be of use, and bounds indeed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "columns"), [(48, (700, 1)), (64, (511, 600)), (101, (513, 700))])
@pytest.mark.parametrize("models", [2, 3])
def test_bounds_of_a_part_of_the_columns(
    isa: str, models: int, width: int, columns: tuple[int, int], kind: str
) -> None:
    """Where activations tell two units of one model from the best pairs, few columns are multiplied, or none."""
    g = torch.Generator().manual_seed(width)
    terms = some_terms(kind, models, width, columns, g)
    seen, within = activations(models, width, g, shared=3.0), inside(models, width)
    within.fill_diagonal_(False)
    raised = []
    for balance in (0.1, 0.5, 0.6):
        exact = full_similarity(terms, balance, seen, bound=False)
        bounds = full_similarity(terms, balance, seen, bound=True)
        assert torch.equal(bounds[~within], exact[~within])
        assert torch.equal(bounds, bounds.T)
        assert bool((bounds >= exact).all())
        raised.append(float((bounds - exact)[within].median()) / balance)
        # No more than if all rows had been equal.
        unmatched = full_similarity(terms, 0.0, seen, bound=False) * (1 - balance)
        assert bool((bounds <= unmatched + balance + 1e-5).all())
    if kind in ("normal", "half precision", "double"):
        none, some, more = raised
        assert none > 0.9  # nothing was multiplied
        assert 0.2 < more < some < 0.8  # parts were


@pytest.mark.parametrize("bound", [False, True])
def test_activations_that_overflow_are_told(isa: str, bound: bool) -> None:
    g = torch.Generator().manual_seed(0)
    terms = [[(torch.randn(50, 60, generator=g), (0,), []) for _ in range(2)]]
    seen = activations(2, 50, g)
    sums = seen._sums
    sums.vectors.fill_(torch.inf)  # type: ignore[union-attr]
    out = torch.empty(100, 100)
    assert _core.similarity(terms, 50, 2, False, 0.5, sums.buffers, out, 1, bound) == -1  # type: ignore[union-attr]


def test_threads_give_the_same_bounds() -> None:
    g = torch.Generator().manual_seed(0)
    rows = [[torch.randn(300, 700, generator=g) for _ in range(2)]]
    before = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(full_similarity(rows, 1.0, None, bound=True))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function: visits so far for which bounds were enough, and those for which they were not."""
    cores: list[_core.Network] = []
    make = network.Network.__init__

    def noted(self: network.Network, core: _core.Network, *rest: Any) -> None:
        cores.append(core)
        make(self, core, *rest)

    monkeypatch.setattr(network.Network, "__init__", noted)

    def counts() -> tuple[int, int]:
        return sum(core.bounded()[0] for core in cores), sum(core.bounded()[1] for core in cores)

    return counts


def mlp(
    widths: tuple[int, ...], models: int, noise: float, seed: int
) -> tuple[mf.PermutationSpec, list[dict[str, Tensor]]]:
    """Models of one base: each in an order of its own, with noise."""
    g = torch.Generator().manual_seed(seed)
    sizes = [20, *widths, 5]
    base = {}
    for k, (before, after) in enumerate(pairwise(sizes)):
        base[f"fc{k}.weight"], base[f"fc{k}.bias"] = (
            torch.randn(after, before, generator=g),
            torch.randn(after, generator=g),
        )
    spec = mf.spec_for(base)
    nets = []
    for m in range(models):
        net = base if m == 0 else spec.permute(base, spec.random_permutation(seed + m))
        nets.append({name: x + noise * torch.randn(x.shape, generator=g) for name, x in net.items()})
    return spec, nets


def statistics(spec: mf.PermutationSpec, models: int, seed: int) -> dict[str, mf.Covariance]:
    """Activations that match unit by unit, in an order that the weights do not know."""
    stats = {}
    for k, space in enumerate(spec.spaces):
        g = torch.Generator().manual_seed(seed + k)
        shared = torch.randn(200, space.width, generator=g)
        stats[space.name] = mf.Covariance(space.width, models, "full")
        stats[space.name].update(
            [shared.roll(m, 1) + 0.5 * torch.randn(shared.shape, generator=g) for m in range(models)]
        )
    return stats


@pytest.mark.parametrize(("balance", "start"), [(0.3, True), (0.9, True), (1.0, False)])
@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize("widths", [(16, 33), (64, 48), (101, 130)])
def test_a_zip_by_bounds_is_the_zip(
    isa: str, widths: tuple[int, ...], models: int, balance: float, start: bool, bounded: Any
) -> None:
    spec, nets = mlp(widths, models, noise=0.2, seed=3)
    stats = statistics(spec, models, seed=9) if start else None
    plain = op_by_op(nets, spec, stats, "zip", balance)
    assert_same(mf.match(nets, spec, stats, "zip", balance), plain)
    if balance != 0.3:
        return
    # The activations decide, and what they match is far above what two units of one model can be.
    if isa == ROUNDED or (models == 2 and min(widths) >= 48):  # elsewhere all columns are taken as they are
        assert bounded()[0] >= 2
        assert bounded()[1] == 0


@pytest.mark.parametrize("attenuation", [-0.5, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("budget", [0.0, 0.5, 1.0])
def test_where_bounds_do_not_tell_all_is_computed(attenuation: float, budget: float, bounded: Any) -> None:
    """Twins in one model, which the activations do not show: they join, or their budget is spent."""
    spec, nets = mlp((64, 40), 2, noise=2.0, seed=5)
    for name, x in nets[0].items():
        if name.startswith("fc0"):
            x[1::2] = x[::2]
        elif name == "fc1.weight":
            x[:, 1::2] = x[:, ::2]
    options: dict[str, Any] = {"attenuation": attenuation, "budget": budget}
    stats = statistics(spec, 2, seed=2)
    plain = op_by_op(nets, spec, stats, "zip", 0.9, **options)
    assert_same(mf.match(nets, spec, stats, "zip", 0.9, **options), plain)
    labels = plain.labels[spec.spaces[0].name]
    twins = int((labels[0, ::2] == labels[0, 1::2]).sum())
    assert twins > 0 or budget == 0
    if _core.isa() == ROUNDED:
        enough, not_enough = bounded()
        assert enough > 0 if budget == 0 else not_enough > 0
        assert budget > 0 or not_enough == 0
