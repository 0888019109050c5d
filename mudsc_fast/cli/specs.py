"""The spec of a checkpoint: from a file, from its network's configuration, or from the names of its tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mudsc_fast.cli import huggingface

if TYPE_CHECKING:
    from mudsc_fast.checkpoints import Checkpoint
    from mudsc_fast.spec import PermutationSpec


def find_spec(
    checkpoint: Checkpoint, spec_from: str = "auto", heads: int | None = None, groups: int | None = None
) -> PermutationSpec:
    """The spec whose axes are tensors of the checkpoint and whose taps are modules of its network; no weights are read.

    spec_from: "auto" or a JSON file. heads, groups: what the tensors do not tell (see ``spec_for``).
    ValueError, which says what was looked for, if it cannot be found or does not fit the checkpoint.
    """
    from mudsc_fast.specs import spec_for

    if spec_from != "auto":
        return _from_file(spec_from, checkpoint)
    if heads is None and groups is None and huggingface.has_config(checkpoint):
        found = _from_network(checkpoint)
        if found is not None:
            return found
        told = huggingface.read_config(checkpoint).get("num_attention_heads")
        heads = told if isinstance(told, int) else None
    return spec_for(checkpoint.meta(), heads=heads, groups=groups)


def _from_file(path: str, checkpoint: Checkpoint) -> PermutationSpec:
    from mudsc_fast.spec import PermutationSpec

    try:
        found = PermutationSpec.from_json(Path(path).read_text(encoding="utf-8"))
        found.check({name: info.shape for name, info in checkpoint.layout.items()})
    except ValueError as error:
        raise ValueError(f"--spec {path}: {error}") from error
    return found


def _from_network(checkpoint: Checkpoint) -> PermutationSpec | None:
    """The spec of the network that transformers builds, by the names on disk; None where it does not tell."""
    from mudsc_fast.specs import spec_for

    try:
        model = huggingface.empty_model(checkpoint)
        found = spec_for(model)
    except (ValueError, OSError, ImportError):
        return None
    names = huggingface.names_on_disk(model, checkpoint)
    return None if names is None else _renamed(found, names)


def _renamed(spec: PermutationSpec, names: dict[str, str]) -> PermutationSpec:
    def on_disk(axis: Any) -> Any:
        return replace(axis, tensor=names[axis.tensor])

    spaces = tuple(replace(space, axes=tuple(on_disk(axis) for axis in space.axes)) for space in spec.spaces)
    return replace(spec, spaces=spaces, frozen=tuple(on_disk(item) for item in spec.frozen))
