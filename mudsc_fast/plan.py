"""A finished match: the labels of every space. It can be saved, loaded and applied to checkpoints."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mudsc_fast import _core
from mudsc_fast.averaging import Piece, align_pieces, check_weights, merge_all, merge_pieces
from mudsc_fast.records import PathLike, read_record, write_record
from mudsc_fast.spec import PermutationSpec

if TYPE_CHECKING:
    from mudsc_fast.spaces import Space

METHODS = ("align", "zip", "select")
_KIND = "merge plan"


class MergePlan:
    """The labels of every space of a spec: `labels[space][m, i] = j` says unit i of model m belongs to merged unit j.

    spec: a PermutationSpec.
    labels: {space: (models, width)} int64, every merged unit 0..max with at least one member; blocks stay together.
    method: "align" (every row a permutation, model 0's the identity), "zip" or "select".
    values: {space: match value}, where known. history: the mean value L of every sweep run; sweeps: {space: its value
        after each}, where known.
    leaders: {space: (merged width,) int64}, the unit m * width + i that a merged unit is produced by, where that is not
        the mean of its members; "select" makes such plans.

    A plan keeps copies of the labels and leaders that it is given.

    Raises ValueError or TypeError, naming the space, for labels that are none of that.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        labels: Mapping[str, Tensor],
        method: str,
        values: Mapping[str, float] | None = None,
        history: Sequence[float] = (),
        sweeps: Mapping[str, Sequence[float]] | None = None,
        leaders: Mapping[str, Tensor] | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        if not isinstance(spec, PermutationSpec):
            raise TypeError(f"spec: expected a PermutationSpec, got {type(spec).__name__}")
        if not isinstance(labels, Mapping):
            raise TypeError(f"labels: expected a mapping from spaces to labels, got {type(labels).__name__}")
        unknown = set(labels) - {space.name for space in spec.spaces}
        if unknown:
            raise ValueError(f"labels: the spec has no space {sorted(unknown)[0]!r}")
        self.spec = spec
        self.method = method
        sizes = _sound(spec, labels, method)
        self.labels = {
            space.name: labels[space.name].clone() if size else _checked(space, labels, method)
            for space, size in zip(spec.spaces, sizes, strict=True)
        }
        self.values = {name: float(value) for name, value in (values or {}).items()}
        self.history = [float(value) for value in history]
        self.sweeps = {name: [float(value) for value in run] for name, run in (sweeps or {}).items()}
        counts = {name: rows.shape[0] for name, rows in self.labels.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"labels: expected one number of models in all spaces, got {counts}")
        self._models = next(iter(counts.values()), 0)
        self.leaders = {name: _checked_leaders(spec[name], self.labels[name], x) for name, x in (leaders or {}).items()}
        for tie, names in spec.ties.items():
            moved = {name: _blocks(self.labels[name], spec[name].blocks)[:, :, 0] for name in names}
            for name in names[1:]:
                if not torch.equal(moved[name], moved[names[0]]):
                    raise ValueError(
                        f"labels: tie {tie!r}: spaces {names[0]!r} and {name!r} move their blocks differently"
                    )

    @property
    def models(self) -> int:
        """Number of models that the plan merges."""
        return self._models

    @property
    def widths(self) -> dict[str, int]:
        """{space: number of merged units}."""
        sizes = _sound(self.spec, self.labels, self.method)
        return {
            name: size or int(labels.max()) + 1 for (name, labels), size in zip(self.labels.items(), sizes, strict=True)
        }

    def __repr__(self) -> str:
        return f"MergePlan({self.method!r}, {len(self.labels)} spaces, {self.models} models)"

    def merge(
        self, state_dicts: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None
    ) -> dict[str, Tensor]:
        """The merged state dict (docs/method.md rule 9); see `merge_tensors` for the same one tensor at a time.

        state_dicts: one mapping a model, in the plan's order, with the same names; lazy ones are read tensor by tensor.
        weights: one share >= 0 a model; None: all alike. A merged unit is the weighted mean of its members on out axes,
            and their plain sum on in axes, averaged over the models by weight.

        Results have model 0's dtypes and live where model 0's tensors do; sums are taken in float32 (float64 for
        float64). Integer and bool tensors are model 0's. Raises ValueError for missing tensors, shapes that disagree
        and NaN or inf in a tensor of the spec; TypeError for a tensor of the spec that is not floating.
        """
        state_dicts, shares = self._checked_models(state_dicts, weights)
        return merge_all(self.spec, self.labels, self.widths, state_dicts, shares, self.leaders)

    def merge_tensors(
        self,
        state_dicts: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float] | None = None,
        only: Container[str] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, merged tensor) in model 0's order, of all names or those in `only`; one name's are held at a time."""
        return ((piece.name, piece.tensor) for piece in self.merge_pieces(state_dicts, weights, None, only))

    def merge_pieces(
        self,
        state_dicts: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float] | None = None,
        limit: int | None = None,
        only: Container[str] | None = None,
    ) -> Iterator[Piece]:
        """The same as `Piece`s (name, first row, tensor, whether whole), large tensors some rows at a time.

        limit: bytes of one model's rows that are merged at once; None: tensors whole.
        """
        state_dicts, shares = self._checked_models(state_dicts, weights)
        return merge_pieces(self.spec, self.labels, self.widths, state_dicts, shares, limit, only, self.leaders)

    def _checked_models(
        self, state_dicts: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None
    ) -> tuple[list[Mapping[str, Tensor]], list[float]]:
        state_dicts = list(state_dicts)
        if len(state_dicts) != self.models:
            raise ValueError(f"state_dicts: expected {self.models}, one a model of the plan, got {len(state_dicts)}")
        return state_dicts, check_weights(weights, self.models)

    def align(self, state_dict: Mapping[str, Tensor], model: int = 1) -> dict[str, Tensor]:
        """This model's own function, expressed in model 0's unit order; bit-exact moves, any dtype.

        model: which of the plan's models `state_dict` is. Raises ValueError for a zip plan.
        """
        return dict(self.align_tensors(state_dict, model))

    def align_tensors(
        self, state_dict: Mapping[str, Tensor], model: int = 1, only: Container[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, aligned tensor) in the state dict's order, one at a time, of all names or those in `only`."""
        return ((piece.name, piece.tensor) for piece in self.align_pieces(state_dict, model, None, only))

    def align_pieces(
        self,
        state_dict: Mapping[str, Tensor],
        model: int = 1,
        limit: int | None = None,
        only: Container[str] | None = None,
    ) -> Iterator[Piece]:
        """The same as `Piece`s, as in `merge_pieces`."""
        if self.method != "align":
            raise ValueError(
                f"align: needs a plan of method 'align', which keeps a model's function; got {self.method!r}"
            )
        if isinstance(model, bool) or not isinstance(model, int) or not 0 <= model < self.models:
            raise ValueError(f"model: expected 0..{self.models - 1}, got {model!r}")
        labels = {name: rows[model] for name, rows in self.labels.items()}
        return align_pieces(self.spec, labels, state_dict, limit, only)

    def save(self, path: PathLike, about: Mapping[str, Any] | None = None) -> None:
        """Write the plan and its spec to one safetensors file, atomically.

        about: what else to say in the file's header, for JSON; `load` does not look at it.
        """
        names = list(self.labels)
        tensors = {str(k): self.labels[name] for k, name in enumerate(names)}
        tensors |= {f"leaders.{k}": self.leaders[name] for k, name in enumerate(names) if name in self.leaders}
        meta = {
            **(about or {}),
            "method": self.method,
            "spaces": names,
            "values": self.values,
            "history": self.history,
            "sweeps": self.sweeps,
            "spec": self.spec.to_json(),
        }
        write_record(path, _KIND, tensors, meta)

    @classmethod
    def load(cls, path: PathLike) -> MergePlan:
        """The plan that `save` wrote; ValueError if the file is damaged or holds something else."""
        tensors, header = read_record(path, _KIND)
        try:
            spec = PermutationSpec.from_json(header["spec"])
            labels = {name: tensors[str(k)] for k, name in enumerate(header["spaces"])}
            leaders = {
                name: tensors[f"leaders.{k}"] for k, name in enumerate(header["spaces"]) if f"leaders.{k}" in tensors
            }
            method, values, history = header["method"], header["values"], header["history"]
            return cls(spec, labels, method, values, history, header.get("sweeps"), leaders)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: damaged plan: {error}") from error


def _sound(spec: PermutationSpec, labels: Mapping[str, Tensor], method: str) -> list[int]:
    """Merged units of each space's labels, 0 where they have to be looked at more closely."""
    rows = [labels.get(space.name) for space in spec.spaces]
    return _core.sound_labels(rows, [(space.width, space.blocks) for space in spec.spaces], method == "align")


def _own(tensor: Tensor) -> Tensor:
    """A plain copy, for compiled code aligned too: the tensor's own entries may begin at any byte, as in a file."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _blocks(labels: Tensor, blocks: int) -> Tensor:
    """(models, blocks, units a block): the merged block of every unit."""
    size = (int(labels.max()) + 1) // blocks
    return (labels // size).reshape(labels.shape[0], blocks, -1)


def _checked_leaders(space: Space, labels: Tensor, leaders: Tensor) -> Tensor:
    what = f"leaders of space {space.name!r}"
    width = int(labels.max()) + 1
    if not isinstance(leaders, Tensor) or leaders.dtype != torch.int64 or leaders.shape != (width,):
        raise ValueError(f"{what}: expected int64 of shape ({width},), one a merged unit")
    leaders = _own(leaders)
    if int(leaders.min()) < 0 or int(leaders.max()) >= labels.numel():
        raise ValueError(f"{what}: expected units 0..{labels.numel() - 1}")
    if not torch.equal(labels.reshape(-1)[leaders], torch.arange(width)):
        raise ValueError(f"{what}: expected each to be a member of its merged unit")
    return leaders


def _checked(space: Space, labels: Mapping[str, Tensor], method: str) -> Tensor:
    what = f"labels of space {space.name!r}"
    if space.name not in labels:
        raise ValueError(f"{what}: missing")
    rows = labels[space.name]
    if not isinstance(rows, Tensor):
        raise TypeError(f"{what}: expected a tensor, got {type(rows).__name__}")
    if rows.dtype != torch.int64 or rows.ndim != 2 or rows.shape[0] < 2 or rows.shape[1] != space.width:
        raise ValueError(
            f"{what}: expected int64 of shape (models >= 2, {space.width}), got {rows.dtype} {tuple(rows.shape)}"
        )
    rows = _own(rows)
    if rows.numel() == 0 or int(rows.min()) < 0:
        raise ValueError(f"{what}: expected merged units counted from 0")
    size = int(rows.max()) + 1
    if size > rows.numel() or not bool((torch.bincount(rows.reshape(-1), minlength=size) > 0).all()):
        raise ValueError(f"{what}: a merged unit in 0..{size - 1} has no member")
    order = torch.arange(space.width)
    if method == "align":
        if not torch.equal(rows[0], order):
            raise ValueError(f"{what}: model 0 keeps its order in an align plan")
        if not bool((rows.sort(dim=1).values == order).all()):
            raise ValueError(f"{what}: expected a permutation for every model of an align plan")
    if size % space.blocks:
        raise ValueError(f"{what}: {size} merged units do not divide into {space.blocks} blocks")
    blocks = _blocks(rows, space.blocks)
    if not bool((blocks == blocks[:, :, :1]).all()):
        raise ValueError(f"{what}: units of one block go to different merged blocks")
    return rows
