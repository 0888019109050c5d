"""The official MuDSC permutation dictionaries: builders by their names and arguments, and their translation to a spec.

``{id: [[axis, tensor, cfg], ...]}``: the axes that are regrouped together. cfg keys: "in" (the axis reads the units;
None, a module's name, or a dictionary that says where activations are seen), "group" (blocks), "split_dim" (one tensor
cut into several, such as qkv), "act_module" (where activations are seen), "ignore" (moved, not compared).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mudsc_fast.spaces import Axis, Space
from mudsc_fast.spec import PermutationSpec, shape_of

Config = dict[str, Any]
Entry = list[Any]
Perms = dict[Any, Any]

IGNORE_CFG: Config = {"ignore": None}
IN_CFG: Config = {"in": None}
LINEAR_IN_CFG: Config = {"in": {"dim": -1}}


def group_cfg(group: int, same_members: bool = False) -> Config:
    """Units move inside `group` blocks and blocks as wholes."""
    return {"group": {"num": group, "same": same_members}}


def split_dim_cfg(axis: int, params_name: str, suffixes: Sequence[str]) -> Config:
    """The tensor is cut into parts of equal size along the axis, called NAME_SUFFIX from there on."""
    return {"split_dim": [axis, params_name, list(suffixes)]}


def act_module_cfg(
    name: str | None = None, dim: int | None = None, hook: str | None = None, reshape_func: Any = None
) -> Config:
    """Where activations are seen: the module, the dim of the units, "pre" or "post", and a reshape by its name."""
    told = {"name": name, "dim": dim, "hook": hook, "reshape_func": reshape_func}
    return {"act_module": {key: value for key, value in told.items() if value is not None}}


# ---- builders ----


def get_resnet_perm(
    block: int = 2,
    num_blocks: Sequence[int] = (3, 3, 3),
    shortcut_name: str = "shortcut",
    fc_name: str = "linear",
    pool_name: str = "avgpool",
    res_start_layer: int = 1,
    ignore_running_val: bool = True,
) -> Perms:
    """A ResNet with batch norms. res_start_layer: the first layer (from 0) whose first block has a shortcut."""
    running = dict(IGNORE_CFG) if ignore_running_val else {}

    def norm(name: str) -> list[Entry]:
        return [
            [0, f"{name}.weight"],
            [0, f"{name}.bias"],
            [0, f"{name}.running_mean", running],
            [0, f"{name}.running_var", running],
        ]

    return _resnet(norm, block, num_blocks, shortcut_name, fc_name, pool_name, res_start_layer)


def get_resnet_perm_group(
    block: int = 2,
    num_blocks: Sequence[int] = (3, 3, 3),
    shortcut_name: str = "shortcut",
    fc_name: str = "linear",
    pool_name: str = "avgpool",
    res_start_layer: int = 1,
    group_num: int = 8,
) -> Perms:
    """A ResNet with group norms of `group_num` groups."""

    def norm(name: str) -> list[Entry]:
        return [[0, f"{name}.weight", group_cfg(group_num)], [0, f"{name}.bias"]]

    return _resnet(norm, block, num_blocks, shortcut_name, fc_name, pool_name, res_start_layer)


def _resnet(
    norm: Any, block: int, num_blocks: Sequence[int], shortcut: str, fc: str, pool: str, first_shortcut: int
) -> Perms:
    # Numbered in the order in which they are begun, since the order of visits depends on the numbers.
    perms: list[list[Entry]] = [[[0, "conv1.weight"], *norm("bn1")]]
    residual = inner = 0
    for layer, count in enumerate(num_blocks):
        for b in range(count):
            at = f"layer{layer + 1}.{b}"
            own_shortcut = b == 0 and layer >= first_shortcut
            entering = residual
            perms[entering].append([1, f"{at}.conv1.weight", dict(IN_CFG)])
            if own_shortcut:
                perms[entering].append([1, f"{at}.{shortcut}.0.weight", dict(IN_CFG)])
            for c in range(1, block + 1):
                if c > 1:
                    perms[inner].append([1, f"{at}.conv{c}.weight", dict(IN_CFG)])
                made = [[0, f"{at}.conv{c}.weight"], *norm(f"{at}.bn{c}")]
                if c < block:
                    perms.append(made)
                    inner = len(perms) - 1
                    continue
                if own_shortcut:
                    perms.append([[0, f"{at}.{shortcut}.0.weight"], *norm(f"{at}.{shortcut}.1")])
                    residual = len(perms) - 1
                perms[residual].extend(made)
    perms[residual].append([1, f"{fc}.weight", {"in": pool}])
    return dict(enumerate(perms))


def get_vit_perm(num_layer: int = 12, num_heads: int = 6, ignore_head: bool = False) -> Perms:
    """A vision transformer with timm's names and a fused qkv."""
    stem = [[2, "cls_token"], [2, "pos_embed"], [0, "patch_embed.proj.weight"], [0, "patch_embed.proj.bias"]]
    return _vit(stem, num_layer, num_heads, ignore_head)


def get_vit_clip_perm(num_layer: int = 12, num_heads: int = 12, ignore_head: bool = False) -> Perms:
    """The image transformer of CLIP with timm's names."""
    stem = [
        [2, "cls_token"],
        [2, "pos_embed"],
        [0, "patch_embed.proj.weight"],
        [0, "norm_pre.weight"],
        [0, "norm_pre.bias"],
    ]
    return _vit(stem, num_layer, num_heads, ignore_head)


def get_swin_perm(
    depths: Sequence[int] = (2, 2, 6, 2), num_heads: Sequence[int] = (3, 6, 12, 24), ignore_head: bool = False
) -> Perms:
    """A Swin transformer with timm's names: of its residual streams only the last stage's."""
    perms: list[list[Entry]] = []
    last: list[Entry] = []
    for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
        for i in range(depth):
            reads, inside = transformer_layer(f"layers.{stage}.blocks.{i}", heads)
            if stage == len(depths) - 1:
                last.extend(reads)
            perms.extend(inside)
        if stage == len(depths) - 2:
            last.append([0, f"layers.{stage}.downsample.reduction.weight"])
            perms.append(last)
    head = {**IN_CFG, **(IGNORE_CFG if ignore_head else {})}
    last.extend([[0, "norm.weight"], [0, "norm.bias"], [1, "head.weight", head]])
    return dict(enumerate(perms))


def _vit(stem: list[Entry], layers: int, heads: int, ignore_head: bool) -> Perms:
    perms: list[list[Entry]] = [stem]
    for i in range(layers):
        reads, inside = transformer_layer(f"blocks.{i}", heads)
        perms[0].extend(reads)
        perms.extend(inside)
    head = {**IN_CFG, **(IGNORE_CFG if ignore_head else {})}
    perms[0].extend([[0, "norm.weight"], [0, "norm.bias"], [1, "head.weight", head]])
    return dict(enumerate(perms))


def transformer_layer(at: str, heads: int) -> tuple[list[Entry], list[list[Entry]]]:
    """The residual stream's entries in one layer, and the layer's own permutations: q with k, v, hidden units."""
    qkv, parts = f"{at}.attn.qkv", ("q", "k", "v")
    residual: list[Entry] = [
        [0, f"{at}.norm1.weight"],
        [0, f"{at}.norm1.bias"],
        *([1, f"{qkv}.weight_{part}", dict(LINEAR_IN_CFG)] for part in parts),
        [0, f"{at}.attn.proj.weight"],
        [0, f"{at}.attn.proj.bias"],
        [0, f"{at}.norm2.weight"],
        [0, f"{at}.norm2.bias"],
        [1, f"{at}.mlp.fc1.weight", dict(LINEAR_IN_CFG)],
        [0, f"{at}.mlp.fc2.weight"],
        [0, f"{at}.mlp.fc2.bias"],
    ]

    def seen(part: str) -> Config:
        return act_module_cfg(f"{at}.attn.{part}_norm", hook="post", reshape_func=("norm_qk", {}))

    weights = split_dim_cfg(0, f"{qkv}.weight", parts)
    qk: list[Entry] = [
        [0, f"{qkv}.weight_q", {**group_cfg(heads), **weights, **seen("q")}],
        [0, f"{qkv}.bias_q", split_dim_cfg(0, f"{qkv}.bias", parts)],
        [0, f"{qkv}.weight_k", seen("k")],
        [0, f"{qkv}.bias_k"],
    ]
    v: list[Entry] = [
        [0, f"{qkv}.weight_v", group_cfg(heads)],
        [0, f"{qkv}.bias_v"],
        [1, f"{at}.attn.proj.weight", dict(LINEAR_IN_CFG)],
    ]
    hidden: list[Entry] = [
        [0, f"{at}.mlp.fc1.weight"],
        [0, f"{at}.mlp.fc1.bias"],
        [1, f"{at}.mlp.fc2.weight", dict(LINEAR_IN_CFG)],
    ]
    return residual, [qk, v, hidden]


# ---- translation ----


@dataclass(frozen=True)
class Seen:
    """Where a permutation's activations are seen: a module, the dim of the units, its input or output, a reshape."""

    module: str
    dim: int
    hook: str
    reshape: tuple[str, Config] | None


@dataclass(frozen=True)
class Translated:
    """A permutation dictionary as a spec. names: {id: space}. seen: {space: where its activations are}.

    parts: {NAME_SUFFIX: (tensor, axis, number of the part, parts)} of the tensors that are cut.
    """

    spec: PermutationSpec
    names: dict[Any, str]
    seen: dict[str, list[Seen]] = field(default_factory=dict)
    parts: dict[str, tuple[str, int, int, int]] = field(default_factory=dict)


def translate(perms: Mapping[Any, Any], shapes: Mapping[str, Any], tie: bool = True) -> Translated:
    """The spec of a permutation dictionary for tensors of these shapes.

    tie: permutations of blocks that share a cut tensor (q with k, and v) move their blocks together. False: they move
    apart, as in the published code; the merged attention then mixes heads.
    Raises ValueError, naming the permutation and the tensor, for entries that are none.
    """
    if not isinstance(perms, Mapping):
        raise TypeError(f"perm: expected {{id: [[axis, tensor, cfg]]}}, got {type(perms).__name__}")
    entries = {key: [_entry(key, given) for given in _weights(key, value)] for key, value in perms.items()}
    parts = dict(_parts(entries))
    names = {key: str(key) for key in entries}
    spaces, seen = [], {}
    for key, own in entries.items():
        groups = [cfg["group"]["num"] for _, _, cfg in own if "group" in cfg]
        if len(set(groups)) > 1:
            raise ValueError(f"perm {key!r}: its tensors have different numbers of groups, {sorted(set(groups))}")
        axes = list(_axes(key, own, parts, shapes))
        cut = [parts[name][0].rpartition(".")[0] for axis, name, _ in own if name in parts and axis == parts[name][1]]
        tied = f"heads of {cut[0]}" if tie and groups and cut else None
        width = _width(key, own[0], parts, shapes)
        spaces.append(Space(names[key], width, tuple(axes), blocks=groups[0] if groups else 1, tie=tied))
        seen[names[key]] = _seen(own)
    return Translated(PermutationSpec(tuple(spaces)), names, seen, parts)


def _weights(key: Any, value: Any) -> list[Any]:
    given = value.get("weights") if isinstance(value, Mapping) else value
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError(f"perm {key!r}: expected a list of [axis, tensor, cfg], got {given!r}")
    return list(given)


_KNOWN = ("group", "split_dim", "act_module", "in", "ignore")


def _entry(key: Any, given: Any) -> tuple[int, str, Config]:
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) not in (2, 3):
        raise ValueError(f"perm {key!r}: expected [axis, tensor] or [axis, tensor, cfg], got {given!r}")
    axis, name, cfg = [*given, {}] if len(given) == 2 else given
    unknown = sorted(set(cfg) - set(_KNOWN))
    if unknown:
        raise ValueError(f"perm {key!r}: {name}: expected cfg keys {', '.join(_KNOWN)}, got {unknown[0]!r}")
    return axis, name, dict(cfg)


def _parts(entries: Mapping[Any, list[tuple[int, str, Config]]]) -> Iterator[tuple[str, tuple[str, int, int, int]]]:
    for own in entries.values():
        for _, _, cfg in own:
            if "split_dim" in cfg:
                axis, name, suffixes = cfg["split_dim"]
                for k, suffix in enumerate(suffixes):
                    yield f"{name}_{suffix}", (name, axis, k, len(suffixes))


def _shape(key: Any, name: str, shapes: Mapping[str, Any]) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"perm {key!r}: the models have no tensor {name!r}")
    return shape_of(shapes[name])


def _width(key: Any, entry: tuple[int, str, Config], parts: Mapping[str, Any], shapes: Mapping[str, Any]) -> int:
    axis, name, _ = entry
    whole, split, _, count = parts.get(name, (name, None, 0, 1))
    shape = _shape(key, whole, shapes)
    if not isinstance(axis, int) or not 0 <= axis < len(shape):
        raise ValueError(f"perm {key!r}: {name} has no axis {axis!r}, its shape is {shape}")
    return shape[axis] // (count if axis == split else 1)


def _axes(
    key: Any, own: Sequence[tuple[int, str, Config]], parts: Mapping[str, Any], shapes: Mapping[str, Any]
) -> Iterator[Axis]:
    others: dict[tuple[str, int], set[int]] = {}
    for entry in own:
        axis, name, cfg = entry
        role, compare = ("in" if "in" in cfg else "out"), "ignore" not in cfg
        width = _width(key, entry, parts, shapes)
        if name not in parts:
            yield Axis(name, axis, role, compare=compare)
            continue
        whole, split, k, count = parts[name]
        if axis == split:
            yield Axis(whole, axis, role, view=(count, width), at=1, pick=(0, k), compare=compare)
            continue
        # Another axis of a cut tensor is one axis of the whole, and all parts have to name it.
        met = others.setdefault((whole, axis), set())
        met.add(k)
        if len(met) == count:
            yield Axis(whole, axis, role, compare=compare)
            met.clear()
    left = [name for name, met in others.items() if met]
    if left:
        raise ValueError(f"perm {key!r}: axis {left[0][1]} of {left[0][0]} is named for some of its parts only")


def _seen(own: Sequence[tuple[int, str, Config]]) -> list[Seen]:
    """Modules named by act_module, or else the last that reads the units."""
    named = [_place(name, cfg["act_module"]) for _, name, cfg in own if "act_module" in cfg]
    if named:
        return named
    for _, name, cfg in reversed(own):
        if "in" in cfg:
            told = cfg["in"]
            return [_place(name, {"name": told} if isinstance(told, str) else told or {})]
    return []


def _place(name: str, told: Config) -> Seen:
    reshape = told.get("reshape_func")
    return Seen(
        told.get("name", name.rpartition(".")[0]),
        told.get("dim", 1),
        told.get("hook", "pre"),
        None if reshape is None else (reshape[0], dict(reshape[1])),
    )
