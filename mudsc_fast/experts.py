"""The experts of one layer, however a checkpoint stores them: fused or separate, with or without a gate."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mudsc_fast.layout import split_dim

# (gate,) up, down by the names that checkpoints give them.
_SEPARATE = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("wi_0", "wi_1", "wo"),
    ("wi", "wo"),
    ("fc1", "fc2"),
)
_ROUTERS = ("gate", "router", "router.classifier", "router.layer", "gate.wg")
_PER_EXPERT = ("gate.e_score_correction_bias", "expert_bias")


@dataclass(frozen=True)
class Field:
    """One tensor that every expert has, and where a state dict keeps it.

    name: its name; "{}" in it stands for the expert's number, else one tensor holds all experts along its first dim.
    dim: the dim of an expert's own tensor that its hidden units index; None: they do not.
    half: (which, interleaved): this field is one half of the tensor along `dim` (a fused gate and up); None: the whole.
    router: it belongs to the router: one row for each expert.
    """

    name: str
    dim: int | None
    half: tuple[int, bool] | None = None
    router: bool = False

    @property
    def stacked(self) -> bool:
        """Whether one tensor holds all experts."""
        return "{}" not in self.name


@dataclass(frozen=True, eq=False)
class Experts:
    """The experts of one layer, with the router's rows: views of the tensors they were read from, nothing is copied.

    fields: what every expert has. tensors: `tensors[i][f]`, field f of expert i. Hidden units of an expert (the rows of
    gate and up, the columns of down) are indexed by `fields[f].dim`; the router's row of an expert is a field as well.
    Raises ValueError, naming the field, for experts that differ in shape or have no hidden units.
    """

    fields: tuple[Field, ...]
    tensors: tuple[tuple[Tensor, ...], ...]

    def __post_init__(self) -> None:
        if not self.tensors or all(f.dim is None for f in self.fields):
            raise ValueError("experts: expected at least one expert with hidden units, got none")
        for f, field in enumerate(self.fields):
            shapes = {tuple(own[f].shape) for own in self.tensors}
            if len(shapes) > 1:
                raise ValueError(f"experts: {field.name} has different shapes in different experts, {sorted(shapes)}")
            if field.dim is not None and next(iter(shapes))[field.dim] != self.hidden:
                raise ValueError(
                    f"experts: {field.name} has {next(iter(shapes))[field.dim]} hidden units, expected {self.hidden}"
                )

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"Experts({len(self)} experts, {self.hidden} hidden units, {', '.join(f.name for f in self.fields)})"

    @property
    def hidden(self) -> int:
        """Hidden units of one expert."""
        f = next(f for f, field in enumerate(self.fields) if field.dim is not None)
        return int(self.tensors[0][f].shape[self.fields[f].dim or 0])

    @property
    def routed(self) -> bool:
        """Whether the router's rows are here."""
        return any(field.router for field in self.fields)

    @classmethod
    def of(
        cls,
        up: Tensor | Sequence[Tensor],
        down: Tensor | Sequence[Tensor],
        gate: Tensor | Sequence[Tensor] | None = None,
        router: Tensor | None = None,
    ) -> Experts:
        """Experts from tensors, each one stacked tensor or a sequence with one an expert.

        up, gate: (experts, hidden, features), what makes the hidden units. down: (experts, features, hidden), what
        reads them. router: (experts, features). Fields are named "gate", "up", "down", "router".
        """
        given = {"gate": gate, "up": up, "down": down, "router": router}
        dims = {"gate": 0, "up": 0, "down": 1, "router": None}
        found = {name: list(x) for name, x in given.items() if x is not None}
        counts = {name: len(x) for name, x in found.items()}
        if len(set(counts.values())) != 1:
            raise ValueError(f"experts: expected one number of experts in all tensors, got {counts}")
        for name, each in found.items():
            if not all(isinstance(x, Tensor) and x.dim() == (1 if name == "router" else 2) for x in each):
                raise ValueError(f"{name}: expected a matrix an expert (of the router a row), got something else")
        fields = tuple(Field(name, dims[name], router=name == "router") for name in found)
        return cls(fields, tuple(zip(*found.values(), strict=True)))

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], prefix: str, interleaved: bool = False) -> Experts:
        """The experts below `prefix` ("model.layers.0.mlp."), as transformers and the checkpoints on disk name them.

        Fused: `experts.gate_up_proj` and `experts.down_proj`, either way round, with biases. Separate: `experts.N.` and
        `gate_proj, up_proj, down_proj`, `w1, w3, w2`, `wi_0, wi_1, wo`, `wi, wo` or `fc1, fc2`. The router is `gate`,
        `router` or `router.classifier`.

        interleaved: a fused gate_up alternates gate and up (GPT-OSS), which no shape tells.
        Raises ValueError if there are no such tensors or a part of them is missing.
        """
        if prefix and not prefix.endswith("."):
            prefix += "."
        own = [name[len(prefix) :] for name in state_dict if name.startswith(prefix)]
        fields, count = _fused(state_dict, prefix, own, interleaved) or _separate(prefix, own)
        for name in own:
            base = name.removesuffix(".weight").removesuffix(".bias")
            if (base in _ROUTERS or name in _PER_EXPERT) and tuple(state_dict[prefix + name].shape)[:1] == (count,):
                fields.append(Field(prefix + name, None, router=True))
        return cls(tuple(fields), tuple(tuple(_read(state_dict, f, i) for f in fields) for i in range(count)))

    def to_state_dict(self) -> dict[str, Tensor]:
        """The tensors as they were read, fused or separate, for the experts there are; copies where fused."""
        result: dict[str, Tensor] = {}
        for name in dict.fromkeys(field.name for field in self.fields):
            parts = [f for f, field in enumerate(self.fields) if field.name == name]
            each = [_joined([own[f] for f in parts], self.fields[parts[0]]) for own in self.tensors]
            if self.fields[parts[0]].stacked:
                result[name] = torch.stack(each)
            else:
                result.update({name.format(i): tensor for i, tensor in enumerate(each)})
        return result

    def take(self, order: Sequence[int], units: Tensor | None = None) -> Experts:
        """Experts in another order, with their router rows: new expert i is old expert order[i].

        units: (len(order), hidden) int64: new unit u of new expert i is old unit units[i, u]; None: as they are.
        """
        if units is None:
            return replace(self, tensors=tuple(self.tensors[i] for i in order))
        moved = []
        for i, index in zip(order, units, strict=True):
            row = [
                x if field.dim is None else x.index_select(field.dim, index.to(x.device))
                for field, x in zip(self.fields, self.tensors[i], strict=True)
            ]
            moved.append(tuple(row))
        return replace(self, tensors=tuple(moved))


def _fused(
    state_dict: Mapping[str, Tensor], prefix: str, own: Sequence[str], interleaved: bool
) -> tuple[list[Field], int] | None:
    if "experts.gate_up_proj" not in own and "experts.up_proj" not in own:
        return None
    if "experts.down_proj" not in own:
        raise ValueError(f"{prefix}experts.down_proj: missing beside the fused experts")
    first = "gate_up_proj" if "experts.gate_up_proj" in own else "up_proj"
    halves = 2 if first == "gate_up_proj" else 1
    up, down = (tuple(state_dict[f"{prefix}experts.{name}"].shape) for name in (first, "down_proj"))
    rows = (up[1], up[2]) == (halves * down[2], down[1])
    if not rows and (up[1], up[2]) != (down[2], halves * down[1]):
        raise ValueError(f"{prefix}experts: {first} of shape {up} does not fit down_proj of shape {down}")
    of_up, of_down = (0, 1) if rows else (1, 0)
    fields = []
    for suffix, dim in (("", of_up), ("_bias", 0)):
        if f"experts.{first}{suffix}" in own:
            name = f"{prefix}experts.{first}{suffix}"
            fields += [Field(name, dim, (h, interleaved) if halves == 2 else None) for h in range(halves)]
    fields.append(Field(f"{prefix}experts.down_proj", of_down))
    if "experts.down_proj_bias" in own:
        fields.append(Field(f"{prefix}experts.down_proj_bias", None))
    return fields, up[0]


def _separate(prefix: str, own: Sequence[str]) -> tuple[list[Field], int]:
    numbered = [m for name in own if (m := re.fullmatch(r"(experts\.(?:expert_)?)(\d+)\.(\w+)\.(weight|bias)", name))]
    for names in _SEPARATE:
        if all(any(m[3] == name for m in numbered) for name in names):
            break
    else:
        raise ValueError(
            f"{prefix or 'the state dict'}: no experts; looked for experts.gate_up_proj and experts.down_proj, and for "
            f"experts.N with {' or '.join('/'.join(names) for names in _SEPARATE)}"
        )
    count = 1 + max(int(m[2]) for m in numbered)
    fields = []
    for name in names:
        for kind in ("weight", "bias"):
            have = {int(m[2]) for m in numbered if (m[3], m[4]) == (name, kind)}
            if not have:
                continue
            if have != set(range(count)):
                missing = min(set(range(count)) - have)
                raise ValueError(f"{prefix}{numbered[0][1]}{missing}.{name}.{kind}: missing, but other experts have it")
            last = name == names[-1]
            dim = (None if kind == "bias" else 1) if last else 0
            fields.append(Field(f"{prefix}{numbered[0][1]}{{}}.{name}.{kind}", dim))
    return fields, count


def _read(state_dict: Mapping[str, Tensor], field: Field, expert: int) -> Tensor:
    x = state_dict[field.name][expert] if field.stacked else state_dict[field.name.format(expert)]
    if field.half is None or field.dim is None:
        return x
    which, interleaved = field.half
    size = x.shape[field.dim] // 2
    if interleaved:
        return split_dim(x, field.dim, (size, 2)).select(field.dim + 1, which)
    return x.narrow(field.dim, which * size, size)


def _joined(parts: Sequence[Tensor], field: Field) -> Tensor:
    if field.half is None or field.dim is None:
        return parts[0]
    if field.half[1]:
        return torch.stack(list(parts), field.dim + 1).flatten(field.dim, field.dim + 1)
    return torch.cat(list(parts), field.dim)
