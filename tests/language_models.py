"""Tiny language models on disk: a base, slightly tuned copies of it, and the same copies in another unit order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mudsc_fast import PermutationSpec

KINDS = ("Llama", "Qwen3", "Mistral")
# Mixtures, whose files keep every expert in tensors of its own.
EXPERTS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 20, "num_experts_per_tok": 2},
}
VOCABULARY = 48


def network(kind: str, seed: int, **changes: Any) -> nn.Module:
    """A random causal model of two layers whose norms are not at their initial values."""
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": kind == "Qwen3",
    }
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **EXPERTS.get(kind, {}), **changes})
    torch.manual_seed(seed)
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3).add_(1.0 if "norm" in name else 0.0)
    return model


def tuned(model: nn.Module, seed: int, by: float = 0.02) -> dict[str, Tensor]:
    """The model's state dict with a little noise; tied tensors stay tied."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, Tensor] = {}
    for tensor in model.state_dict(keep_vars=True).values():
        if id(tensor) not in made:
            made[id(tensor)] = tensor.detach() + by * torch.randn(tensor.shape, generator=generator)
    return {name: made[id(tensor)] for name, tensor in model.state_dict(keep_vars=True).items()}


def spec_of(model: nn.Module) -> PermutationSpec:
    return PermutationSpec.trace(model, (), {"input_ids": torch.zeros(2, 8, dtype=torch.long)})


def save(model: nn.Module, state: dict[str, Tensor], folder: Path, tokens: int = VOCABULARY, shift: int = 0) -> Path:
    """Write the model's folder with these weights and a tokenizer of one word a token."""
    import copy

    other = copy.deepcopy(model)
    other.load_state_dict(state)
    other.save_pretrained(folder)
    words = {f"w{(k + shift) % tokens}": k for k in range(tokens)}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w1"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def family(kind: str, folder: Path) -> dict[str, Path]:
    """Folders: base; b and c, tuned copies; pb and pc, the same in a random unit order."""
    model = network(kind, 0)
    folders = {"base": save(model, model.state_dict(), folder / "base")}
    spec = spec_of(model)
    for seed, name in enumerate("bc", 1):
        state = tuned(model, seed)
        folders[name] = save(model, state, folder / name)
        moved = spec.permute(state, spec.random_permutation(seed))
        folders[f"p{name}"] = save(model, moved, folder / f"p{name}")
    return folders
