"""Tracing: equal to the specs written by hand, frozen where it must be, and sound where wholes and parts mix."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_spec_families as families
import torch
from torch import Tensor

from mudsc_fast.axes import rows
from mudsc_fast.layout import dims_of
from mudsc_fast.spec import Axis, PermutationSpec, Space, Tap

# A deep ResNet and a second image size would trace the same rules again.
COMPARED = [n for n in families.CASES if n not in ("resnet20", "resnet bottleneck", "mlp of one hidden layer")]
TIGHT = 1e-10  # float64


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def units(part: Axis | Tap, shape: torch.Size) -> tuple[tuple[int, ...], ...]:
    """The positions of each unit on the dims of an axis, whatever the view says it in."""
    dims = (part.dim,) if isinstance(part, Tap) else dims_of(part)
    sizes = [shape[d] for d in dims]
    flat = torch.arange(torch.Size(sizes).numel()).reshape(sizes)
    moved = part.__class__(**{**part.__dict__, "dim": 0 if len(dims) == 1 else tuple(range(len(dims)))})
    view, where = rows(flat, moved)
    front = view.movedim(where, tuple(range(len(where))))
    table = front.reshape(front.shape[: len(where)].numel(), -1)
    return tuple(tuple(sorted(row)) for row in table.tolist())


def canonical(spec: PermutationSpec, state: dict[str, Tensor]) -> set[object]:
    """A spec without names, orders and ways to say the same."""
    plain: dict[str, object] = {}
    for space in spec:
        axes = [(a.tensor, a.dim, a.role, a.compare, units(a, state[a.tensor].shape)) for a in space.axes]
        assert len(set(axes)) == len(axes)
        plain[space.name] = (space.width, space.blocks, space.within, frozenset(axes))
    tied = {n for names in spec.ties.values() for n in names}
    ties = {frozenset(plain[n] for n in names) for names in spec.ties.values()}
    return {plain[s.name] for s in spec if s.name not in tied} | ties


@pytest.mark.parametrize("name", COMPARED)
def test_equal_to_the_spec_written_by_hand(name: str) -> None:
    model, spec, shape = families.make(name)
    before = model.state_dict()
    model.train()
    found = PermutationSpec.trace(model, torch.randn(shape))
    assert model.training
    state = model.state_dict()
    assert all(torch.equal(state[n], before[n]) for n in state)
    assert canonical(found, state) == canonical(spec, state)
    assert PermutationSpec.from_json(found.to_json()) == found
    x = torch.randn(shape, dtype=torch.float64)
    assert found.verify(model.double(), x, seed=3) < TIGHT
    seen = families._seen(model.eval(), found, x)
    by_axes = {canonical_key(s, state): s for s in spec}
    for space in found:
        twin = by_axes[canonical_key(space, state)]
        other = families._seen(model, PermutationSpec((Space(**{**twin.__dict__, "tie": None}),)), x)
        assert space.taps
        mine = sorted(tuple(seen[t].shape) for t in space.taps)
        assert len(mine) == len(other), space.name
        # The same numbers at the tap, or at least as many samples of them.
        assert all(a[1] >= b[1] for a, b in zip(mine, sorted(tuple(v.shape) for v in other.values()), strict=True))


def canonical_key(space: Space, state: dict[str, Tensor]) -> object:
    return frozenset((a.tensor, a.dim, units(a, state[a.tensor].shape)) for a in space.axes)
