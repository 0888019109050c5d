"""The spec of a checkpoint: from a file, from its network's configuration, or from the names of its tensors."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mudsc_fast.cli import huggingface

if TYPE_CHECKING:
    from mudsc_fast.checkpoints import Checkpoint, StackedCheckpoint
    from mudsc_fast.spec import PermutationSpec

    AnyCheckpoint = Checkpoint | StackedCheckpoint


def find_spec(
    checkpoint: AnyCheckpoint, spec_from: str = "auto", heads: int | None = None, groups: int | None = None
) -> PermutationSpec:
    """The spec whose axes are tensors of the checkpoint and whose taps are modules of its network; no weights are read.

    spec_from: "auto" or a JSON file. heads, groups: what the tensors do not tell (see ``spec_for``).
    ValueError, which says what was looked for, if it cannot be found or does not fit the checkpoint.
    """
    from mudsc_fast.specs import spec_for

    if spec_from != "auto":
        return _from_file(spec_from, checkpoint)
    configured = huggingface.has_config(checkpoint)
    if heads is None and groups is None and configured:
        found = _from_network(checkpoint)
        if found is not None:
            return found
        told = huggingface.read_config(checkpoint).get("num_attention_heads")
        heads = told if isinstance(told, int) else None
    try:
        return spec_for(checkpoint.meta(), heads=heads, groups=groups)
    except ValueError as error:
        if configured and importlib.util.find_spec("transformers") is None:
            raise ValueError(
                f"{checkpoint.path}: no family that is known by its tensors' names, and the network of config.json "
                "cannot be traced without transformers: pip install 'mudsc-fast[hf]', or give --spec FILE.json"
            ) from error
        raise


def _from_file(path: str, checkpoint: AnyCheckpoint) -> PermutationSpec:
    from mudsc_fast.spec import PermutationSpec

    try:
        found = PermutationSpec.from_json(Path(path).read_text(encoding="utf-8"))
        found.check({name: info.shape for name, info in checkpoint.layout.items()})
    except ValueError as error:
        raise ValueError(f"--spec {path}: {error}") from error
    return found


def _from_network(checkpoint: AnyCheckpoint) -> PermutationSpec | None:
    """The spec of the network that transformers builds, by the names on disk; None where it does not tell."""
    try:
        model = huggingface.empty_model(checkpoint)
    except (ValueError, OSError, ImportError):
        return None
    names = huggingface.names_on_disk(model, checkpoint)
    if names is None:
        return None
    found = spec_of_network(model, checkpoint.path)
    return _renamed(found, names)


_BY_HAND = (
    "Write the spec by hand and give it with --spec FILE.json: "
    '{"spaces": [{"name": "mlp", "width": 48, "axes": [{"tensor": "fc1.weight", "dim": 0, "role": "out"}, '
    '{"tensor": "fc2.weight", "dim": 1, "role": "in"}]}]}, a space for each set of axes that move together '
    "(docs/tracing.md; 'mudsc-fast spec' checks it)"
)


def spec_of_network(model: Any, path: Path) -> PermutationSpec:
    """The spec of a network, known or traced, by its own names; ValueError, with what to do, if there is none."""
    from mudsc_fast.specs import spec_for

    name = type(model).__name__
    try:
        found = spec_for(model)
    except Exception as error:
        # torch.export runs the model's own code, which may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: no spec was found for {name}: {reason}. {_BY_HAND}") from error
    if not found.spaces:
        raise ValueError(f"{path}: tracing {name} found no units that may move. {_BY_HAND}")
    return found


def _renamed(spec: PermutationSpec, names: dict[str, str]) -> PermutationSpec:
    def on_disk(items: Any) -> Any:
        # Names of one tied tensor that is stored once become one name: its axes are said once.
        made: dict[Any, Any] = {}
        for item in items:
            moved = replace(item, tensor=names[item.tensor])
            made.setdefault((moved.tensor, replace(moved, role="in") if hasattr(moved, "role") else moved), moved)
        return tuple(made.values())

    spaces = tuple(replace(space, axes=on_disk(space.axes)) for space in spec.spaces)
    return replace(spec, spaces=spaces, frozen=on_disk(spec.frozen))
