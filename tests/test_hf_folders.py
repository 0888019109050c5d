"""Hugging Face folders in and out: names on disk and in the network, stacked experts, what lies beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mudsc_fast.checkpoints import open_checkpoint
from mudsc_fast.checkpoints.stacked import StackedCheckpoint, blocks_of
from mudsc_fast.cli import huggingface, main
from mudsc_fast.cli.specs import find_spec

transformers = pytest.importorskip("transformers")
hub = pytest.importorskip("huggingface_hub")

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}
TOKENS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
BUILDERS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    "llama tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=3)),
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def load(folder: str) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


def model_of(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = BUILDERS[kind]()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def permuted(model: nn.Module, folder: str, seed: int) -> nn.Module:
    """The same function in another unit order, by the spec that the command line finds."""
    opened = open_checkpoint(folder)
    view = (huggingface.stacked([opened]) or [opened])[0]
    spec = find_spec(view)
    state = {name: view[name] for name in view}
    moved = spec.permute(state, spec.random_permutation(seed))
    other = type(model)(model.config)
    own = other.state_dict()
    with torch.no_grad():
        for name, tensor in moved.items():
            own[name].copy_(tensor)
    return other


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_a_permuted_copy_comes_back(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = model_of(kind, 0)
    model.save_pretrained("a", max_shard_size="6KB")
    Path("a", "chat_template.jinja").write_text("{{ messages }}")
    other = permuted(model, "a", 5)
    other.save_pretrained("b")
    before = logits(model)
    assert torch.allclose(logits(load("b")), before, atol=1e-5)
    for seed in ("0", "1"):
        options = ("--max-memory", "3GB", "--max-shard-size", "6KB", "--seed", seed, "-q", "--force")
        assert main(["merge", "a", "b", "-o", "merged", *options]) == 0
        assert main(["align", "a", "b", "-o", "aligned", *options]) == 0
    assert torch.allclose(logits(load("merged")), before, atol=1e-5)
    assert torch.allclose(logits(load("aligned")), before, atol=1e-5)
    on_disk, first = open_checkpoint("aligned"), open_checkpoint("a")
    assert set(on_disk) == set(first)
    assert all(torch.equal(on_disk[name], first[name]) for name in first)
    # Merged slab by slab and stored expert by expert, in the shards that the hub's own function cuts.
    merged = open_checkpoint("merged")
    assert set(merged) == set(first)
    state = {
        name: merged[name]
        for name in json.loads(Path("merged", "model.safetensors.index.json").read_text())["weight_map"]
    }
    index = json.loads(Path("merged", "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.numel() * x.element_size() for x in state.values())
    order = {name: state[name] for name in first}
    split = hub.split_torch_state_dict_into_shards(order, max_shard_size="6KB")
    assert split.tensor_to_filename == index["weight_map"]
    kept = {path.name for path in Path("merged").iterdir() if path.suffix != ".safetensors"}
    assert kept == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    }
    card = Path("merged", "README.md").read_text()
    assert card.startswith('---\nlibrary_name: transformers\nbase_model:\n- "a"\n- "b"\ntags:\n- merge\n')
    assert "| method | align |" in card
    assert "spaces of" in card


def test_experts_are_read_by_rows_as_whole(tmp_path: Path) -> None:
    model_of("mixtral", 0).save_pretrained(tmp_path / "a")
    opened = open_checkpoint(tmp_path / "a")
    (view,) = huggingface.stacked([opened]) or []
    assert isinstance(view, StackedCheckpoint)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert view.layout[name].shape == (3, 48, 16)
    assert view.stored(name) == [
        f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight" for w in ("w1", "w3") for e in range(3)
    ]
    whole = view[name]
    assert torch.equal(whole[1, 24:], opened["model.layers.0.block_sparse_moe.experts.1.w3.weight"])
    assert torch.equal(view.rows(name, slice(1, 3)), whole[1:3])
    order = torch.tensor([2, 0])
    assert torch.equal(view.rows(name, order), whole[order])
    with pytest.raises(KeyError, match="no tensor 'x'"):
        view["x"]
    fewer = opened.without([view.stored(name)[0]])
    with pytest.raises(ValueError, match=f"has no tensor .* a part of '{name}'"):
        StackedCheckpoint(fewer, view._blocks, {n: i.shape for n, i in view.layout.items()})
    wide = {n: i._replace(shape=tuple(2 * s for s in i.shape)) for n, i in view.layout.items()}
    with pytest.raises(ValueError, match="stored one by one"):
        view.on_disk(wide)


def test_tensors_that_are_no_blocks_are_refused() -> None:
    shapes, starts = {"t": (2, 3)}, {"t": 0}
    numbers = torch.arange(6).reshape(2, 3)
    assert [b.ranges for b in blocks_of({"x": numbers[:1], "y": numbers[1:]}, shapes, starts)["t"]] == [
        ((0, 1), (0, 3)),
        ((1, 2), (0, 3)),
    ]
    with pytest.raises(ValueError, match="x: is no block of 't'"):
        blocks_of({"x": numbers.T.contiguous()}, shapes, starts)
    with pytest.raises(ValueError, match="t: is not made up of blocks"):
        blocks_of({"x": numbers[:1]}, shapes, starts)


def test_a_tied_head_that_one_folder_stores_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        model_of("llama tied", seed).save_pretrained(name)
    assert "lm_head.weight" not in load_file("a/model.safetensors")
    assert main(["merge", "a", "b", "-o", "once", "-q"]) == 0
    state = load_file("b/model.safetensors")
    from safetensors.torch import save_file

    save_file(
        {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, "b/model.safetensors", {"format": "pt"}
    )
    assert main(["merge", "a", "b", "-o", "twice", "-q"]) == 0
    once, twice = load_file("once/model.safetensors"), load_file("twice/model.safetensors")
    assert set(once) == set(twice)
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_dtype_of_the_output_goes_into_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        model_of("llama", seed).save_pretrained(name)
    assert main(["merge", "a", "b", "-o", "m", "--out-dtype", "bfloat16", "-q"]) == 0
    assert load("m").dtype == torch.bfloat16
    assert {x.dtype for x in load_file("m/model.safetensors").values()} == {torch.bfloat16}
