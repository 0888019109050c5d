"""Small inputs and small copies of Hugging Face models, by what their configs say; transformers itself is not imported.

Tracing needs inputs of the right kind, and the law of a spec is tried on weights that are drawn at random for a config
whose sizes are shrunken.
"""

from __future__ import annotations

import copy
import inspect
import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

_LENGTHS = {"input_ids": 7, "decoder_input_ids": 5}
_SIDE = 64  # of images, for convolutional networks whose config names no size
_LEAST_ID = 3  # the smaller ones are often padding and separators, which some models look for

# Names that configs give to the same thing.
_LAYERS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)
_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_INNER = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "n_inner",
    "d_ff",
    "hidden_dim",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "ffn_hidden_size",
)
_HEAD_DIM = 8
_TOP_ID = 63


def example_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """Keyword arguments for one forward pass of a Hugging Face model; None for a model without a config.

    On the model's device ("meta" too), two samples, floating inputs in its dtype. ValueError for a model that takes
    neither tokens nor images nor spectrograms.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return None
    takes = set(inspect.signature(model.forward).parameters)
    home = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    text, vision = getattr(config, "text_config", None) or config, getattr(config, "vision_config", None) or config
    inputs: dict[str, Tensor] = {}
    if "input_ids" in takes and hasattr(text, "vocab_size"):
        inputs["input_ids"] = _ids("input_ids", text)
    pair = vision is not config and text is not config and _like_clip(config)
    if "pixel_values" in takes and (pair or "input_ids" not in inputs):
        inputs["pixel_values"] = _image(vision)
    if "input_features" in takes and hasattr(config, "num_mel_bins"):
        length = 2 * getattr(config, "max_source_positions", 8)
        inputs["input_features"] = _noise(2, config.num_mel_bins, length)
        inputs.pop("input_ids", None)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = _ids("decoder_input_ids", text)
    if not inputs:
        raise ValueError(
            f"{type(model).__name__}: no example inputs are known for it; it takes {', '.join(sorted(takes))}"
        )
    return {k: x.to(home.device, dtype if x.is_floating_point() else x.dtype) for k, x in inputs.items()}


def _like_clip(config: Any) -> bool:
    """Two towers side by side; a language model that reads images has placeholders among its tokens."""
    names = ("image_token_id", "image_token_index", "image_token")
    return not any(getattr(config, name, None) is not None for name in names)


def _ids(name: str, config: Any) -> Tensor:
    top = max(min(int(config.vocab_size), 10_000), _LEAST_ID + 1)
    generator = torch.Generator().manual_seed(len(name))
    return torch.randint(_LEAST_ID, top, (2, _LENGTHS[name]), generator=generator)


def _image(config: Any) -> Tensor:
    size = getattr(config, "image_size", None) or _SIDE
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return _noise(2, getattr(config, "num_channels", 3), height, width)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def shrunken(config: Any, narrow: bool = True) -> Any:
    """A copy of a Hugging Face config with two layers; narrow: also narrower, with few heads and tokens.

    Ratios that shape the spec stay: query heads per key head, an explicit head dim.
    """
    small = copy.deepcopy(config)
    for name in (*getattr(type(small), "sub_configs", {}), "text_config", "vision_config"):
        inner = getattr(small, name, None)
        if inner is not None and hasattr(inner, "to_dict"):
            setattr(small, name, shrunken(inner, narrow))
    for name in _LAYERS:
        _set(small, name, lambda layers: min(layers, 2))
    kinds = getattr(small, "layer_types", None)
    if isinstance(kinds, list):
        with suppress(AttributeError):  # some configs make it anew
            small.layer_types = kinds[:2]
    if narrow:
        _narrow(small)
    return small


def _narrow(config: Any) -> None:
    heads = next((h for name in _HEADS if isinstance(h := getattr(config, name, None), int)), None)
    wide = next((h for name in _HIDDEN if isinstance(h := getattr(config, name, None), int)), None)
    if heads is None or wide is None:
        return
    kv = getattr(config, "num_key_value_heads", None)
    groups = heads // kv if isinstance(kv, int) and 0 < kv < heads else 1
    count = min(heads, 2 * groups if groups > 1 else 4)
    if groups > 1:
        config.num_key_value_heads = max(1, count // groups)
    elif isinstance(kv, int):
        config.num_key_value_heads = count
    for name in _HEADS:
        _set(config, name, lambda _: count)
    for name in _HIDDEN:
        _set(config, name, lambda _: count * _HEAD_DIM)
    for name in ("head_dim", "d_kv", "attention_head_size"):
        _set(config, name, lambda _: _HEAD_DIM)
    for name in _INNER:
        _set(config, name, lambda _: 6 * _HEAD_DIM)
    _set(config, "word_embed_proj_dim", lambda size: count * _HEAD_DIM if size == wide else size)
    for name in ("num_experts_per_tok", "top_k"):
        _set(config, name, lambda used: min(used, 2))
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        _set(config, name, lambda experts: min(experts, 4))
    _set(config, "query_pre_attn_scalar", lambda _: _HEAD_DIM)
    if isinstance(getattr(config, "vocab_size", None), int) and config.vocab_size > _TOP_ID + 1:
        config.vocab_size = _TOP_ID + 1
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            _set(config, name, lambda token: min(token, _TOP_ID))
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if isinstance(size, int) and isinstance(patch, int):
        config.image_size = min(size, 4 * patch)


def _set(config: Any, name: str, change: Any) -> None:
    value = getattr(config, name, None)
    if isinstance(value, int) and not isinstance(value, bool):
        with suppress(AttributeError):  # a property that follows from others
            setattr(config, name, change(value))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with all weights drawn anew, norms and biases too: at 0 or 1 they would hide mistakes.

    Matrices have the scale of their fan-in, so that no softmax saturates; vectors lie around what they were.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            statistic = name.endswith(("running_mean", "running_var"))
            if not tensor.is_floating_point() or not (statistic or isinstance(tensor, nn.Parameter)):
                continue
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            if name.endswith("running_var"):
                tensor.add_(0.3 * noise.abs())
            elif tensor.dim() < 2:
                tensor.add_(0.3 * noise)
            else:
                tensor.copy_(noise / math.sqrt(max(tensor[0].numel(), 1)))
    return model.eval()
