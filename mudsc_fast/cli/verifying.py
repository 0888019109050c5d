"""The law tried before anything is written: the network computes the same with all its spaces permuted at random."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mudsc_fast.cli import huggingface, options

if TYPE_CHECKING:
    from torch import nn

    from mudsc_fast.checkpoints import Checkpoint, StackedCheckpoint
    from mudsc_fast.spec import PermutationSpec

# Relative changes of the outputs, in float32: deep networks come to 1e-5, a wrong spec to 0.1 and more.
TOLERANCE = 1e-3

# Bytes of the largest network that is built with its own weights for this, twice; larger ones are shrunken.
_LARGEST = 10**9


@dataclass(frozen=True)
class ConfigFolder:
    """A Hugging Face folder of which only config.json is looked at."""

    path: Path

    @property
    def folder(self) -> Path:
        """The folder, as a checkpoint has it."""
        return self.path


def config_alone(path: Path) -> ConfigFolder | None:
    """The folder, if it has a config.json but no weights."""
    weights = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth")
    if not (path / "config.json").is_file() or any(p.name.endswith(weights) for p in path.iterdir()):
        return None
    return ConfigFolder(path)


def law_of_small(folder: Any, spec: PermutationSpec) -> tuple[float, int]:
    """The law for random weights of the network's shrunken config: (largest relative change, spaces tried).

    ValueError, naming them, if the small network has other kinds of spaces than the spec: then it proves nothing.
    """
    from mudsc_fast.specs import example_inputs, spec_for

    model = huggingface.small_model(folder)
    found = spec_for(model)
    theirs, ours = ({re.sub(r"\d+", "N", space.name) for space in s} for s in (found, spec))
    if theirs != ours:
        raise ValueError(f"the shrunken network has other spaces: {', '.join(sorted(theirs ^ ours))}")
    return found.verify(model, example_inputs(model)), len(found)


def check_law(
    spec: PermutationSpec, checkpoint: Checkpoint | StackedCheckpoint, wanted: bool, small: bool = False
) -> None:
    """Refuse a spec that does not keep the function of the network that config.json describes.

    Networks of up to 1 GB are tried with the checkpoint's weights, larger ones, and all where memory is limited
    (`small`), with random weights of a shrunken config; where none can be built, a line says why nothing was tried.
    ValueError, naming the spaces, for a spec that breaks the law.
    """
    say = options.settings().say
    if not wanted or not huggingface.has_config(checkpoint):
        return
    try:
        if small or sum(info.nbytes for info in checkpoint.layout.values()) > _LARGEST:
            change, how = law_of_small(checkpoint, spec)[0], "random weights of a shrunken config"
            worst = ""
        else:
            change, worst = _law_of_own(spec, checkpoint)
            how = "the first checkpoint's weights"
    except Exception as error:  # noqa: BLE001 (building and running a network runs its own code, which may raise anything)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        say(f"note: the spec was not tried on the network ({reason})")
        return
    if change > TOLERANCE:
        raise ValueError(
            f"the spec does not keep the function: with its spaces permuted at random, outputs change by {change:.2g} "
            f"of their size (tried with {how}{worst}). Nothing was written; --no-verify goes on all the same"
        )
    say(f"spec verified with {how}: outputs change by {change:.1e} with all spaces permuted at random")


def _law_of_own(spec: PermutationSpec, checkpoint: Any) -> tuple[float, str]:
    """The largest relative change with all spaces permuted, and which spaces cause it if it is large."""
    from mudsc_fast.specs import example_inputs

    model: nn.Module = huggingface.load_model(checkpoint).float()
    spec = in_network(spec, model, checkpoint)
    inputs = example_inputs(model)
    change = spec.verify(model, inputs, each=False)
    if change <= TOLERANCE:
        return change, ""
    each = spec.verify_each(model, inputs)
    broken = [name for name, found in each.items() if found > TOLERANCE and name != "all"]
    return change, f"; by {', '.join(broken[:5])}" + (" and others" if len(broken) > 5 else "")


def in_network(spec: PermutationSpec, model: nn.Module, checkpoint: Any) -> PermutationSpec:
    """The spec by the network's names, all those of a tied tensor."""
    names = huggingface.names_on_disk(model, checkpoint) or {name: name for name in model.state_dict()}
    back: dict[str, list[str]] = {}
    for name, disk in names.items():
        back.setdefault(disk, []).append(name)
    spaces = tuple(
        replace(
            space,
            axes=tuple(
                replace(axis, tensor=name) for axis in space.axes for name in back.get(axis.tensor, [axis.tensor])
            ),
        )
        for space in spec.spaces
    )
    return replace(spec, spaces=spaces, frozen=())
