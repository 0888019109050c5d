"""Experts: read from every layout, matched and merged with planted truth, on a small Mixtral too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import trace_models
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast.spec import PermutationSpec

COUNT, HIDDEN, FEATURES = 4, 6, 5


def tensors(seed: int = 0, count: int = COUNT) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"gate": (count, HIDDEN, FEATURES), "up": (count, HIDDEN, FEATURES), "down": (count, FEATURES, HIDDEN)}
    return {k: torch.randn(s, generator=g) for k, s in {**shapes, "router": (count, FEATURES)}.items()}


def shuffled(experts: mf.Experts, seed: int) -> tuple[mf.Experts, Tensor, Tensor]:
    """The experts in another order with other unit orders; new i is old order[i], its unit u is old units[i, u]."""
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(experts), generator=g)
    units = torch.stack([torch.randperm(experts.hidden, generator=g) for _ in order])
    return experts.take(order.tolist(), units), order, units


def equal(a: mf.Experts, b: mf.Experts) -> bool:
    return all(torch.equal(x, y) for p, q in zip(a.tensors, b.tensors, strict=True) for x, y in zip(p, q, strict=True))


def state_dicts() -> dict[str, Callable[[], dict[str, Tensor]]]:
    t = tensors()
    up_bias, down_bias = torch.randn(COUNT, 2 * HIDDEN), torch.randn(COUNT, FEATURES)
    both = torch.cat([t["gate"], t["up"]], 1)
    mixed = torch.stack([t["gate"], t["up"]], 2).flatten(1, 2)

    def separate(names: tuple[str, ...]) -> dict[str, Tensor]:
        parts = dict(zip(names, ("gate", "up", "down") if len(names) == 3 else ("up", "down"), strict=True))
        return {f"experts.{i}.{n}.weight": t[k][i] for i in range(COUNT) for n, k in parts.items()}

    return {
        "fused": lambda: {"experts.gate_up_proj": both, "experts.down_proj": t["down"], "gate.weight": t["router"]},
        "fused, other way round": lambda: {
            "router.weight": t["router"],
            "router.bias": torch.randn(COUNT),
            "experts.gate_up_proj": mixed.transpose(1, 2).contiguous(),
            "experts.gate_up_proj_bias": up_bias,
            "experts.down_proj": t["down"].transpose(1, 2).contiguous(),
            "experts.down_proj_bias": down_bias,
        },
        "gate_proj": lambda: {**separate(("gate_proj", "up_proj", "down_proj")), "gate.weight": t["router"]},
        "w1": lambda: {**separate(("w1", "w3", "w2")), "gate.weight": t["router"]},
        "fc1 with biases": lambda: {
            **separate(("fc1", "fc2")),
            **{f"experts.{i}.fc1.bias": up_bias[i, :HIDDEN] for i in range(COUNT)},
            **{f"experts.{i}.fc2.bias": down_bias[i] for i in range(COUNT)},
        },
    }


@pytest.mark.parametrize("name", state_dicts())
def test_every_layout_is_read_and_written_again(name: str) -> None:
    state = {f"mlp.{key}": x for key, x in state_dicts()[name]().items()}
    given = {**state, "mlp.shared.weight": torch.zeros(3), "other.experts.0.w1.weight": torch.zeros(1)}
    experts = mf.Experts.from_state_dict(given, "mlp", interleaved=name.endswith("round"))
    assert (len(experts), experts.hidden) == (COUNT, HIDDEN)
    assert experts.routed == (not name.startswith("fc1"))
    back = experts.to_state_dict()
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)
    if name.endswith("round"):
        up = next(f for f, field in enumerate(experts.fields) if field.half == (1, True))
        assert torch.equal(experts.tensors[2][up], tensors()["up"][2].T)


@pytest.mark.parametrize("name", state_dicts())
def test_a_permuted_copy_is_aligned_exactly(name: str) -> None:
    state = state_dicts()[name]()
    experts = mf.Experts.from_state_dict(state, "", interleaved=name.endswith("round"))
    copy, order, units = shuffled(experts, 3)
    match = mf.align_experts([experts, copy])
    assert torch.equal(match.labels, torch.stack([torch.arange(COUNT), order]))
    assert torch.equal(match.units[1], units)
    assert torch.allclose(match.scores, torch.ones_like(match.scores), atol=1e-5)
    assert equal(match.align(copy, 1), experts)
    merged, same = mf.merge_experts([experts, copy])
    assert torch.equal(same.labels, match.labels)
    written, wanted = merged.to_state_dict(), experts.to_state_dict()
    assert all(torch.equal(written[key], wanted[key]) for key in wanted)


def test_noise_weights_and_unpaired_experts() -> None:
    t = tensors()
    a = mf.Experts.of(**t)
    copy, order, _ = shuffled(a, 5)
    noisy = mf.Experts(copy.fields, tuple(tuple(x + 0.05 * torch.randn_like(x) for x in own) for own in copy.tensors))
    merged, match = mf.merge_experts([a, noisy], weights=[3.0, 1.0])
    assert torch.equal(match.labels[1], order)
    aligned = match.align(noisy, 1)
    for k in range(COUNT):
        for x, p, q in zip(merged.tensors[k], a.tensors[k], aligned.tensors[k], strict=True):
            assert torch.allclose(x, (3 * p + q) / 4, atol=1e-6)
    straight = mf.align_experts([a, noisy], pair=False)
    assert torch.equal(straight.labels[1], torch.arange(COUNT))
    assert float(straight.scores[1].min()) < 0.5 < 0.9 < float(match.scores.min())


def test_activations_alone_find_what_weights_do_not_show() -> None:
    a, b = mf.Experts.of(**tensors(0)), mf.Experts.of(**tensors(1))
    g = torch.Generator().manual_seed(2)
    seen = torch.randn(COUNT, 50, HIDDEN, generator=g)
    order = torch.randperm(COUNT, generator=g)
    units = torch.stack([torch.randperm(HIDDEN, generator=g) for _ in range(COUNT)])
    other = torch.stack([seen[i][:, u] for i, u in zip(order, units, strict=True)])
    match = mf.align_experts([a, b], [seen, other], balance=0.1)
    assert torch.equal(match.labels[1], order)
    assert torch.equal(match.units[1], units)


def test_one_layer_into_fewer_finds_the_planted_groups() -> None:
    """Six experts, two each of three kinds in other unit orders: three are left, which are these kinds."""
    base = mf.Experts.of(**tensors(count=3))
    pool, order, _ = shuffled(base.take([0, 1, 2, 0, 1, 2]), 7)
    kind = order % 3
    merged, match = mf.merge_experts(pool, count=3)
    first = [int(kind[match.labels[0] == k][0]) for k in range(3)]
    assert sorted(first) == [0, 1, 2]
    assert all(int(kind[i]) == first[int(match.labels[0, i])] for i in range(6))
    for k in range(3):  # the kind itself, in the order of units of its first member
        member = int((match.labels[0] == k).nonzero()[0])
        assert all(
            torch.allclose(x, y, atol=1e-6) for x, y in zip(merged.tensors[k], pool.tensors[member], strict=True)
        )
    given, told = mf.merge_experts(pool, groups=match.labels[0])
    assert equal(given, merged)
    assert torch.equal(told.units, match.units)
    wide = match.expand(merged, pool)
    assert len(wide) == 6
    x = torch.randn(9, FEATURES)
    for i in range(6):
        assert torch.allclose(forward(wide, i, x), forward(pool, i, x), atol=1e-5)
        assert torch.equal(wide.tensors[i][3], pool.tensors[i][3])
    with pytest.raises(ValueError, match="several experts of one model"):
        match.align(pool, 0)


def forward(experts: mf.Experts, i: int, x: Tensor) -> Tensor:
    gate, up, down, _ = experts.tensors[i]
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def test_usage_decides_who_leads_and_how_much_each_counts() -> None:
    pool = mf.Experts.of(**tensors())
    merged, match = mf.merge_experts(pool, groups=[0, 0, 1, 1], weights=[0.0, 1.0, 1.0, 0.0])
    assert all(torch.equal(x, y) for x, y in zip(merged.tensors[0], pool.tensors[1], strict=True))
    assert all(torch.equal(x, y) for x, y in zip(merged.tensors[1], pool.tensors[2], strict=True))
    assert torch.equal(match.units[0, 1], torch.arange(HIDDEN))
    with pytest.raises(ValueError, match="vanish"):
        mf.merge_experts(pool, groups=[0, 0, 1, 1], weights=[0.0, 0.0, 1.0, 1.0])


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3-MoE"])
def test_a_small_mixture_of_experts_and_its_copy(kind: str) -> None:
    """All experts and their units permuted in every layer: found again, and the merge computes the same."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, inputs = trace_models.ALL[kind]()
    trace_models.randomised(model)
    spec = PermutationSpec.trace(model, (), inputs)
    state = model.state_dict()
    drawn = {name: p for name, p in spec.random_permutation(3).items() if "experts" in name}
    copy = spec.permute(state, drawn)
    merged, moved = dict(state), 0
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp."
        pair = [mf.Experts.from_state_dict(s, prefix) for s in (state, copy)]
        match = mf.align_experts(pair)
        moved += int((match.labels[1] != match.labels[0]).sum())
        aligned = match.align(pair[1], 1).to_state_dict()
        assert all(torch.equal(x, state[name]) for name, x in aligned.items())
        merged.update(match.merge(pair).to_state_dict())
    assert moved > 0
    with torch.no_grad():
        before = model(**inputs).logits.clone()
        model.load_state_dict(merged)
        assert torch.equal(model(**inputs).logits, before)


def test_what_does_not_fit_is_refused() -> None:
    a = mf.Experts.of(**tensors())
    with pytest.raises(ValueError, match="looked for experts"):
        mf.Experts.from_state_dict({"mlp.fc.weight": torch.zeros(2, 2)}, "mlp")
    broken = state_dicts()["w1"]()
    del broken["experts.2.w3.weight"]
    with pytest.raises(ValueError, match=r"experts\.2\.w3\.weight: missing"):
        mf.Experts.from_state_dict(broken, "")
    fused = {**state_dicts()["fused"](), "experts.down_proj": torch.zeros(COUNT, 7, HIDDEN)}
    with pytest.raises(ValueError, match="does not fit"):
        mf.Experts.from_state_dict(fused, "")
    with pytest.raises(ValueError, match="two or more"):
        mf.align_experts([a])
    with pytest.raises(ValueError, match="differs from model 0"):
        mf.align_experts([a, mf.Experts.of(**tensors(count=3))])
    with pytest.raises(ValueError, match=r"balance 0\.5"):
        mf.align_experts([a, a], balance=0.5)
    with pytest.raises(ValueError, match="one tensor a model"):
        mf.align_experts([a, a], activations=[torch.zeros(COUNT, 3, HIDDEN)])
    for options in ({}, {"count": 0}, {"count": 5}, {"groups": [0, 1, 3, 3]}, {"groups": [0, 0]}):
        with pytest.raises(ValueError, match=r"count|groups"):
            mf.merge_experts(a, **options)
    with pytest.raises(ValueError, match="weights"):
        mf.merge_experts(a, count=2, weights=[1.0, 2.0])
