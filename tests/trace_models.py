"""Small random models of many architectures, with inputs: what tracing is tested on."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trace_modules as m
from torch import nn

from mudsc_fast.layout import dims_of
from mudsc_fast.spec import PermutationSpec

_TABLE = Path(__file__).parent / "data" / "traced_spaces.json"
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
    "Mixtral": lambda: decoder("Mixtral", num_local_experts=3),
    "Qwen3-MoE": lambda: decoder(
        "Qwen3Moe",
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        decoder_sparse_step=1,
        experts_implementation="batched_mm",
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
    "Mamba 2": lambda: text(
        "Mamba2", "Mamba2ForCausalLM", num_heads=8, head_dim=8, state_size=4, n_groups=2, expand=2, chunk_size=4
    ),
    "RWKV": lambda: text("Rwkv", "RwkvForCausalLM", attention_hidden_size=32),
    "GPT-J": lambda: text("GPTJ", "GPTJForCausalLM", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=32),
    "MPT": lambda: text("Mpt", "MptForCausalLM", d_model=32, n_heads=4, n_layers=2, max_seq_len=32),
    "GPT-BigCode (one key head)": lambda: text(
        "GPTBigCode", "GPTBigCodeForCausalLM", n_embd=32, n_layer=2, n_head=4, n_positions=32
    ),
    "StarCoder2": lambda: decoder("Starcoder2"),
    "StableLM": lambda: decoder("StableLm"),
    "Cohere": lambda: decoder("Cohere"),
    "DeepSeek-V3": lambda: decoder(
        "DeepseekV3",
        num_key_value_heads=4,
        kv_lora_rank=12,
        q_lora_rank=10,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
    ),
    "GPT-OSS": lambda: decoder("GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "ModernBERT": lambda: text(
        "ModernBert", "ModernBertForMaskedLM", pad_token_id=0, global_attn_every_n_layers=2, local_attention=4
    ),
    "ALBERT": lambda: text("Albert", "AlbertForMaskedLM", embedding_size=16),
    "ELECTRA": lambda: text("Electra", "ElectraForMaskedLM", embedding_size=16),
    "XLNet": lambda: text("XLNet", "XLNetLMHeadModel", d_model=32, n_layer=2, n_head=4, d_inner=48),
}


def image(kind: str, model: str, **options: Any) -> Made:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**options)
    return getattr(transformers, model)(config), {"pixel_values": pixels(options.get("image_size", 16))}


def pixels(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


_VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
_PATCH = {"image_size": 16, "patch_size": 4}

VISION: dict[str, Callable[[], Made]] = {
    "ViT": lambda: image("ViT", "ViTForImageClassification", **_VIT, **_PATCH),
    "DeiT": lambda: image("DeiT", "DeiTForImageClassification", **_VIT, **_PATCH),
    "DINOv2": lambda: image("Dinov2", "Dinov2ForImageClassification", **_VIT, **_PATCH, mlp_ratio=2, num_labels=5),
    "BEiT": lambda: image("Beit", "BeitForImageClassification", **_VIT, **_PATCH),
    "Swin": lambda: image(
        "Swin",
        "SwinForImageClassification",
        image_size=16,
        patch_size=2,
        embed_dim=12,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=4,
    ),
    "ConvNeXt": lambda: image(
        "ConvNext", "ConvNextForImageClassification", hidden_sizes=[8, 12], depths=[1, 2], num_stages=2, patch_size=2
    ),
    "ConvNeXtV2": lambda: image(
        "ConvNextV2",
        "ConvNextV2ForImageClassification",
        hidden_sizes=[8, 12],
        depths=[1, 1],
        num_stages=2,
        patch_size=2,
    ),
    "MobileNetV2": lambda: image(
        "MobileNetV2", "MobileNetV2ForImageClassification", depth_multiplier=0.25, image_size=32
    ),
    "RegNet": lambda: image(
        "RegNet", "RegNetForImageClassification", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8
    ),
    "BiT": lambda: image(
        "Bit",
        "BitForImageClassification",
        embedding_size=32,
        hidden_sizes=[64, 64],
        depths=[1, 1],
        image_size=32,
        num_groups=4,
    ),
    "PoolFormer": lambda: image(
        "PoolFormer",
        "PoolFormerForImageClassification",
        hidden_sizes=[8, 12],
        depths=[1, 1],
        num_encoder_blocks=2,
        patch_sizes=[3, 3],
        strides=[2, 2],
        padding=[1, 1],
    ),
    "SegFormer": lambda: image(
        "Segformer",
        "SegformerForImageClassification",
        hidden_sizes=[8, 16],
        depths=[1, 1],
        num_encoder_blocks=2,
        num_attention_heads=[1, 2],
        sr_ratios=[2, 1],
        patch_sizes=[3, 3],
        strides=[2, 2],
        mlp_ratios=[2, 2],
    ),
    "ViTMAE": lambda: masked_autoencoder(),
    "FocalNet": lambda: image(
        "FocalNet",
        "FocalNetForImageClassification",
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
    ),
    "ResNet (bottleneck)": lambda: image(
        "ResNet", "ResNetForImageClassification", embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2]
    ),
}


def speech() -> Made:
    import transformers

    config = transformers.Wav2Vec2Config(
        vocab_size=20,
        **{key: _TEXT[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
        conv_dim=[16, 16],
        conv_stride=[2, 2],
        conv_kernel=[3, 3],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    )
    waves = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    return transformers.Wav2Vec2ForCTC(config), {"input_values": waves}


def masked_autoencoder() -> Made:
    import transformers

    config = transformers.ViTMAEConfig(
        **_VIT,
        **_PATCH,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=20,
    )
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    return transformers.ViTMAEForPreTraining(config), {"pixel_values": pixels(), "noise": noise}


def clip(kind: str) -> Made:
    import transformers

    text = {**_TEXT, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    options: dict[str, Any] = {"text_config": text, "vision_config": {**_VIT, **_PATCH}}
    if kind == "CLIP":
        options["projection_dim"] = 12
    else:
        options["text_config"]["projection_size"] = 24
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**options))
    return model, {"input_ids": ids(), "pixel_values": pixels()}


def seq2seq(kind: str, **options: Any) -> Made:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        **{"vocab_size": 40, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1, **options}
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    return model, {"input_ids": ids(), "decoder_input_ids": ids(2, 5, 1)}


_HALVES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
}


def whisper() -> Made:
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=40,
        num_mel_bins=6,
        max_source_positions=10,
        max_target_positions=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        **_HALVES,
    )
    features = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(0))
    return transformers.WhisperForConditionalGeneration(config), {
        "input_features": features,
        "decoder_input_ids": ids(2, 5),
    }


def plain(model: nn.Module, key: str = "input") -> Made:
    return model, {key: pixels() if key == "input" else ids()}


PAIRS: dict[str, Callable[[], Made]] = {
    "CLIP": lambda: clip("CLIP"),
    "SigLIP": lambda: clip("Siglip"),
    "BART": lambda: seq2seq("Bart", **_HALVES),
    "T5": lambda: seq2seq("T5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "T5 v1.1": lambda: seq2seq(
        "T5",
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "Whisper": whisper,
    "wav2vec 2.0": speech,
    "Pegasus": lambda: seq2seq("Pegasus", **_HALVES),
}

PLAIN: dict[str, Callable[[], Made]] = {
    "ResNeXt": lambda: plain(m.conv_net(m.ResNeXtBlock(16, 12, 3), m.ResNeXtBlock(16, 12, 3), width=16, last=16)),
    "MobileNetV3 block": lambda: plain(m.conv_net(m.Inverted(12, 20, 6), m.Inverted(12, 20, 6), width=12, last=12)),
    "DenseNet": lambda: plain(m.conv_net(m.Dense(10, 4), m.Dense(14, 4), m.Dense(18, 4), width=10, last=22)),
    "ShuffleNet": lambda: plain(m.conv_net(m.Shuffle(12, 3), m.Shuffle(12, 3), width=12, last=12)),
    "ResNet (padded shortcut)": lambda: plain(m.conv_net(m.Padded(8), m.Padded(16), width=8, last=32)),
    "Autoencoder": lambda: (m.Autoencoder(), {"x": pixels()}),
    "MLP-Mixer": lambda: (m.Mixer(), {"x": pixels()}),
    "nn.TransformerEncoder": lambda: plain(m.Encoder(), "x"),
    "nn.TransformerEncoder (pre-norm)": lambda: plain(m.Encoder(True), "x"),
    "LSTM": lambda: plain(m.Recurrent(nn.LSTM), "x"),
    "LSTM (both directions)": lambda: plain(m.Recurrent(nn.LSTM, 2, True), "x"),
    "GRU": lambda: plain(m.Recurrent(nn.GRU, 1), "x"),
    "Weight norm": lambda: plain(m.conv_net(m.WeightNormed(12, 3), m.WeightNormed(12, 3), width=12, last=12)),
    "Pixel shuffle": lambda: plain(m.conv_net(m.PixelShuffled(12), m.PixelShuffled(12), width=12, last=12)),
    "Attention by einsum": lambda: plain(m.Einsum(), "x"),
}

ALL: dict[str, Callable[[], Made]] = {**TEXT, **VISION, **PAIRS, **PLAIN}


def expected() -> dict[str, list[str]]:
    """The committed table: every space found in each architecture, as "name width/blocks"."""
    return json.loads(_TABLE.read_text())


def randomised(model: nn.Module) -> nn.Module:
    """Norms, biases and other vectors at their initial values (0 or 1) would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if "running_mean" in n)]:
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.data += (0.3 if tensor.dim() < 2 else 0.05) * noise
    return model.eval()


def widened(name: str, model: nn.Module, inputs: dict[str, Any]) -> Made:
    """In float64, but for models with experts whose default product knows only float32."""
    if name in ("Mixtral", "DeepSeek-V3", "GPT-OSS"):
        return model, inputs
    return model.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def moved_share(spec: PermutationSpec, model: nn.Module) -> float:
    """Of all axes of more than one position, weighted by the sizes of their tensors: the share that a space moves."""
    moved = {(a.tensor, d) for s in spec for a in s.axes for d in dims_of(a)}
    found = [
        (t.numel(), (n, d) in moved) for n, t in model.named_parameters() for d in range(t.dim()) if t.shape[d] > 1
    ]
    return sum(size for size, yes in found if yes) / max(sum(size for size, _ in found), 1)


def described(spec: PermutationSpec) -> list[str]:
    return [f"{s.name} {s.width}{f'/{s.blocks}' if s.blocks > 1 else ''}" for s in spec]


def main() -> None:
    """Write the committed table anew and print docs/tracing.md's: look at what changed before you commit it."""
    torch.set_num_threads(1)
    table: dict[str, list[str]] = {}
    for name, make in ALL.items():
        torch.manual_seed(0)
        model, inputs = make()
        spec = PermutationSpec.trace(randomised(model), (), inputs)
        table[name] = described(spec)
        share = moved_share(spec, model)
        error = spec.verify(*widened(name, model, inputs), seed=2)
        shown = [s for s in table[name] if not re.search(r"(^|\.)(?!0\.)[1-9]\d*\.", s)]
        sys.stdout.write(f"| {name} | {len(spec)} | {', '.join(shown[:9])} | {share:.0%} | {error:.0e} |\n")
    rows = [f"  {json.dumps(name)}: {json.dumps(spaces)}" for name, spaces in table.items()]
    _TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
