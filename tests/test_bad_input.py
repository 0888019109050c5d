"""Bad checkpoints on the command line: what is wrong, where, and what can be done; never a traceback or an output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import networks
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mudsc_fast.checkpoints import open_checkpoint, save_checkpoint
from mudsc_fast.cli import main

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "vocab_size": 12}


def state_of(width: int = 8, vocabulary: int = 12, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed_tokens.weight": torch.randn(vocabulary, width, generator=generator),
        "fc.weight": torch.randn(6, width, generator=generator),
        "fc.bias": torch.randn(6, generator=generator),
    }


def folder(name: str, state: dict[str, Tensor], config: dict[str, object] | None = None, shard: str = "200B") -> Path:
    save_checkpoint(name, state, max_shard_size=shard)
    if config is not None:
        Path(name, "config.json").write_text(json.dumps(config))
    return Path(name)


def a_shard_is_missing() -> None:
    next(folder("b", state_of()).glob("*-00002-*")).unlink()


def an_absent_tensor_is_named() -> None:
    index = folder("b", state_of()) / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["ghost.weight"] = next(iter(found["weight_map"].values()))
    index.write_text(json.dumps(found))


def another_vocabulary() -> None:
    folder("b", state_of(vocabulary=16), {**CONFIG, "vocab_size": 16})


def another_width() -> None:
    folder("b", state_of(width=10), {**CONFIG, "hidden_size": 10})


def no_common_shape() -> None:
    folder("b", {name: torch.zeros(3, 3, 3) for name in state_of()})


def other_names() -> None:
    folder("b", {**state_of(), "more.weight": torch.zeros(2, 2)}, {**CONFIG, "num_hidden_layers": 3})


def quantised_by_config() -> None:
    folder("b", state_of(), {**CONFIG, "quantization_config": {"quant_method": "gptq"}})


def quantised_by_name() -> None:
    folder("b", {**state_of(), "fc.qweight": torch.zeros(3, 4, dtype=torch.int32)})


def quantised_by_dtype() -> None:
    folder("b", {**state_of(), "fc.weight": torch.zeros(6, 8, dtype=torch.int8)})


def a_lone_head() -> None:
    # Stored twice here and once there, but the two copies differ: they are two tensors.
    folder("b", {**state_of(), "lm_head.weight": torch.zeros(12, 8)})


def an_untied_head() -> None:
    state = state_of()
    folder("b", {**state, "lm_head.weight": state["embed_tokens.weight"].clone()}, {"tie_word_embeddings": False})


BAD: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "a missing shard": (a_shard_is_missing, ("1 of 3 shards are missing", "model-00002-of-00003.safetensors")),
    "an absent tensor": (an_absent_tensor_is_named, ("1 tensors are not in the shards", "ghost.weight")),
    "another vocabulary": (
        another_vocabulary,
        (
            "'embed_tokens.weight' has shape (12, 8) in a and (16, 8) in b",
            "config.json: vocab_size 12 and 16",
            "Only the vocabularies differ",
            "The other 2 tensors (36% of the bytes) could be merged",
            "resize_token_embeddings",
        ),
    ),
    "another width": (
        another_width,
        (
            "hidden_size 8 and 10",
            "The widths differ; 1 of 3 tensors",
            "have equal shapes and could be merged by themselves",
        ),
    ),
    "no common shape": (no_common_shape, ("nothing could be merged",)),
    "other names": (other_names, ("b has a tensor 'more.weight' that a lacks", "num_hidden_layers None and 3")),
    "quantised by config": (quantised_by_config, ("quantised weights cannot be merged (config.json has a quant",)),
    "quantised by name": (quantised_by_name, ("quantised weights cannot be merged (it holds 'fc.qweight')",)),
    "quantised by dtype": (quantised_by_dtype, ("(it holds 'fc.weight' in torch.int8)", "quantise the result")),
    "a head of its own": (a_lone_head, ("b has a tensor 'lm_head.weight' that a lacks",)),
    "an untied head": (an_untied_head, ("b has a tensor 'lm_head.weight' that a lacks",)),
}


@pytest.mark.parametrize("command", ["merge", "align"])
@pytest.mark.parametrize("case", list(BAD))
def test_bad_input(
    case: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make, reasons = BAD[case]
    folder("a", state_of(seed=1), CONFIG)
    make()
    assert main([command, "a", "b", "-o", "out"]) == 2
    err = capsys.readouterr().err
    for reason in reasons:
        assert reason in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_tied_weights_stored_once_or_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    states = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        state = networks.MLP(inputs=12, widths=(20, 16), num_outputs=5).state_dict()
        states.append(state)
        save_file(state, f"{name}.safetensors")
    assert main(["merge", "a.safetensors", "b.safetensors", "-o", "expected.safetensors", "-q"]) == 0
    twin = next(name for name, x in states[1].items() if x.dim() == 2)
    save_file({**states[1], "copy.weight": states[1][twin].clone()}, "twice.safetensors")
    for pair in (("a.safetensors", "twice.safetensors"),):
        assert main(["merge", *pair, "-o", "out.safetensors"]) == 0
        assert f"'copy.weight' of twice.safetensors is a copy of '{twin}' and is left out" in capsys.readouterr().err
        found, expected = load_file("out.safetensors"), load_file("expected.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert set(found) == set(expected)
    assert main(["merge", "twice.safetensors", "a.safetensors", "-o", "turned.safetensors", "-q"]) == 0
    assert set(open_checkpoint("turned.safetensors")) == set(states[0])


def test_a_network_that_cannot_be_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1, vocab_size=32
    )
    for name in "ab":
        transformers.LlamaForCausalLM(config).save_pretrained(name)

    def stubborn(self: object, input_ids: Tensor) -> Tensor:
        return input_ids.float() if float(input_ids.sum()) > 3 else input_ids

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", stubborn)
    assert main(["merge", "a", "b", "-o", "out"]) == 2
    err = capsys.readouterr().err
    assert "no spec was found for LlamaForCausalLM: " in err
    assert "torch.export cannot export this model (" in err
    assert "Write the spec by hand and give it with --spec FILE.json" in err
    assert '{"spaces": [{"name": "mlp"' in err
    assert not Path("out").exists()
