"""Tracing: equal to the specs written by hand, frozen where it must be, and sound where wholes and parts mix."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_spec_families as families
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mudsc_fast.axes import rows
from mudsc_fast.layout import dims_of
from mudsc_fast.spaces import Axis, Space, Tap
from mudsc_fast.spec import PermutationSpec

# A deep ResNet and a second image size would trace the same rules again.
COMPARED = list(families.CASES)  # every spec written by hand has its traced twin
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


class Between(nn.Module):
    """x (batch, 8) -> 12 hidden units -> `middle` -> 5 outputs."""

    def __init__(self, middle, hidden: int = 12, out: int = 12) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, hidden), nn.Linear(out, 5)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.middle(self.fc1(x)))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (3, 4))


# What lies between two linear layers, and the spaces it leaves as (width, blocks).
BETWEEN = {
    "nothing": (lambda x: x, [(12, 1)]),
    "constant": (lambda x: x * torch.arange(12), []),
    "filled constant": (lambda x: x * torch.full((12,), 2.0), [(12, 1)]),
    "cumsum": (lambda x: x.cumsum(-1), []),
    "flip": (lambda x: x.flip(-1), []),
    "strided": (lambda x: torch.cat((x[:, ::2], x[:, 1::2]), -1), []),
    "unknown": (lambda x: torch.linalg.inv(x[:, None] * x[..., None] + torch.eye(12)).sum(1), []),
    "outer product": (lambda x: (x[:, None] * x[..., None]).softmax(-1).sum(1), [(12, 1)]),
    "two halves": (lambda x: torch.cat((x[:, :4].relu(), x[:, 4:]), -1), [(4, 1), (8, 1)]),
    "halves that meet": (lambda x: torch.cat((x[:, :6] * x[:, 6:], x[:, 6:]), -1), [(6, 1)]),
    "norm in each head": (lambda x: F.layer_norm(heads(x), (4,)).flatten(1), [(12, 3)]),
    # The heads move in each dim, not the dims in each head.
    "softmax over heads": (lambda x: heads(x).softmax(1).flatten(1), [(12, 4)]),
    "sum over heads, added": (lambda x: (heads(x) + heads(x).sum(1, keepdim=True)).flatten(1), [(12, 4)]),
    "norm over all": (lambda x: (heads(x) / heads(x).norm(dim=(1, 2), keepdim=True)).flatten(1), [(12, 3)]),
    "heads that look at heads": (
        lambda x: ((heads(x) @ heads(x).mT).softmax(-1) @ heads(x)).flatten(1),
        [(3, 1), (4, 1)],
    ),
    "cumsum over heads": (lambda x: heads(x).cumsum(1).flatten(1), [(4, 1)]),
    "a head of its own": (lambda x: (heads(x) + heads(x)[:, :1]).flatten(1), [(4, 1)]),
    "heads times a constant": (lambda x: (heads(x) * torch.arange(3.0)[:, None]).flatten(1), [(4, 1)] * 3),
    "roll over heads": (lambda x: heads(x).roll(1, 1).flatten(1), [(4, 1)]),
    "transposed": (lambda x: heads(x).transpose(1, 2).flatten(1), [(12, 3)]),
    "einsum": (
        lambda x: torch.einsum("bhd,bgd->bhg", heads(x), heads(x)).sum(2).repeat(1, 4),
        [(3, 3), (4, 1), (12, 3)],
    ),
    "in place": (lambda x: torch.zeros_like(x).copy_(x).add_(torch.arange(12)), []),
    "written into a part": (lambda x: _written(x), []),
    "the largest": (lambda x: x * F.one_hot(x.argmax(-1), 12), [(12, 1)]),
    "the largest, by its place": (lambda x: x * x.argmax(-1, keepdim=True), []),
    "sorted": (lambda x: x.sort(-1).values, []),
    "chosen": (lambda x: x.gather(1, x.topk(12).indices), [(12, 1)]),
    "by a mask": (lambda x: x.masked_fill(x > 0, 0.5), [(12, 1)]),
    "glu": (lambda x: F.glu(torch.cat((x, x), -1)), [(12, 1)]),
}


def _written(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, 0] = x[:, 1]
    return out + x


@pytest.mark.parametrize("name", BETWEEN)
def test_what_stays_free(name: str) -> None:
    """Each middle leaves the spaces it may, and the law holds; the exact order of results is not the concern."""
    middle, expected = BETWEEN[name]
    torch.manual_seed(0)
    model = Between(middle).double()
    x = torch.randn(6, 8, dtype=torch.float64)
    spec = PermutationSpec.trace(model, x)
    assert spec.verify(model, x, seed=1) < TIGHT
    assert sorted((s.width, s.blocks) for s in spec) == sorted(expected)


def test_frozen_axes_say_why() -> None:
    spec = PermutationSpec.trace(Between(lambda x: x.cumsum(-1)), torch.randn(6, 8))
    reasons = {(f.tensor, f.dim): f.reason for f in spec.frozen}
    assert reasons["fc1.weight", 0] == "cumsum"
    assert reasons["fc1.weight", 1].startswith("input ")
    assert reasons["fc2.weight", 0] == "an output of the model"
    assert not spec.spaces


def test_unused_parameters_and_buffers_are_frozen() -> None:
    model = Between(lambda x: x)
    model.extra = nn.Linear(3, 4)
    model.middle = lambda x, m=model: x * m.scale
    model.register_buffer("scale", torch.rand(12))
    spec = PermutationSpec.trace(model, torch.randn(6, 8))
    reasons = {(f.tensor, f.dim): f.reason for f in spec.frozen}
    assert reasons["extra.weight", 0] == "not used in this forward pass"
    assert reasons["scale", 0] == "a buffer, scale"
    assert reasons["fc1.bias", 0] == "a buffer, scale"


def test_a_model_that_cannot_be_exported() -> None:
    model = Between(lambda x: x if float(x.sum()) > 0 else -x)
    model.train()
    with pytest.raises(ValueError, match=r"torch.export cannot export this model.*by hand"):
        PermutationSpec.trace(model, torch.randn(6, 8))
    assert model.training
    assert not model._forward_hooks
    with pytest.raises(TypeError, match="model: expected a module, got dict"):
        PermutationSpec.trace({}, ())


def test_shapes_that_depend_on_data_freeze() -> None:
    model = Between(lambda x: x[x.sum(-1) > 0].sum(0, keepdim=True))
    x = torch.randn(6, 8)
    spec = PermutationSpec.trace(model, x)
    assert spec.verify(model, x) < 1e-5
    assert not any(a.tensor == "fc1.weight" and a.dim == 0 for s in spec for a in s.axes)


def test_tied_and_meta() -> None:
    """Both names of a tied tensor are moved; on meta the spec is the same."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=100, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    spec = PermutationSpec.trace(model, (torch.zeros(2, 5, dtype=torch.long, device="meta"),))
    assert spec == PermutationSpec.trace(transformers.LlamaForCausalLM(config), (torch.zeros(2, 5, dtype=torch.long),))
    assert model.config.use_cache
    assert {a.tensor for a in spec["residual"].axes} >= {"model.embed_tokens.weight", "lm_head.weight"}
    assert [(s.name, s.width, s.blocks) for s in spec][1:5] == [
        ("layers.0.q", 8, 2), ("layers.0.heads", 2, 2), ("layers.0.v", 16, 2), ("layers.0.mlp", 96, 1),
    ]  # fmt: skip
    assert spec.ties["layers.0.heads"] == ("layers.0.q", "layers.0.heads", "layers.0.v")
    output = [a for a in spec["layers.0.v"].axes if "o_proj" in a.tensor]
    assert [(a.view, a.at) for a in output] == [((2, 4, 8), (0, 2))]
    assert any(f.tensor.endswith("layers.0.self_attn.q_proj.weight") and "in part" in f.reason for f in spec.frozen)
