"""Small random models of many architectures, with inputs: what tracing is tested on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mudsc_fast.spec import PermutationSpec

Made = tuple[nn.Module, dict[str, Any]]
_TEXT = {"vocab_size": 40, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def ids(batch: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


def text(kind: str, model: str, **options: Any) -> Made:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**_TEXT, **options})
    return getattr(transformers, model)(config), {"input_ids": ids()}


def decoder(kind: str, **options: Any) -> Made:
    given = {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options}
    return text(kind, f"{kind}ForCausalLM", **given)


TEXT: dict[str, Callable[[], Made]] = {
    "Llama (GQA)": lambda: decoder("Llama"),
    "Llama (tied)": lambda: decoder("Llama", tie_word_embeddings=True, num_key_value_heads=4),
    "Mistral": lambda: decoder("Mistral"),
    "Qwen2": lambda: decoder("Qwen2"),
    "Qwen3": lambda: decoder("Qwen3", head_dim=8),
    "Gemma 2": lambda: decoder("Gemma2", head_dim=8),
    "Gemma 3": lambda: text("Gemma3Text", "Gemma3ForCausalLM", head_dim=8, num_key_value_heads=2),
    "OLMo2": lambda: decoder("Olmo2"),
    "Phi-3": lambda: decoder("Phi3"),
    "Mixtral": lambda: decoder("Mixtral", num_local_experts=3, experts_implementation="batched_mm"),
    "Qwen3-MoE": lambda: decoder(
        "Qwen3Moe",
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        experts_implementation="batched_mm",
        decoder_sparse_step=1,
    ),
    "GPT-2": lambda: text("GPT2", "GPT2LMHeadModel"),
    "GPT-NeoX": lambda: text("GPTNeoX", "GPTNeoXForCausalLM"),
    "BERT": lambda: text("Bert", "BertForMaskedLM"),
    "RoBERTa": lambda: text("Roberta", "RobertaForMaskedLM"),
    "DistilBERT": lambda: text("DistilBert", "DistilBertForMaskedLM", dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    "DeBERTa": lambda: text("DebertaV2", "DebertaV2ForMaskedLM", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "OPT": lambda: text("OPT", "OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=32),
    "BLOOM": lambda: text("Bloom", "BloomForCausalLM", n_layer=2, n_head=4),
    "Falcon": lambda: text("Falcon", "FalconForCausalLM"),
    "Mamba": lambda: text("Mamba", "MambaForCausalLM", state_size=4, time_step_rank=3, use_mambapy=False),
}

ALL: dict[str, Callable[[], Made]] = {**TEXT}


def expected() -> dict[str, list[str]]:
    """The committed table: every space found in each architecture, as "name width/blocks"."""
    return json.loads((Path(__file__).parent / "data" / "traced_spaces.json").read_text())


def described(spec: PermutationSpec) -> list[str]:
    return [f"{s.name} {s.width}{f'/{s.blocks}' if s.blocks > 1 else ''}" for s in spec]
