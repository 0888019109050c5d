"""Specs as data: what is refused, what is kept, what permuting does; broken specs fail the law.

Tolerances: permutations are exact. A broken spec must miss the law's 1e-5 by far: at least 1e-3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import MLP, ResNet, ViT, randomise_norms
from torch import Tensor, nn

from mudsc_fast import specs
from mudsc_fast.spaces import Axis, Frozen, Space, Tap
from mudsc_fast.spec import PermutationSpec

W, B, V = Axis("fc1.weight", 0, "out"), Axis("fc1.bias", 0, "out"), Axis("fc2.weight", 1, "in")


def space(**changes: Any) -> Space:
    return replace(Space("h", 6, (W, B, V)), **changes)


def made(*spaces: Space) -> PermutationSpec:
    return PermutationSpec(spaces)


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "role": (lambda: Axis("w", 0, "inout"), "axis of w: role must be 'out' or 'in', got 'inout'"),
    "tensor": (lambda: Axis("", 0, "out"), "an axis: tensor must be a name"),
    "dim": (lambda: Axis("w", -1, "out"), "axis of w: dim must be an integer >= 0, got -1"),
    "dim true": (lambda: Axis("w", True, "out"), "axis of w: dim must be an integer"),
    "dims order": (lambda: Axis("w", (1, 0), "out", (2, 3), (0, 1)), "axis of w: several dims must be ascending"),
    "dims text": (lambda: Axis("w", "01", "out"), "axis of w: dim must be integers"),  # type: ignore[arg-type]
    "dims view": (lambda: Axis("w", (0, 1), "out"), "axis of w: several dims .* need a view"),
    "view": (lambda: Axis("w", 0, "out", (2, 0), 0), "axis of w: view must be integers >= 1"),
    "view at": (lambda: Axis("w", 0, "out", (2, 3)), "axis of w: a view .* needs at"),
    "at": (lambda: Axis("w", 0, "out", (2, 3), 2), "axis of w: at=2 does not fit the view"),
    "at none": (lambda: Axis("w", 0, "out", (2, 3), ()), "axis of w: at=.* at least one"),
    "at twice": (lambda: Axis("w", 0, "out", (2, 3), (1, 1)), "axis of w: at=.* must name each factor once"),
    "at without view": (lambda: Axis("w", 0, "out", None, 1), "axis of w: at=1 does not fit the view None"),
    "pick index": (lambda: Axis("w", 0, "out", (3, 4), 1, (0, 3)), "axis of w: pick=.* does not fit the view"),
    "pick factor": (lambda: Axis("w", 0, "out", (3, 4), 1, (2, 0)), "axis of w: pick=.* does not fit the view"),
    "pick at": (lambda: Axis("w", 0, "out", (3, 4), 1, (1, 0)), "axis of w: pick and at both name factor 1"),
    "pick view": (lambda: Axis("w", 0, "out", pick=(0, 0)), "axis of w: pick=.* does not fit the view None"),
    "compare": (lambda: Axis("w", 0, "out", compare=1), "axis of w: compare must be"),  # type: ignore[arg-type]
    "part": (lambda: Axis("w", 0, "out", part=(3,)), "axis of w: part must be"),  # type: ignore[arg-type]
    "part empty": (lambda: Axis("w", 0, "out", part=(3, 0)), "axis of w: part must be"),
    "part view": (lambda: Axis("w", 0, "out", (2, 3), 0, part=(3, 5)), "axis of w: the view .* length 5 of its part"),
    "port": (lambda: Tap("m", "inside", 1), "tap of 'm': port must be 'input' or 'output', got 'inside'"),
    "tap module": (lambda: Tap(3, "input", 1), "a tap: module must be a name"),  # type: ignore[arg-type]
    "tap dim": (lambda: Tap("m", "input", 1.0), "tap of 'm': dim must be an integer"),  # type: ignore[arg-type]
    "tap view": (lambda: Tap("m", "input", 1, (2, 3)), "tap of 'm': a view .* needs at"),
    "name": (lambda: space(name=""), "a space: name must be a name"),
    "axes": (lambda: space(axes=("fc1.weight",)), "space 'h': axes must be a sequence of Axis"),
    "no axes": (lambda: space(axes=()), "space 'h': has no axes"),
    "taps": (lambda: space(taps=(W,)), "space 'h': taps must be a sequence of Tap"),
    "width": (lambda: space(width=0), "space 'h': width must be an integer >= 1, got 0"),
    "blocks": (lambda: space(blocks=4), "space 'h': blocks must divide the width 6, got 4"),
    "within": (lambda: space(within="loose"), "space 'h': within must be 'free' or 'fixed', got 'loose'"),
    "tie": (lambda: space(tie=""), "space 'h': tie must be a name"),
    "units of a view": (
        lambda: space(axes=(W, Axis("o", 1, "in", (2, 4), (0, 1)))),
        "space 'h': tensor o gives 8 units, expected the width 6",
    ),
    "units of a tap": (
        lambda: space(taps=(Tap("m", "input", 1, (2, 4), 1),)),
        "space 'h': tap 'm' gives 4 units, expected the width 6",
    ),
    "units of a part": (
        lambda: space(axes=(Axis("cat", 0, "out", part=(2, 5)),)),
        "space 'h': tensor cat gives 5 units, expected the width 6",
    ),
    "block factor": (
        lambda: space(blocks=3, axes=(Axis("o", 1, "in", (2, 3), (0, 1)),)),
        r"space 'h': tensor o: the first factor in at=\(0, 1\) has size 2, expected the 3 blocks",
    ),
    "spaces": (lambda: PermutationSpec(("h",)), "spaces: expected a sequence of Space"),  # type: ignore[arg-type]
    "same name": (lambda: made(space(), space()), "two spaces have the name 'h'"),
    "tie blocks": (
        lambda: made(space(blocks=2, tie="t"), Space("v", 6, (Axis("v", 0, "out"),), blocks=3, tie="t")),
        "tie 't': its spaces have different numbers of blocks, {'h': 2, 'v': 3}",
    ),
    "covered twice": (
        lambda: made(space(), Space("g", 6, (V,))),
        "fc2.weight dim 1: a factor is covered twice, by space 'h' and by space 'g'",
    ),
    "one line doubled": (
        lambda: made(space(axes=(W, B, B, V))),
        "fc1.bias dim 0: a factor is covered twice, by space 'h' and by space 'h'",
    ),
    "one line doubled, width 1": (
        lambda: made(Space("h", 1, (B, B))),
        "fc1.bias dim 0: a factor is covered twice",
    ),
    "picks doubled": (
        lambda: made(Space("h", 4, (Axis("qkv", 0, "out", (3, 4), 1, (0, 1)), Axis("qkv", 0, "out", (12,), 0)))),
        "expected the width 4",
    ),
    "factor doubled under a view": (
        lambda: made(
            Space("a", 2, (Axis("o", 1, "in", (2, 3, 4), 0),)),
            Space("b", 6, (Axis("o", 1, "in", (6, 4), 0),)),
        ),
        "o dim 1: a factor is covered twice, by space 'a' and by space 'b'",
    ),
    "overlap in part": (
        lambda: made(
            Space("a", 6, (Axis("cat", 0, "out", part=(0, 6)),)),
            Space("b", 6, (Axis("cat", 0, "out", part=(4, 6)),)),
        ),
        "cat dim 0: the positions of space 'b' are covered twice, in part by space 'a'",
    ),
    "views that do not fit": (
        lambda: made(
            Space("a", 2, (Axis("o", 1, "in", (2, 6), 0),)),
            Space("b", 4, (Axis("o", 1, "in", (3, 4), 1),)),
        ),
        r"o: the views \(2, 6\) and \(3, 4\) of one axis do not fit together",
    ),
    "sizes": (
        lambda: made(space(), Space("g", 8, (Axis("fc1.weight", 1, "in"), Axis("fc1.weight", 0, "out", (4, 8), 1)))),
        "fc1.weight dim 0: has size 6 in one axis and 32 in another",
    ),
    "past the end": (
        lambda: made(
            Space("a", 6, (Axis("cat", 0, "out", (6, 1), 0),)), Space("b", 3, (Axis("cat", 0, "out", part=(4, 3)),))
        ),
        "cat dim 0: a part ends at 7, past its size 6",
    ),
    "roles": (
        lambda: made(Space("a", 2, (Axis("o", 1, "in", (2, 3), 0),)), Space("b", 3, (Axis("o", 1, "out", (2, 3), 1),))),
        "o dim 1: has role 'out' in one axis and 'in' in another",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_at_of_one_factor_is_an_int() -> None:
    assert Axis("w", 0, "out", [2, 3], [1]) == Axis("w", 0, "out", (2, 3), 1)  # type: ignore[arg-type]
    assert Axis("w", (1,), "out") == Axis("w", 1, "out")


def test_frozen_data() -> None:
    spec = specs.mlp((6,))
    with pytest.raises(FrozenInstanceError):
        spec["fc1"].width = 3  # type: ignore[misc]
    assert hash(spec) == hash(specs.mlp((6,)))


def test_lookup() -> None:
    spec = specs.mlp((6, 5))
    assert len(spec) == 2
    assert [s.name for s in spec] == ["fc1", "fc2"]
    assert "fc1" in spec
    assert "head" not in spec
    assert spec.neighbours("fc1") == ("fc2",)
    assert spec.ties == {}
    with pytest.raises(KeyError, match="no space 'head'; there are fc1, fc2"):
        spec["head"]


def test_neighbours_follow_what_is_compared() -> None:
    """A space on two dims is its own neighbour; an axis that is not compared makes no neighbours of its space."""
    spec = made(
        Space("a", 3, (Axis("w", 0, "out"), Axis("w", 1, "in"), Axis("x", 0, "out", compare=False))),
        Space("b", 4, (Axis("x", 1, "in"),)),
        Space("c", 5, (Axis("y", 0, "out", (2, 5), 1, (0, 0)),)),
        Space("d", 5, (Axis("y", 0, "out", (2, 5), 1, (0, 1)),)),
    )
    assert spec.neighbours("a") == ("a",)
    assert spec.neighbours("b") == ("a",)
    assert spec.neighbours("c") == ()  # picks of one axis do not meet


def test_check_names_what_does_not_fit() -> None:
    spec = specs.mlp((6, 5))
    state = MLP(4, (6, 5)).state_dict()
    spec.check(state)
    spec.check({n: tuple(t.shape) for n, t in state.items()}, ["fc2", "head"])
    with pytest.raises(ValueError, match=r"spec: unknown tensor 'fc2.bias'; the model has fc1.weight"):
        spec.check({n: t for n, t in state.items() if n != "fc2.bias"})
    with pytest.raises(ValueError, match=r"fc2.weight dim 1: expected the width 6 of space 'fc1', got shape \(5, 7\)"):
        spec.check({**state, "fc2.weight": torch.zeros(5, 7)})
    with pytest.raises(ValueError, match=r"fc2.weight: space 'fc1' names dim 1, but the shape is \(5,\)"):
        spec.check({**state, "fc2.weight": torch.zeros(5)})
    with pytest.raises(ValueError, match="space 'fc2' is tapped at an unknown module 'head'"):
        spec.check(state, ["fc2"])
    with pytest.raises(ValueError, match=r"qkv.*view \(3, 3, 8\) does not factor the sizes \(70,\)"):
        specs.vit(1, 24, 3).check({n: (70, 24) if "qkv.w" in n else s for n, s in vit_shapes().items()})


def vit_shapes() -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in ViT(16, 4, width=24, depth=1, num_heads=3).state_dict().items()}


SPECS = {
    "mlp": specs.mlp((6, 5)),
    "resnet": specs.resnet((1, 1), 8, "bottleneck", "group", 4),
    "vit": specs.vit(2, 24, 3, qk_norm=True),
    "odd": PermutationSpec(
        (
            Space("a", 6, (Axis("w", (0, 2), "in", (3, 2), (0, 1)),), (Tap("", "output", -1),), 3, "fixed", "t"),
            Space("b", 9, (Axis("cat", 0, "out", (3, 3), (0, 1), part=(3, 9)),), blocks=3, tie="t"),
        ),
        (Frozen("w", 1, "reaches the output"),),
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_json_round_trip(name: str) -> None:
    spec = SPECS[name]
    back = PermutationSpec.from_json(spec.to_json())
    assert back == spec
    assert back.frozen == spec.frozen
    assert back.to_json() == spec.to_json()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"spaces": 3}',
        '{"spaces": [{"name": "a", "width": 3}]}',
        '{"spaces": [{"name": "a", "width": 3, "axes": [{"tensor": "w", "dim": 0, "role": "out", "evil": 1}]}]}',
        '{"spaces": [{"name": "a", "width": "3", "axes": [{"tensor": "w", "dim": 0, "role": "out"}]}]}',
        '{"spaces": [{"name": "a", "width": 3, "axes": [{"tensor": "w", "dim": 0, "role": "out", "view": "3"}]}]}',
        '{"spaces": ["a"]}',
    ],
)
def test_json_that_is_no_spec(text: str) -> None:
    with pytest.raises(ValueError):
        PermutationSpec.from_json(text)


def test_json_is_data_only() -> None:
    data = json.loads(SPECS["mlp"].to_json())
    assert data["spaces"][0]["axes"][0] == {"tensor": "fc1.weight", "dim": 0, "role": "out"}


@pytest.mark.parametrize("name", SPECS)
def test_random_permutation_keeps_blocks_and_ties(name: str) -> None:
    spec = SPECS[name]
    p = spec.random_permutation(4)
    again = spec.random_permutation(4)
    other = spec.random_permutation(5)
    assert list(p) == [s.name for s in spec]
    assert any(not torch.equal(p[n], other[n]) for n in p)
    for s in spec:
        assert p[s.name].dtype == torch.int64
        assert torch.equal(p[s.name], again[s.name])
        assert torch.equal(p[s.name].sort().values, torch.arange(s.width))
        assert not torch.equal(p[s.name], torch.arange(s.width))
        blocks = p[s.name].reshape(s.blocks, -1) // (s.width // s.blocks)
        assert torch.equal(blocks, blocks[:, :1].expand_as(blocks))
        if s.within == "fixed":
            inner = p[s.name].reshape(s.blocks, -1) % (s.width // s.blocks)
            assert torch.equal(inner, torch.arange(inner.shape[1]).expand_as(inner))
        for tied in spec.ties.get(s.tie or "", ()):
            each = spec[tied].width // spec[tied].blocks
            assert torch.equal(p[tied][::each] // each, blocks[:, 0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), second=st.integers(0, 10**6))
def test_permute_composes_and_inverts(seed: int, second: int) -> None:
    spec = SPECS["vit"]
    state = ViT(16, 4, width=24, depth=2, num_heads=3, qk_norm=True).state_dict()
    p, q = spec.random_permutation(seed), spec.random_permutation(second)
    there = spec.permute(state, p)
    back = spec.permute(there, {n: torch.argsort(i) for n, i in p.items()})
    assert all(torch.equal(back[n], state[n]) for n in state)
    twice = spec.permute(there, q)
    once = spec.permute(state, {n: p[n][q[n]] for n in p})
    assert all(torch.equal(twice[n], once[n]) for n in state)


class Lazy(Mapping[str, Tensor]):
    """A mapping that is no dict and reads each tensor when it is asked for."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Tensor:
        return self.state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def test_permute_leaves_its_input_alone() -> None:
    model = randomise_norms(ResNet((1,), 8))
    spec = specs.resnet((1,), 8)
    state = model.state_dict(keep_vars=True)
    before = {n: t.detach().clone() for n, t in state.items()}
    p = spec.random_permutation(0)
    after = spec.permute(state, p)
    assert list(after) == list(state)
    assert type(after) is dict
    for n in state:
        assert torch.equal(state[n].detach(), before[n])
        assert after[n].data_ptr() != state[n].data_ptr()
        assert not after[n].requires_grad
        assert after[n].dtype == state[n].dtype
    lazy = spec.permute(Lazy(model.state_dict()), p)
    assert all(torch.equal(lazy[n], after[n]) for n in after)
    some = spec.permute(state, {"stem": p["stem"]})
    assert torch.equal(some["layer1.0.bn1.weight"], state["layer1.0.bn1.weight"])
    assert torch.equal(some["conv1.weight"], state["conv1.weight"][p["stem"]])


@pytest.mark.parametrize(
    ("name", "permutation", "message"),
    [
        ("mlp", {"nothing": torch.arange(6)}, "perm: unknown space 'nothing'; there are fc1, fc2"),
        ("mlp", {"fc1": torch.arange(5)}, "permutation of space 'fc1': expected each of 0..5 once"),
        ("mlp", {"fc1": torch.tensor([0, 1, 2, 3, 4, 4])}, "permutation of space 'fc1': expected each of 0..5 once"),
        ("mlp", {"fc1": torch.arange(6.0)}, "permutation of space 'fc1': expected each of 0..5 once"),
        ("vit", {"blocks.0.v": torch.arange(24).roll(1)}, "'blocks.0.v': units of one block go to different blocks"),
        ("vit", {"blocks.0.v": torch.arange(24).roll(8)}, r"tied spaces blocks.0.heads, blocks.0.v .* move blocks"),
        ("odd", {"a": torch.tensor([1, 0, 2, 3, 4, 5])}, r"'a': only whole blocks may move"),
    ],
)
def test_permutations_that_break_the_spec(name: str, permutation: dict[str, Tensor], message: str) -> None:
    spec = SPECS[name]
    state = {
        "mlp": lambda: MLP(4, (6, 5)).state_dict(),
        "vit": lambda: ViT(16, 4, width=24, depth=2, num_heads=3, qk_norm=True).state_dict(),
        "odd": lambda: {"w": torch.zeros(3, 4, 2), "cat": torch.zeros(12)},
    }[name]()
    with pytest.raises(ValueError, match=message):
        spec.permute(state, permutation)


def test_what_is_no_permutation_and_no_seed_is_named() -> None:
    spec = SPECS["mlp"]
    state = MLP(4, (6, 5)).state_dict()
    with pytest.raises(TypeError, match="perm: expected a mapping from spaces to indices, got int"):
        spec.permute(state, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seed: expected an integer, got 'one'"):
        spec.random_permutation("one")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed: expected an integer of 64 bits"):
        spec.random_permutation(1 << 70)


def without(spec: PermutationSpec, tensor: str) -> PermutationSpec:
    return PermutationSpec(
        tuple(replace(s, axes=tuple(a for a in s.axes if a.tensor != tensor)) for s in spec)
    )  # fmt: skip


def turned(spec: PermutationSpec, name: str, tensor: str, **changes: Any) -> PermutationSpec:
    def axis(a: Axis) -> Axis:
        return replace(a, **changes) if a.tensor == tensor else a

    return PermutationSpec(
        tuple(replace(s, axes=tuple(axis(a) for a in s.axes)) if s.name == name else s for s in spec)
    )  # fmt: skip


def loosened(spec: PermutationSpec, **changes: Any) -> PermutationSpec:
    return PermutationSpec(tuple(replace(s, **changes) if s.name.startswith("blocks.") else s for s in spec))


VIT = specs.vit(1, 24, 3, 24)
BROKEN: dict[str, tuple[Callable[[], nn.Module], PermutationSpec, Tensor]] = {
    "missing bias": (lambda: MLP(6, (8,)), without(specs.mlp((8,)), "fc1.bias"), torch.randn(3, 6)),
    "missing reader": (lambda: MLP(6, (8, 8)), without(specs.mlp((8, 8)), "fc2.weight"), torch.randn(3, 6)),
    "wrong axis": (
        lambda: MLP(8, (8,)), turned(specs.mlp((8,)), "fc1", "fc1.weight", dim=1), torch.randn(3, 8),
    ),
    "missing statistics": (
        lambda: ResNet((1,), 8), without(specs.resnet((1,), 8), "bn1.running_mean"), torch.randn(2, 3, 8, 8),
    ),
    "missing stream": (
        lambda: ResNet((2,), 8), without(specs.resnet((2,), 8), "layer1.1.bn2.weight"), torch.randn(2, 3, 8, 8),
    ),
    "groups ignored": (
        lambda: ResNet((1,), 8, norm="group", groups=4),
        specs.resnet((1,), 8, norm="group", groups=1),
        torch.randn(2, 3, 8, 8),
    ),
    "wrong groups": (
        lambda: ResNet((1,), 8, norm="group", groups=4),
        specs.resnet((1,), 8, norm="group", groups=2),
        torch.randn(2, 3, 8, 8),
    ),
    "untied heads": (lambda: vit_model(), loosened(VIT, tie=None), torch.randn(2, 3, 16, 16)),
    "wrong blocks": (
        lambda: vit_model(),
        PermutationSpec(tuple(replace(s, blocks=1, tie=None) for s in VIT)),
        torch.randn(2, 3, 16, 16),
    ),
    "missing class token": (lambda: vit_model(), without(VIT, "cls_token"), torch.randn(2, 3, 16, 16)),
}  # fmt: skip


def vit_model() -> nn.Module:
    """A ViT whose attention and tokens matter: at their initial scale they hardly change its output."""
    model = ViT(16, 4, width=24, depth=1, num_heads=3, hidden=24)
    for name, tensor in model.state_dict().items():
        if "qkv.weight" in name or "token" in name or "pos" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
    return model


@pytest.mark.parametrize("name", BROKEN)
def test_broken_specs_fail_the_law(name: str) -> None:
    torch.manual_seed(0)
    build, spec, x = BROKEN[name]
    model = randomise_norms(build())
    assert spec.verify(model, x) > 1e-3


def test_verify_leaves_the_model_as_it_was() -> None:
    model = randomise_norms(ResNet((1,), 8)).train()
    model.layer1.eval()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    assert specs.resnet((1,), 8).verify(model, (torch.randn(2, 3, 8, 8),)) < 1e-5
    assert model.training
    assert not model.layer1.training
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


class Named(nn.Module):
    """Takes a keyword, returns a dict whose hidden part follows the units."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MLP(6, (8,), 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = torch.relu(self.body.fc1(x))
        return {"logits": self.body.head(hidden), "hidden": (hidden,), "count": torch.tensor(3)}


def test_verify_of_keywords_and_parts_of_the_output() -> None:
    spec = specs.mlp((8,), ("body.fc1", "body.head"))
    model, inputs = Named(), {"x": torch.randn(4, 6)}
    assert spec.verify(model, inputs) < 1e-5  # the logits alone
    assert spec.verify(model, inputs, select=lambda out: out) > 1e-3
    with pytest.raises(ValueError, match="no floating tensor"):
        spec.verify(model, inputs, select=lambda out: out["count"])
    with pytest.raises(ValueError, match=r"unknown tensor 'fc1.weight'"):
        specs.mlp((8,)).verify(model, inputs)
    assert PermutationSpec(()).verify(model, inputs) == 0.0


def test_verify_reports_nan_as_infinite() -> None:
    model = MLP(6, (8,))
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    assert specs.mlp((8,)).verify(model, torch.randn(2, 6)) == float("inf")
