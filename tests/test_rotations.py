"""Rotations of streams and heads: the best map, the kept function, planted rotations, and what cannot be rotated."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import networks
import numpy as np
import pytest
import scipy.linalg
import torch
from language_models import network, spec_of
from torch import Tensor, nn

import mudsc_fast as mf
from mudsc_fast import law, orthogonal, rotations


def _random(kind: str, blocks: int, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return orthogonal.nearest(torch.randn(blocks, n, n, generator=generator, dtype=torch.float64), kind)


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64])
def test_nearest_is_the_procrustes_optimum(n: int) -> None:
    generator = np.random.default_rng(n)
    first, second = generator.standard_normal((2, n, 100))
    found = orthogonal.nearest(torch.from_numpy(first @ second.T)[None])[0].numpy()
    wanted, _ = scipy.linalg.orthogonal_procrustes(second.T, first.T)
    assert np.linalg.norm(found @ second - first) == pytest.approx(
        np.linalg.norm(second.T @ wanted - first.T), rel=1e-12
    )
    assert np.abs(found - wanted.T).max() < 1e-9
    assert np.abs(found @ found.T - np.eye(n)).max() < 1e-12


@pytest.mark.parametrize("kind", orthogonal.KINDS)
@pytest.mark.parametrize("n", [2, 6, 16])
def test_no_map_of_the_kind_is_better(kind: str, n: int) -> None:
    crossed = torch.randn(3, n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    found = orthogonal.nearest(crossed, kind)
    best = (found * crossed).sum((1, 2))
    assert (found @ found.mT - torch.eye(n)).abs().max() < 1e-12
    for seed in range(50):
        other = _random(kind, 3, n, seed)
        for tried in (other, found @ other):  # all maps of a kind are a group
            assert bool(((tried * crossed).sum((1, 2)) <= best + 1e-9).all())


def test_kinds_are_what_they_say() -> None:
    mean = _random("mean", 2, 7, 0)
    assert (mean.sum(-1) - 1).abs().max() < 1e-12
    assert (mean - _random("any", 2, 7, 0)).abs().max() > 0.1
    basis = orthogonal.without_mean(7)
    assert (basis.T @ basis - torch.eye(6)).abs().max() < 1e-12
    assert basis.sum(0).abs().max() < 1e-12
    for kind, partner in (("halves", 3), ("neighbours", 1)):
        turn = _random(kind, 1, 6, 0)[0]
        assert int((turn != 0).sum()) == 12
        assert turn[0, partner] == -turn[partner, 0]
        assert turn[0, 0] == turn[partner, partner]


def _vit(seed: int, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = networks.ViT(image=8, patch=4, width=16, depth=2, num_heads=2, hidden=24, num_outputs=5, **options)
    return networks.randomise_norms(model, seed).eval()


def _images(count: int = 40) -> list[Tensor]:
    return list(torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5)).split(20))


def _tokens(count: int = 12) -> list[dict[str, Tensor]]:
    drawn = torch.randint(0, 48, (count, 9), generator=torch.Generator().manual_seed(6))
    return [{"input_ids": x} for x in drawn.split(6)]


def _case(name: str, seed: int) -> nn.Module:
    """A model by name: of the study's kind, or of transformers."""
    vits: dict[str, dict[str, Any]] = {
        "vit": {}, "separate": {"fused": False}, "pooled": {"pool": "mean"}, "qk_norm": {"qk_norm": True},
    }  # fmt: skip
    if name in vits:
        return _vit(seed, **vits[name])
    changes: dict[str, dict[str, Any]] = {
        "Llama": {}, "Qwen3": {"tie_word_embeddings": False}, "Llama, a key each": {"num_key_value_heads": 4},
        "Qwen2": {}, "Gemma": {"tie_word_embeddings": False},
    }  # fmt: skip
    return network(name.split(",")[0], seed, **changes[name])


# The maps that each has, and how each is rotated.
CASES = {
    "vit": {"residual": "mean", "qk": "any", "v": "any"},
    "separate": {"residual": "mean", "qk": "any", "v": "any"},
    "pooled": {"residual": "mean", "qk": "any", "v": "any"},
    "qk_norm": {"residual": "mean", "v": "any"},
    "Llama": {"residual": "any", "v": "any", "heads inside": "halves"},
    "Llama, a key each": {"residual": "any", "v": "any", "heads inside": "halves"},
    "Qwen2": {"residual": "any", "v": "any", "heads inside": "halves"},
    "Qwen3": {"residual": "any", "v": "any"},  # it normalises queries and keys
    "Gemma": {"residual": "any", "v": "any", "heads inside": "halves"},  # norms that multiply by 1 + weight
}


@cache
def _spec(name: str) -> mf.PermutationSpec:
    model = _case(name, 0)
    return mf.spec_for(model) if isinstance(model, networks.ViT) else spec_of(model)


def _batches(model: nn.Module) -> list[Any]:
    return _images() if isinstance(model, networks.ViT) else list(_tokens())


def _moved(model: nn.Module, state: dict[str, Tensor], batch: Any) -> float:
    with torch.no_grad():
        before = law.outputs(model, model.state_dict(), batch, None)
        return law.change(before, law.outputs(model, state, batch, None))


@pytest.mark.parametrize("name", CASES)
def test_the_function_is_kept(name: str) -> None:
    models = [_case(name, seed) for seed in range(3)]
    states = [copy.deepcopy(model.state_dict()) for model in models]
    spec, batches = _spec(name), _batches(models[0])
    found = mf.align_rotations(models, batches, spec)
    for model, rotated, state in zip(models, found.state_dicts, states, strict=True):
        assert list(rotated) == list(state)
        assert all(rotated[n].dtype == x.dtype for n, x in state.items())
        assert all(torch.equal(x, state[n]) for n, x in model.state_dict().items())  # the models stay as they are
        assert _moved(model, rotated, batches[0]) <= 1e-5
    kinds = {part.split(".", 2)[-1] for part in found.after}
    assert kinds == set(CASES[name])
    for part, after in found.after.items():
        assert found.before[part] < after <= 1


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_the_function_is_kept_in_float64(norm: type[nn.Module]) -> None:
    models = [_vit(seed) for seed in range(2)]
    spec, batches = mf.spec_for(models[0]), [x.double() for x in _images()]
    if norm is nn.RMSNorm:
        drop = [n for n in models[0].state_dict() if "norm" in n and n.endswith("bias")]
        spaces = [replace(s, axes=tuple(a for a in s.axes if a.tensor not in drop)) for s in spec.spaces]
        spec = mf.PermutationSpec(tuple(spaces))
        for model in models:
            for name in {n.rpartition(".")[0] for n in drop}:
                made = nn.RMSNorm(16)
                made.weight.data.copy_(model.get_submodule(name).weight)
                model.set_submodule(name, made)
    models = [model.double() for model in models]
    found = mf.align_rotations(models, batches, spec, balance=0.3)
    for model, rotated in zip(models, found.state_dicts, strict=True):
        assert _moved(model, rotated, batches[0]) <= 1e-10


def _planted(model: nn.Module, spec: mf.PermutationSpec, batch: Any, seed: int) -> nn.Module:
    """The same function with folded norms and every map turned at random, its heads in another order."""
    network_ = copy.deepcopy(model)
    state = {n: x.detach().clone() for n, x in model.state_dict().items()}
    maps = rotations._streams([network_], [state], spec, batch)
    maps += rotations._heads([network_], spec, batch)
    for k, part in enumerate(maps):
        orthogonal.rotate_(state, part, _random(part.kind, part.blocks, part.each, 100 * seed + k))
    if isinstance(model, networks.ViT):
        state = spec.permute(state, {n: p for n, p in spec.random_permutation(seed).items() if spec[n].tie})
    return mf.installed(model, state)


@pytest.mark.parametrize(
    ("name", "balance"), [*((name, 0.5) for name in CASES), ("vit", 0.0), ("vit", 1.0), ("Llama", 0.0), ("Llama", 1.0)]
)
def test_planted_rotations_are_found(name: str, balance: float) -> None:
    model = _case(name, 0)
    spec, batches = _spec(name), _batches(model)
    with torch.no_grad():
        other = _planted(model, spec, batches[0], 1)
    found = mf.align_rotations([model, other], batches, spec, balance=balance)
    mean = {n: (x + found.state_dicts[1][n]) / 2 for n, x in found.state_dicts[0].items()}
    assert _moved(model, mean, batches[0]) <= 1e-4
    plain = {n: (x + other.state_dict()[n]) / 2 for n, x in model.state_dict().items()}
    assert _moved(model, plain, batches[0]) > 0.1
    assert min(found.after.values()) > 1 - 1e-5


def test_merge_models_rotates_first() -> None:
    model = _vit(0)
    spec, batches = mf.spec_for(model), _images()
    moved = spec.permute(model.state_dict(), spec.random_permutation(3))
    other = _planted(mf.installed(model, moved), spec, batches[0], 1)  # all units in another order, and rotated
    for method in ("align", "zip"):
        merged = mf.merge_models([model, other], batches, method=method, rotate=True, progress=False)
        assert _moved(model, merged, batches[0]) <= 1e-4
        plain = mf.merge_models([model, other], batches, method=method, progress=False)
        assert _moved(model, plain, batches[0]) > 0.1
    with pytest.raises(ValueError, match="rotate=True compares activations"):
        mf.merge_models([model, other], rotate=True, progress=False)


def test_parts_alone() -> None:
    models = [_vit(seed) for seed in range(2)]
    spec, batches = mf.spec_for(models[0]), _images()
    heads = mf.align_rotations(models, batches, spec, parts=("heads",))
    assert set(heads.after) == {f"blocks.{i}.{part}" for i in range(2) for part in ("qk", "v")}
    for name in ("norm.weight", "blocks.0.norm1.bias"):  # nothing is folded
        assert all(torch.equal(s[name], m.state_dict()[name]) for s, m in zip(heads.state_dicts, models, strict=True))
    assert set(mf.align_rotations(models, batches, spec, parts=("stream",)).after) == {"residual"}
    more = mf.align_rotations(models, batches, spec, max_sweeps=1)
    full = mf.align_rotations(models, batches, spec)
    assert sum(full.after.values()) > sum(more.after.values()) > sum(full.before.values())


def test_half_precision_keeps_its_dtype() -> None:
    models = [network("Llama", seed).to(torch.bfloat16) for seed in range(2)]
    found = mf.align_rotations(models, _tokens(), spec_of(models[0]))
    assert all(x.dtype == torch.bfloat16 for state in found.state_dicts for x in state.values())
    assert _moved(models[1], found.state_dicts[1], _tokens()[0]) < 0.2  # eight bits of every weight


def test_half_precision_images() -> None:
    models = [_vit(seed).to(torch.bfloat16) for seed in range(2)]
    found = mf.align_rotations(models, [(x.to(torch.bfloat16), 0) for x in _images()], mf.spec_for(models[0]))
    assert found.after["residual"] > found.before["residual"]


def _bert() -> tuple[nn.Module, Any]:
    import transformers

    config = transformers.BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(config).eval(), _tokens()


def test_what_cannot_be_rotated_is_refused() -> None:
    tied = [network("Qwen3", seed) for seed in range(2)]
    with pytest.raises(ValueError, match=r"one tensor.*untie them first"):
        mf.align_rotations(tied, _tokens(), spec_of(tied[0]))
    assert mf.align_rotations(tied, _tokens(), spec_of(tied[0]), parts=("heads",)).after

    bert, tokens = _bert()
    spec = mf.spec_for(bert)
    with pytest.raises(ValueError, match=r"no residual stream|cannot be folded"):
        mf.align_rotations([bert, bert], tokens, spec)

    resnets = [networks.ResNet(blocks=(1, 1), width=4, num_outputs=5).eval() for _ in range(2)]
    with pytest.raises(ValueError, match=r"no residual stream.*layer1.0.conv1 does not read what one norm gives"):
        mf.align_rotations(resnets, _images(), mf.spec_for(resnets[0]))
    with pytest.raises(ValueError, match="no heads"):
        mf.align_rotations(resnets, _images(), mf.spec_for(resnets[0]), parts=("heads",))


class _Scaled(nn.Module):
    """A block whose branches are multiplied by a layer scale before they are added to the stream."""

    def __init__(self, block: Any, scale: float) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.ls1, self.ls2 = _Scale(scale), _Scale(scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + torch.as_tensor(self.ls2(self.mlp(self.norm2(x))))


class _Scale(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(scale * (1 + torch.rand(16)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_layer_scales_are_refused_however_small(scale: float) -> None:
    models = [_vit(seed) for seed in range(2)]
    for model in models:
        blocks: Any = model.blocks
        for i, block in enumerate(blocks):
            blocks[i] = _Scaled(block, scale).eval()
    spec = mf.spec_for(models[0])
    with pytest.raises(ValueError, match=r"blocks.0.ls1.gamma.* are layer scales\?"):
        mf.align_rotations(models, _images(), spec)
    found = mf.align_rotations(models, _images(), spec, parts=iter(["heads"]))  # type: ignore[arg-type]
    assert _moved(models[1], found.state_dicts[1], _images()[0]) <= 1e-5


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_a_model_and_itself_are_not_rotated(balance: float) -> None:
    """On one image: its five tokens say nothing of most directions."""
    model = _vit(0)
    found = mf.align_rotations([model, copy.deepcopy(model)], [_images()[0][:1]], _spec("vit"), balance=balance)
    assert all(torch.allclose(x, found.state_dicts[1][n], rtol=0, atol=1e-6) for n, x in found.state_dicts[0].items())


def test_a_map_has_to_be_right_for_every_model() -> None:
    """Model 0 pays no attention, so that its queries and keys may be turned in any way."""
    models = [network("Llama", seed) for seed in range(2)]
    for name, x in models[0].state_dict().items():
        if "q_proj" in name:
            x.zero_()
    found = mf.align_rotations(models, _tokens(), spec_of(models[0]))
    assert _moved(models[1], found.state_dicts[1], _tokens()[0]) <= 1e-5


class _Unshifted(nn.Module):
    """A layer norm whose shift is read by layers without a bias, or whose stream is also seen elsewhere."""

    def __init__(self, bias: bool, elsewhere: bool) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=bias)
        self.elsewhere = elsewhere

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(x)
        return self.head(self.norm(stream)) + (stream.square()[:, :4] if self.elsewhere else 0)


def _small_spec() -> mf.PermutationSpec:
    out = [mf.Axis(n, 0, "out") for n in ("embed.weight", "embed.bias", "norm.weight", "norm.bias")]
    return mf.PermutationSpec((mf.Space("stream", 8, (*out, mf.Axis("head.weight", 1, "in"))),))


def test_streams_that_are_more_than_a_stream() -> None:
    batches = [torch.randn(10, 6, generator=torch.Generator().manual_seed(0))]
    good = [networks.randomise_norms(_Unshifted(True, False), seed).eval() for seed in range(2)]
    assert _moved(good[1], mf.align_rotations(good, batches, _small_spec()).state_dicts[1], batches[0]) < 1e-5
    for bias, elsewhere, why in ((False, False, "none that could take it up"), (True, True, "cannot be folded")):
        models = [networks.randomise_norms(_Unshifted(bias, elsewhere), seed).eval() for seed in range(2)]
        with pytest.raises(ValueError, match=why):
            mf.align_rotations(models, batches, _small_spec())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"models": []}, ValueError, "two or more, got 0"),
        ({"models": [nn.Linear(2, 2), 3]}, TypeError, "got int for model 1"),
        ({"batches": []}, ValueError, "at least one batch"),
        ({"batches": torch.zeros(2, 6)}, TypeError, "put it in a list"),
        ({"spec": "vit"}, TypeError, "expected a PermutationSpec"),
        ({"balance": 1.5}, ValueError, "balance"),
        ({"parts": ("streams",)}, ValueError, "stream, heads"),
        ({"parts": "stream"}, ValueError, "stream, heads"),
        ({"parts": ()}, ValueError, "stream, heads"),
        ({"parts": 3}, ValueError, "stream, heads"),
        ({"batches": [torch.full((2, 6), torch.nan)]}, ValueError, "outputs of model 0 on batch 0 are NaN"),
        ({"max_sweeps": 0}, ValueError, "max_sweeps"),
        ({"models": [nn.Linear(2, 2), nn.Linear(2, 2)]}, ValueError, "unknown tensor"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], match: str) -> None:
    models = [_Unshifted(True, False) for _ in range(2)]
    given = {"models": models, "batches": [torch.zeros(2, 6)], "spec": _small_spec(), **change}
    with pytest.raises(error, match=match):
        mf.align_rotations(**given)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite_are_refused_on_any_batch(value: float) -> None:
    models, batches = [_vit(seed) for seed in range(2)], _images()
    bad = [batches[0], batches[1].clone()]
    bad[1][2, 0, 1, 3] = value
    before = [copy.deepcopy(model.state_dict()) for model in models]
    with pytest.raises(ValueError, match="outputs of model 0 on batch 1 are NaN or infinite"):
        mf.align_rotations(models, bad, _spec("vit"))
    assert all(torch.equal(x, s[n]) for m, s in zip(models, before, strict=True) for n, x in m.state_dict().items())


def test_models_that_differ_are_refused() -> None:
    one, other, broken = _Unshifted(True, False), _Unshifted(True, False), _Unshifted(True, False)
    other.head = nn.Linear(8, 5)
    with pytest.raises(ValueError, match=r"head.weight has shape \(5, 8\) in model 1"):
        mf.align_rotations([one, other], [torch.zeros(2, 6)], _small_spec())
    broken.head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"head.weight of model 1 has NaN"):
        mf.align_rotations([one, broken], [torch.zeros(2, 6)], _small_spec())
    models: list[nn.Module] = [_Unshifted(True, False), nn.Sequential(nn.Linear(6, 8))]
    with pytest.raises(ValueError, match="unknown tensor"):
        mf.align_rotations(models, [torch.zeros(2, 6)], _small_spec())
