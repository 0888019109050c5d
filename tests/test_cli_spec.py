"""Small Hugging Face folders: spec by tracing, the law before a merge, calibration on text and images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mudsc_fast as mf
from mudsc_fast.cli import main
from mudsc_fast.specs import example_inputs, randomise, shrunken

transformers = pytest.importorskip("transformers")
_SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**_SMALL, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return randomise(transformers.LlamaForCausalLM(config), seed)


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """A small Llama and its permuted copy, a family that nobody wrote a spec for."""
    model = llama()
    spec = mf.spec_for(model)
    model.save_pretrained(tmp_path / "a")
    model.load_state_dict(spec.permute(model.state_dict(), spec.random_permutation(3)))
    model.save_pretrained(tmp_path / "b")
    return [str(tmp_path / name) for name in "ab"]


def test_config_alone_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.LlamaConfig(num_hidden_layers=2, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    assert main(["spec", str(tmp_path), "--verify"]) == 0
    said = capsys.readouterr()
    for name in ("residual", "layers.0.v", "layers.1.mlp"):
        assert name in said.out
    assert "of the bytes, are in a space" in said.out
    assert "left alone: model.embed_tokens.weight [0]" in said.out
    assert "law: " in said.err
    assert main(["spec", str(tmp_path), "--json"]) == 0
    read = mf.PermutationSpec.from_json(capsys.readouterr().out)
    assert read["layers.1.mlp"].width == config.intermediate_size
    assert read["residual"].width == config.hidden_size
    assert {f.tensor for f in read.frozen} >= {"model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"}


def test_verify_needs_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from networks import MLP
    from safetensors.torch import save_file

    save_file(MLP(inputs=12, widths=(16, 16), num_outputs=4).state_dict(), tmp_path / "a.safetensors")
    assert main(["spec", str(tmp_path / "a.safetensors"), "--verify"]) == 2
    assert "config.json" in capsys.readouterr().err


def test_merge_tries_the_law_and_merges(pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", *pair, "-o", str(tmp_path / "out")]) == 0
    assert "spec verified with the first checkpoint's weights" in capsys.readouterr().err
    merged, first = (transformers.LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "a"))
    ids = {"input_ids": torch.arange(3, 13)[None]}
    with torch.no_grad():
        assert torch.allclose(merged(**ids).logits, first(**ids).logits, atol=1e-4)


def test_a_wrong_spec_is_caught_before_anything_is_written(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = mf.spec_for(llama())
    space = spec["layers.1.mlp"]
    wrong = replace(space, axes=tuple(a for a in space.axes if "up_proj" not in a.tensor))
    spaces = tuple(wrong if s is space else s for s in spec.spaces)
    (tmp_path / "wrong.json").write_text(mf.PermutationSpec(spaces).to_json())
    call = ["merge", *pair, "-o", str(tmp_path / "out"), "--spec", str(tmp_path / "wrong.json")]
    assert main(call) == 2
    said = capsys.readouterr().err
    assert "the spec does not keep the function" in said
    assert "by layers.1.mlp)" in said
    assert not (tmp_path / "out").exists()
    assert main([*call, "--no-verify", "-q"]) == 0


def test_text_lines_become_statistics(pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Statistics of a model and its permuted copy: every matched pair of units is alike."""
    words = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "far"]
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{w: k + 3 for k, w in enumerate(words)}}
    tokenizers = pytest.importorskip("tokenizers")
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    made.save_pretrained(pair[0])
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, size=int(rng.integers(3, 9)))) for _ in range(60)]
    (tmp_path / "lines.txt").write_text("\n\n".join(lines))
    call = ["calibrate", *pair, "--text", str(tmp_path / "lines.txt"), "--batch-size", "16"]
    assert main([*call, "-o", str(tmp_path / "stats.safetensors")]) == 0
    assert "on 60 rows" in capsys.readouterr().err
    stats = mf.ActivationStats.load(tmp_path / "stats.safetensors")
    spec = mf.spec_for(llama())
    taken = mf.match(None, spec, stats, balance=0.0, progress=False)
    wanted = spec.random_permutation(3)
    assert torch.equal(taken.labels["layers.0.mlp"][1], wanted["layers.0.mlp"])
    for arguments in (["--text", "none.txt"], ["--text", "x", "--images", "y"], [], ["--images", pair[0]]):
        assert main([*call[:3], *arguments, "-o", str(tmp_path / "other.safetensors")]) == 2
    assert "--images" in capsys.readouterr().err


def test_images_become_statistics(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=20, image_size=16, patch_size=4
    )
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / name)
    (tmp_path / "photos" / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in range(5):
        pixels = rng.integers(0, 255, (20 + k, 30, 3), dtype=np.uint8)
        image.fromarray(pixels).save(tmp_path / "photos" / ("more" if k else "") / f"{k}.png")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    call = ["calibrate", str(tmp_path / "a"), str(tmp_path / "b"), "--images", str(tmp_path / "photos"), "-q"]
    assert main([*call, "--batch-size", "2", "-o", str(tmp_path / "stats.safetensors")]) == 0
    stats = mf.ActivationStats.load(tmp_path / "stats.safetensors")
    assert stats["layers.0.mlp" if "layers.0.mlp" in stats else next(iter(stats))].count == 5 * 17
    (tmp_path / "photos" / "broken.png").write_text("no image")
    assert main([*call, "-o", str(tmp_path / "other.safetensors")]) == 2


class Odd(nn.Module):
    """A network of no known family."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate, self.outer = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.outer(torch.tanh(self.inner(x)) * torch.sigmoid(self.gate(x)))
        return out


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 0), lambda x: {"x": x}])
def test_a_model_of_no_family_is_traced(wrap: Callable[[torch.Tensor], Any]) -> None:
    torch.manual_seed(0)
    model = Odd()
    with pytest.raises(ValueError, match="give inputs"):
        mf.spec_for(model)
    spec = mf.spec_for(model, inputs=torch.randn(4, 6))
    assert {a.tensor for a in spec.spaces[0].axes} >= {"inner.weight", "gate.weight", "outer.weight"}
    copy = Odd()
    copy.load_state_dict(spec.permute(model.state_dict(), spec.random_permutation(1)))
    batches = [wrap(torch.randn(8, 6)) for _ in range(3)]
    merged = mf.merge_models([model, copy], batches, method="align", progress=False)
    assert all(torch.allclose(merged[name], x, atol=1e-6) for name, x in model.state_dict().items())


def test_shrunken_configs_keep_what_shapes_a_spec() -> None:
    config = transformers.LlamaConfig(num_attention_heads=32, num_key_value_heads=8, hidden_size=4096)
    small = shrunken(config)
    assert (small.num_hidden_layers, config.num_hidden_layers) == (2, 32)
    assert small.num_attention_heads // small.num_key_value_heads == 4
    assert small.hidden_size < 128
    assert small.vocab_size <= 64
    assert shrunken(config, narrow=False).hidden_size == 4096
    both = shrunken(transformers.CLIPConfig())
    assert both.text_config.num_hidden_layers == both.vision_config.num_hidden_layers == 2
    assert set(example_inputs(transformers.CLIPModel(both)) or {}) == {"input_ids", "pixel_values"}
    assert example_inputs(Odd()) is None
