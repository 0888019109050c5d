"""Adapters that take whole models: transformers and fusion_bench."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import language_models as lm
import networks
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

import mudsc_fast as mf
from mudsc_fast.adapters import fusion_bench
from mudsc_fast.adapters.transformers import merge_pretrained

transformers = pytest.importorskip("transformers")

# A merge of a model with its permuted self rounds once, in float32.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return lm.family("Qwen3", tmp_path_factory.mktemp("qwen"))


def test_merge_pretrained_folders_and_models(folders: dict[str, Path]) -> None:
    merged = merge_pretrained([str(folders["base"]), folders["pb"]], progress=False)
    assert type(merged).__name__ == "Qwen3ForCausalLM"
    assert not merged.training
    load = transformers.AutoModelForCausalLM.from_pretrained
    base, b = load(folders["base"]).state_dict(), load(folders["b"]).state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, (base[name] + b[name]) / 2, rtol=0, atol=TOLERANCE)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    model = load(folders["pb"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = merge_pretrained([folders["base"], model], weights=[1, 0], progress=False)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, base[name], rtol=0, atol=TOLERANCE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_merge_pretrained_with_calibration_batches(folders: dict[str, Path]) -> None:
    tokens = torch.randint(0, lm.VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part} for part in tokens.split(4)]
    merged = merge_pretrained([folders["base"], folders["pb"]], batches, progress=False, seed=3)
    expected = merge_pretrained([folders["base"], folders["b"]], batches, progress=False, seed=3)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=0, atol=TOLERANCE)


def test_merge_pretrained_errors(folders: dict[str, Path], tmp_path: Path) -> None:
    other = lm.network("Qwen3", 0, intermediate_size=44)
    with pytest.raises(
        ValueError, match=r"model 1 has another width: model.layers.0.mlp.gate_proj.weight is \(44, 24\)"
    ):
        merge_pretrained([folders["base"], other], progress=False)
    lm.save(lm.network("Llama", 0), lm.network("Llama", 0).state_dict(), tmp_path / "llama")
    with pytest.raises(ValueError, match="llama has another architecture"):
        merge_pretrained([folders["base"], tmp_path / "llama"], progress=False)
    with pytest.raises(ValueError, match="is no folder"):
        merge_pretrained([folders["base"], "/no/such/folder"])
    with pytest.raises(ValueError, match="is no folder"):
        merge_pretrained([folders["base"], "./no/such/folder"])
    with pytest.raises(TypeError, match="expected a list of two or more, got 'base'"):
        merge_pretrained("base")
    with pytest.raises(TypeError, match="got int"):
        merge_pretrained([folders["base"], 3])
    with pytest.raises(ValueError, match="two or more, got 1"):
        merge_pretrained([folders["base"]])


# ---- fusion_bench ----


class Lazy(Mapping[str, Tensor]):
    """A state dict that counts its reads, as fusion_bench's LazyStateDict is one."""

    def __init__(self, state: dict[str, Tensor], meta_module: nn.Module | None = None) -> None:
        self.state, self.meta_module, self.reads = state, meta_module, 0

    def __getitem__(self, name: str) -> Tensor:
        self.reads += 1
        return self.state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def _pair() -> tuple[nn.Module, nn.Module]:
    model = networks.MLP(inputs=8, widths=(12, 14), num_outputs=3)
    other = networks.MLP(inputs=8, widths=(12, 14), num_outputs=3)
    spec = mf.spec_for(model)
    other.load_state_dict(spec.permute(model.state_dict(), spec.random_permutation(1)))
    return model, other


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """fusion_bench, or where it is missing the part of it that the adapter touches."""
    monkeypatch.delitem(vars(fusion_bench), "MudscAlgorithm", raising=False)
    try:
        import fusion_bench as real
    except ImportError:
        method = types.ModuleType("fusion_bench.method")
        method.BaseAlgorithm = type("BaseAlgorithm", (), {"_config_mapping": {"_usage_": "_usage_"}})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fusion_bench", types.ModuleType("fusion_bench"))
        monkeypatch.setitem(sys.modules, "fusion_bench.method", method)
        return method
    return real


def test_fusion_bench_algorithm(bench: Any, tmp_path: Path) -> None:
    config = yaml.safe_load(fusion_bench.write_config(tmp_path).read_text())
    module, _, name = config.pop("_target_").rpartition(".")
    algorithm = getattr(sys.modules[module], name)(**config)
    assert type(algorithm) is fusion_bench.MudscAlgorithm
    assert issubclass(type(algorithm), sys.modules["fusion_bench.method"].BaseAlgorithm)
    assert {"method", "balance", "seed"} <= set(algorithm._config_mapping)
    model, other = _pair()
    pool = {"_pretrained_": nn.Linear(2, 2), "a": model, "b": other}
    if hasattr(bench, "modelpool"):  # the real one
        pool = bench.modelpool.BaseModelPool({"_pretrained_": pool["_pretrained_"], "a": model, "b": other})
    merged = algorithm.run(pool)
    assert merged is not model
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[key], rtol=0, atol=TOLERANCE)


def test_fusion_bench_lazy_state_dicts() -> None:
    model, other = _pair()
    lazy = [Lazy(m.state_dict(), meta_module=model) for m in (model, other)]
    merged = fusion_bench.fuse(lazy, progress=False)
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, model.state_dict()[key], rtol=0, atol=TOLERANCE)
    assert all(0 < each.reads < 60 for each in lazy)
    plain = fusion_bench.fuse([Lazy(m.state_dict()) for m in (model, other)], progress=False)
    assert all(torch.equal(plain[key], merged[key]) for key in merged)


def _without_weights(network: nn.Module) -> nn.Module:
    """As accelerate.init_empty_weights leaves it: parameters on meta, tied ones apart, buffers as they are."""
    for module in network.modules():
        for name, own in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(own.to("meta")))
    return network


def _lazy(folder: Path) -> Any:
    """fusion_bench's own lazy state dict, or where it is missing one that tells the same."""
    try:
        from fusion_bench.utils.lazy_state_dict import LazyStateDict
    except ImportError:
        network = transformers.AutoModelForCausalLM.from_pretrained(folder)
        return Lazy(load_file(folder / "model.safetensors"), _without_weights(network))
    return LazyStateDict(str(folder), meta_module_class=transformers.AutoModelForCausalLM)


@pytest.mark.usefixtures("bench")
def test_fusion_bench_gives_a_module_of_lazy_state_dicts(folders: dict[str, Path]) -> None:
    """With tied embeddings, which neither the file nor a network without weights has as one."""
    states = [_lazy(folders[name]) for name in ("b", "pb")]
    assert "lm_head.weight" not in list(states[0])
    merged = fusion_bench.MudscAlgorithm().run(states)
    expected = transformers.AutoModelForCausalLM.from_pretrained(folders["b"])
    assert type(merged) is type(expected)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(merged(tokens).logits, expected(tokens).logits, rtol=0, atol=1e-4)
    assert states[0].meta_module.lm_head.weight.is_meta


@pytest.mark.usefixtures("bench")
def test_fusion_bench_names_what_a_lazy_network_lacks(tmp_path: Path) -> None:
    model, other = _pair()
    network = networks.MLP(inputs=8, widths=(12, 14), num_outputs=3)
    network.register_buffer("scale", torch.ones(1), persistent=False)
    lazy = [Lazy(m.state_dict(), meta_module=network.to("meta")) for m in (model, other)]
    with pytest.raises(ValueError, match="meta_module: 'scale' has no values"):
        fusion_bench.MudscAlgorithm().run(lazy)
    for name in ("config", "fusion_bench_config"):
        with pytest.raises(ValueError, match=f"instead of its own configurations.*'{name}'|{name}.*instead"):
            fusion_bench.write_config(tmp_path / name)
    del lazy[0].state["fc1.bias"]
    with pytest.raises(ValueError, match=r"has no tensor 'fc1.bias'.*give modules instead"):
        fusion_bench.fuse(lazy)


def test_fusion_bench_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = _pair()
    with pytest.raises(ValueError, match="two or more, got 1"):
        fusion_bench.fuse([model])
    with pytest.raises(TypeError, match="got int for model 1"):
        fusion_bench.fuse([model, 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="activations need modules"):
        fusion_bench.fuse([Lazy(model.state_dict()), other], batches=[torch.ones(1, 8)])
    monkeypatch.delitem(vars(fusion_bench), "MudscAlgorithm", raising=False)
    monkeypatch.setitem(sys.modules, "fusion_bench.method", None)
    with pytest.raises(ImportError, match="pip install fusion_bench"):
        _ = fusion_bench.MudscAlgorithm
    with pytest.raises(AttributeError, match="nothing"):
        _ = fusion_bench.nothing
