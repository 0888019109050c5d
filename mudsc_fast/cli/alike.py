"""Can these checkpoints be merged? Refusals that say what differs, and what could still be done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mudsc_fast.cli import huggingface, options

if TYPE_CHECKING:
    from mudsc_fast.checkpoints import Checkpoint, TensorInfo

# What quantised checkpoints keep beside or instead of their weights (bitsandbytes, GPTQ, AWQ, compressed-tensors).
_QUANTISED = (
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".absmax",
    ".quant_map",
    ".SCB",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
)
_CONFIG = ("quantization_config", "quantization", "compression_config")


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """ValueError for weights in few bits: codes cannot be averaged, and their scales belong to groups of units."""
    told = [
        key for key in _CONFIG if huggingface.has_config(checkpoint) and huggingface.read_config(checkpoint).get(key)
    ]
    named = [name for name in checkpoint if name.endswith(_QUANTISED) or ".quant_state." in name]
    narrow = [
        name
        for name, info in checkpoint.layout.items()
        if len(info.shape) > 1 and info.dtype.itemsize == 1 and str(info.dtype) != "torch.bool"
    ]
    if told or named or narrow:
        why = f"config.json has a {told[0]}" if told else f"it holds {(named or narrow)[0]!r}"
        if not told and not named:
            why += f" in {checkpoint.layout[narrow[0]].dtype}"
        raise ValueError(
            f"{checkpoint.path}: quantised weights cannot be merged ({why}): merge the float16, bfloat16 or float32 "
            "checkpoints that it was made from and quantise the result, or dequantise it first"
        )


def with_one_copy(opened: list[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints, without second copies of tied tensors that some of them store and others do not."""
    common = set.intersection(*(set(checkpoint) for checkpoint in opened))
    result = []
    for checkpoint in opened:
        extra = [name for name in checkpoint if name not in common]
        untied = huggingface.has_config(checkpoint) and (
            huggingface.read_config(checkpoint).get("tie_word_embeddings") is False
        )
        copies = {} if untied else {name: twin for name in extra if (twin := _twin(checkpoint, name, common))}
        for name, twin in copies.items():
            options.settings().say(f"note: {name!r} of {checkpoint.path} is a copy of {twin!r} and is left out")
        result.append(checkpoint.without(copies) if copies else checkpoint)
    return result


def _twin(checkpoint: Checkpoint, name: str, among: set[str]) -> str | None:
    """A tensor among these with the same contents."""
    import torch

    info = checkpoint.layout[name]
    if len(info.shape) < 2:
        return None
    for other in sorted(among):
        if checkpoint.layout[other] == info and torch.equal(
            checkpoint.rows(other, slice(0, 64)), checkpoint.rows(name, slice(0, 64))
        ):
            step = max(1, (64 << 20) // max(info.nbytes // max(info.shape[0], 1), 1))
            parts = range(0, info.shape[0], step)
            if all(
                torch.equal(checkpoint.rows(other, slice(k, k + step)), checkpoint.rows(name, slice(k, k + step)))
                for k in parts
            ):
                return other
    return None


def require_alike(opened: Sequence[Checkpoint]) -> None:
    """ValueError, naming the difference, unless all have the first one's tensors in the first one's shapes."""
    first, layout = opened[0], opened[0].layout
    for other in opened[1:]:
        theirs = other.layout
        odd = sorted(layout.keys() ^ theirs.keys())
        if odd:
            has, lacks = (first, other) if odd[0] in layout else (other, first)
            raise ValueError(
                f"expected checkpoints of one architecture, but {has.path} has a tensor {odd[0]!r} that {lacks.path} "
                f"lacks ({len(odd)} such tensors){_configs(first, other)}"
            )
        differing = [name for name, info in layout.items() if theirs[name].shape != info.shape]
        if differing:
            raise ValueError(_shapes(first, other, layout, theirs, differing))


def _shapes(
    first: Checkpoint,
    other: Checkpoint,
    mine: dict[str, TensorInfo],
    theirs: dict[str, TensorInfo],
    differing: list[str],
) -> str:
    name = differing[0]
    same = [n for n in mine if n not in differing]
    share = sum(mine[n].nbytes for n in same) / max(sum(info.nbytes for info in mine.values()), 1)
    text = (
        f"expected checkpoints of one architecture, but {name!r} has shape {mine[name].shape} in {first.path} and "
        f"{theirs[name].shape} in {other.path} ({len(differing)} such tensors){_configs(first, other)}. "
    )
    rows_only = all(mine[n].shape[1:] == theirs[n].shape[1:] for n in differing if mine[n].shape)
    if rows_only and len(differing) <= 3 and any("emb" in n or "wte" in n or "head" in n for n in differing):
        text += (
            f"Only the vocabularies differ: {', '.join(differing)}. The other {len(same)} tensors ({share:.0%} of the "
            "bytes) could be merged: give both models one vocabulary first (transformers: "
            "resize_token_embeddings, after the tokenizers agree on what each row means)"
        )
    elif same:
        text += (
            f"The widths differ; {len(same)} of {len(mine)} tensors ({share:.0%} of the bytes) have equal shapes and "
            "could be merged by themselves, from files that hold only these; the rest needs models of one width"
        )
    else:
        text += "No tensor has the same shape in both, so nothing could be merged"
    return text


def _configs(first: Checkpoint, other: Checkpoint) -> str:
    """What the configurations say differently about sizes."""
    if not (huggingface.has_config(first) and huggingface.has_config(other)):
        return ""
    mine, theirs = huggingface.read_config(first), huggingface.read_config(other)
    words = ("size", "num_", "layers", "heads", "dim", "width", "n_", "architectures", "model_type", "tie_")
    odd = [key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key)]
    told = [f"{key} {mine.get(key)} and {theirs.get(key)}" for key in odd if any(word in key for word in words)]
    return f"; config.json: {', '.join(told[:6])}" if told else ""
