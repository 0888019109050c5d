"""Vision transformers: fused or separate q, k, v, QK-norm, class token or pooling; timm and Hugging Face names.

The residual stream is one space. In each layer q and k share a space (their product is all that counts), v and the
output projection's input another, and both move their heads together: one tie. A QK-norm has one weight for all heads,
so there the dims inside a head are a space of their own, which moves alike in all heads, and the heads another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from mudsc_fast.spaces import Axis, Space, Tap
from mudsc_fast.spec import PermutationSpec
from mudsc_fast.specs.family import Family, Shapes, covers, norm_axes, produced


@dataclass(frozen=True)
class _Style:
    """Names of the parts: of the model, and (relative to a layer) of a layer."""

    patch: str
    tokens: tuple[str, ...]
    layers: str
    fused: str | None
    separate: tuple[str, str, str]
    qk_norms: tuple[str, str] | None
    proj: str
    norms: tuple[str, str]
    scales: tuple[str, ...]
    fc1: str
    fc2: str
    last: tuple[str, ...]
    head: str
    prefix: str = ""


_HUGGINGFACE = ("embeddings.cls_token", "embeddings.position_embeddings", "embeddings.mask_token")
_STYLES = {
    "timm": _Style(
        patch="patch_embed.proj",
        tokens=("cls_token", "pos_embed", "reg_token"),
        layers="blocks",
        fused="attn.qkv",
        separate=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        qk_norms=("attn.q_norm", "attn.k_norm"),
        proj="attn.proj",
        norms=("norm1", "norm2"),
        scales=("ls1.gamma", "ls2.gamma"),
        fc1="mlp.fc1",
        fc2="mlp.fc2",
        last=("norm", "fc_norm"),
        head="head",
    ),
    "huggingface": _Style(
        patch="embeddings.patch_embeddings.projection",
        tokens=_HUGGINGFACE,
        layers="layers",
        fused=None,
        separate=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        qk_norms=None,
        proj="attention.o_proj",
        norms=("layernorm_before", "layernorm_after"),
        scales=(),
        fc1="mlp.fc1",
        fc2="mlp.fc2",
        last=("layernorm",),
        head="classifier",
        prefix="vit.",
    ),
    "huggingface4": _Style(  # transformers before 5, and the checkpoints written by it
        patch="embeddings.patch_embeddings.projection",
        tokens=_HUGGINGFACE,
        layers="encoder.layer",
        fused=None,
        separate=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        qk_norms=None,
        proj="attention.output.dense",
        norms=("layernorm_before", "layernorm_after"),
        scales=(),
        fc1="intermediate.dense",
        fc2="output.dense",
        last=("layernorm",),
        head="classifier",
        prefix="vit.",
    ),
}


def vit(
    depth: int = 12,
    width: int = 384,
    heads: int = 6,
    hidden: int | None = None,
    head_dim: int | None = None,
    fused: bool = True,
    qk_norm: bool = False,
    qkv_bias: bool = True,
    class_token: bool = True,
    pool: str = "token",
    names: str = "timm",
) -> PermutationSpec:
    """The spec of a pre-norm vision transformer with learned positions.

    depth: layers. width: of the residual stream. heads, head_dim (width / heads): of the attention. hidden: of the MLP
    (4 width). fused: one qkv tensor, else q_proj, k_proj, v_proj. qk_norm: LayerNorm or RMSNorm over a head's dims of q
    and k. pool: "token" (the last norm is `norm`) or "mean" (it is `fc_norm`, after pooling), for timm names. names:
    "timm", "huggingface" (ViTForImageClassification), "huggingface4" (the same before transformers 5).
    """
    if names not in _STYLES:
        raise ValueError(f"names: expected one of {', '.join(_STYLES)}, got {names!r}")
    if pool not in ("token", "mean"):
        raise ValueError(f"pool: expected 'token' or 'mean', got {pool!r}")
    if head_dim is None and width % heads:
        raise ValueError(f"heads: {heads} heads do not divide the width {width}; give head_dim")
    style = _STYLES[names]
    absent = {style.tokens[-1], *style.scales}
    if not class_token:
        absent.add(style.tokens[0])
    if names == "timm":
        absent.add("fc_norm" if pool == "token" else "norm")
    if not qk_norm and style.qk_norms:
        absent.update(style.qk_norms)
    if fused and style.fused:
        absent.update(style.separate)
    elif style.fused:
        absent.add(style.fused)
    if not qkv_bias:
        absent.update(f"{name}.bias" for name in (*style.separate, style.fused))

    def has(name: str) -> bool:
        short = re.sub(rf"^{re.escape(style.prefix + style.layers)}\.\d+\.", "", name).removeprefix(style.prefix)
        return not ({short, short.rpartition(".")[0]} & absent) and "running_" not in short

    size = head_dim or width // heads
    return _build(style, style.prefix, depth, width, heads, size, hidden or 4 * width, [style.head], has)


def _layer(
    style: _Style, name: str, heads: int, size: int, hidden: int, qk_norm_size: int, has: Callable[[str], bool]
) -> list[Space]:
    """The spaces of one layer; qk_norm_size: the width of its QK-norm's weight, 0 without one."""
    every, fused = heads * size, style.fused is not None and has(f"{name}.{style.fused}.weight")
    tie = f"{name}.heads"

    def axes(which: int, at: int | tuple[int, int]) -> list[Axis]:
        module = f"{name}.{style.fused}" if fused else f"{name}.{style.separate[which]}"
        parts = [n for n in (f"{module}.weight", f"{module}.bias") if has(n)]
        if not fused:
            return [Axis(n, 0, "out", (heads, size), at) for n in parts]
        shifted = at + 1 if isinstance(at, int) else (at[0] + 1, at[1] + 1)
        return [Axis(n, 0, "out", (3, heads, size), shifted, (0, which)) for n in parts]

    def tap(which: int, at: int | tuple[int, int]) -> Tap:
        axis = axes(which, at)[0]
        return Tap(axis.tensor.removesuffix(".weight"), "output", -1, axis.view, axis.at, axis.pick)

    qk_norms = [f"{name}.{n}" for n in style.qk_norms or ()] if qk_norm_size else []
    spaces = []
    if qk_norm_size in (0, every):
        taps = (tap(0, (0, 1)), tap(1, (0, 1)))
        both = [*axes(0, (0, 1)), *axes(1, (0, 1)), *(a for n in qk_norms for a in norm_axes(n, has))]
        spaces.append(Space(f"{name}.qk", every, tuple(both), taps, heads, tie=tie))
    else:
        inside = [*axes(0, 1), *axes(1, 1), *(a for n in qk_norms for a in norm_axes(n, has))]
        taps = (Tap(qk_norms[0], "output", -1), Tap(qk_norms[1], "output", -1))
        spaces.append(Space(f"{name}.qk", size, tuple(inside), taps))
        taps = (tap(0, 0), tap(1, 0))
        spaces.append(Space(f"{name}.heads", heads, (*axes(0, 0), *axes(1, 0)), taps, heads, tie=tie))
    proj = f"{name}.{style.proj}"
    values = (*axes(2, (0, 1)), Axis(f"{proj}.weight", 1, "in"))
    spaces.append(Space(f"{name}.v", every, values, (Tap(proj, "input", -1),), heads, tie=tie))
    fc1, fc2 = f"{name}.{style.fc1}", f"{name}.{style.fc2}"
    inner = (*produced([f"{fc1}.weight", f"{fc1}.bias"], has), Axis(f"{fc2}.weight", 1, "in"))
    return [*spaces, Space(f"{name}.mlp", hidden, inner, (Tap(fc2, "input", -1),))]


def _residual(
    style: _Style, prefix: str, layers: Sequence[str], width: int, heads: Sequence[str], has: Callable[[str], bool]
) -> Space:
    patch = f"{prefix}{style.patch}"
    axes = produced([f"{patch}.weight", f"{patch}.bias"], has)
    axes += [Axis(f"{prefix}{token}", 2, "out") for token in style.tokens if has(f"{prefix}{token}")]
    for name in layers:
        scales = [f"{name}.{s}" for s in (*style.scales, *[""] * (2 - len(style.scales)))]
        readers = [style.fused, *style.separate] if style.fused else [*style.separate]
        for norm, into, out, scale in (
            (style.norms[0], readers, style.proj, scales[0]),
            (style.norms[1], [style.fc1], style.fc2, scales[1]),
        ):
            axes += norm_axes(f"{name}.{norm}", has)
            axes += [Axis(f"{name}.{r}.weight", 1, "in") for r in into if has(f"{name}.{r}.weight")]
            axes += produced([f"{name}.{out}.weight", f"{name}.{out}.bias"], has)
            axes += produced([scale], has) if style.scales else []
    last = [f"{prefix}{n}" for n in style.last if has(f"{prefix}{n}.weight")]
    axes += [a for n in last for a in norm_axes(n, has)]
    axes += [Axis(f"{head}.weight", 1, "in") for head in heads]
    # What the layers read is normed; a norm after pooling sees one sample an image, so there the raw stream is tapped.
    normed = f"{prefix}{style.last[0]}" in last
    tap = Tap(last[0], "output", -1) if normed else Tap(layers[-1], "output", -1)
    return Space("residual", width, tuple(axes), (tap,))


def _build(
    style: _Style,
    prefix: str,
    depth: int,
    width: int,
    heads: int,
    size: int,
    hidden: int,
    outputs: Sequence[str],
    has: Callable[[str], bool],
    qk_norm_size: int | None = None,
) -> PermutationSpec:
    layers = [f"{prefix}{style.layers}.{i}" for i in range(depth)]
    normed = style.qk_norms is not None and has(f"{layers[0]}.{style.qk_norms[0]}.weight")
    norm_size = 0 if not normed else (size if qk_norm_size is None else qk_norm_size)
    spaces = [_residual(style, prefix, layers, width, outputs, has)]
    for name in layers:
        spaces += _layer(style, name, heads, size, hidden, norm_size, has)
    return PermutationSpec(tuple(spaces))


def _heads(
    style: _Style, layer: str, shapes: Shapes, module: nn.Module | None, hints: Mapping[str, int], every: int
) -> int:
    """The number of heads: as told, or as the attention module or a QK-norm says."""
    heads = hints.get("heads")
    parts = dict(module.named_modules()) if module is not None else {}
    attention = parts.get(f"{layer}.{style.separate[0]}".rpartition(".")[0])
    for owner in (attention, getattr(module, "config", None)):
        for attribute in ("num_attention_heads", "num_heads"):
            heads = heads or getattr(owner, attribute, None)
    norm = shapes.get(f"{layer}.{style.qk_norms[0]}.weight") if style.qk_norms else None
    if heads is None and norm is not None and norm[0] != every:
        heads = every // norm[0]
    if not isinstance(heads, int) or heads < 1 or every % heads:
        raise ValueError(
            f"{layer}: a vision transformer whose number of heads is not told by its tensors; give the module, or "
            f"heads=... that divides {every}"
        )
    return heads


def recognise(shapes: Shapes, module: nn.Module | None, hints: Mapping[str, int]) -> PermutationSpec | None:
    """A pre-norm ViT with learned positions by its names, if every tensor is accounted for."""
    for style in _STYLES.values():
        patch = next((n for n in shapes if n.endswith(f"{style.patch}.weight") and len(shapes[n]) == 4), None)
        if patch is None:
            continue
        prefix = patch.removesuffix(f"{style.patch}.weight")
        spec = _recognise(style, prefix, shapes, module, hints)
        if spec is not None:
            return spec
    return None


def _recognise(
    style: _Style, prefix: str, shapes: Shapes, module: nn.Module | None, hints: Mapping[str, int]
) -> PermutationSpec | None:
    width = shapes[f"{prefix}{style.patch}.weight"][0]
    numbered = re.compile(rf"{re.escape(prefix + style.layers)}\.(\d+)\.(.+?)(?:\.(weight|bias))?$")
    found = {n: m for n in shapes if (m := numbered.match(n))}
    numbers = {int(m.group(1)) for m in found.values()}
    allowed = {style.fused, *style.separate, *(style.qk_norms or ()), style.proj, *style.norms, *style.scales}
    if not numbers or any(m.group(2) not in allowed | {style.fc1, style.fc2} for m in found.values()):
        return None
    rotary = module is not None and any(re.search("rope|rot", type(m).__name__.lower()) for m in module.modules())
    if rotary or f"{prefix}{style.tokens[1]}" not in shapes or numbers != set(range(len(numbers))):
        return None
    first = f"{prefix}{style.layers}.0"
    known = {f"{prefix}{n}" for n in (style.patch, *style.last)}
    rest = [n for n in shapes if n not in found and n.rpartition(".")[0] not in known]
    outputs = [n.removesuffix(".weight") for n in rest if len(shapes[n]) == 2 and n.endswith(".weight")]
    tokens = {f"{prefix}{t}" for t in style.tokens}
    if not outputs or any(n not in tokens and n.rpartition(".")[0] not in outputs for n in rest):
        return None
    try:
        every, hidden = shapes[f"{first}.{style.proj}.weight"][1], shapes[f"{first}.{style.fc1}.weight"][0]
        heads = _heads(style, first, shapes, module, hints, every)
        norm = shapes.get(f"{first}.{style.qk_norms[0]}.weight", (0,))[0] if style.qk_norms else 0
    except KeyError:
        return None
    spec = _build(style, prefix, len(numbers), width, heads, every // heads, hidden, outputs, shapes.__contains__, norm)
    return spec if covers(spec, shapes, outputs) else None


FAMILY = Family(
    "vit",
    "patch_embed.proj.weight, pos_embed, blocks.0.attn.qkv.weight or attn.q_proj.weight, blocks.0.mlp.fc1.weight, "
    "head.weight (timm), or embeddings.patch_embeddings.projection.weight and layers.0.attention.q_proj.weight or "
    "encoder.layer.0.attention.attention.query.weight (Hugging Face)",
    recognise,
)
