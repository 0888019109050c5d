"""Hugging Face folders: their networks, and the names that tensors have on disk, which are not always the network's."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mudsc_fast.cli import options

if TYPE_CHECKING:
    from torch import nn

    from mudsc_fast.checkpoints import Checkpoint, StackedCheckpoint


class AnyFolder(Protocol):
    """What may be a Hugging Face folder: a checkpoint, or only its path."""

    @property
    def path(self) -> Path: ...
    @property
    def folder(self) -> Path | None: ...


def has_config(checkpoint: AnyFolder) -> bool:
    """Whether the checkpoint is a folder whose config.json says how to build its network."""
    return checkpoint.folder is not None and (checkpoint.folder / "config.json").is_file()


def read_config(checkpoint: AnyFolder) -> dict[str, Any]:
    """The fields of config.json; ValueError, naming the file, if it holds something else."""
    path = (checkpoint.folder or Path()) / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected the JSON of a model's configuration ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: expected the JSON of a model's configuration, got {type(fields).__name__}")
    return fields


def load_model(checkpoint: AnyFolder) -> nn.Module:
    """The network with its weights. ValueError without transformers, or for an architecture that it does not have."""
    model: nn.Module = _builder(checkpoint).from_pretrained(str(checkpoint.folder), local_files_only=True)
    return model


def empty_model(checkpoint: AnyFolder) -> nn.Module:
    """The network on the meta device, without weights; errors as in ``load_model``."""
    import torch
    import transformers

    builder = _builder(checkpoint)
    config = transformers.AutoConfig.from_pretrained(str(checkpoint.folder), local_files_only=True)
    with torch.device("meta"):
        model: nn.Module = builder.from_config(config) if hasattr(builder, "from_config") else builder(config)
    return model


def small_model(checkpoint: Any) -> nn.Module:
    """The network of the shrunken config with random weights, in float32; errors as in ``load_model``."""
    import torch
    import transformers

    from mudsc_fast.specs import randomise, shrunken

    builder = _builder(checkpoint)
    config = transformers.AutoConfig.from_pretrained(str(checkpoint.folder), local_files_only=True)
    error: Exception | None = None
    for narrow in (True, False):  # not every config can be made narrower
        small = shrunken(config, narrow)
        small.dtype = torch.float32
        try:
            model: nn.Module = builder.from_config(small) if hasattr(builder, "from_config") else builder(small)
            return randomise(model.float())
        except Exception as raised:  # noqa: BLE001 (the network's own code, which may raise anything)
            error = raised
    raise ValueError(f"{checkpoint.path}: no small copy of the network could be built: {error}") from error


def tied_names(model: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """{name: the checkpoint's name of the same tensor}, for names of tied tensors that the checkpoint leaves out."""
    kept: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if name in checkpoint:
            kept.setdefault(id(tensor), name)
    return {n: kept[id(t)] for n, t in state.items() if n not in checkpoint and kept.get(id(t), n) != n}


def names_on_disk(model: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, str] | None:
    """{name in the network's state dict: name in the checkpoint}; None if they do not correspond one to one.

    transformers 5 renames tensors between disk and network; those it splits and stacks have no one name (see
    ``stacked``). A tied tensor that is stored once has one name on disk for all of its names.
    """
    from mudsc_fast.adapters.pretrained import blocks_on_disk, twins

    tied = tied_names(model, checkpoint)
    state = [name for name in model.state_dict() if name not in tied]
    if set(state) == set(checkpoint):
        return {**{name: name for name in state}, **tied}
    try:
        blocks = blocks_on_disk(model)
    except Exception:  # noqa: BLE001 (not a public function of transformers: whatever it raises, it does not tell)
        return None
    found = {name: parts[0].name for name, parts in blocks.items() if len(parts) == 1}
    once = {name: disk for name, disk in found.items() if disk in checkpoint}
    for name, disk in found.items():
        if disk not in checkpoint:
            twin = next((t for t in twins(model, name) if t in once), None)
            if twin is None:
                return None
            once[name] = once[twin]
    return once if set(once.values()) == set(checkpoint) and set(once) == set(model.state_dict()) else None


def stacked(checkpoints: Sequence[Checkpoint]) -> list[StackedCheckpoint] | None:
    """The checkpoints by their network's names, if transformers stacks what the files hold one by one; else None.

    ValueError if tensors on disk and in the network correspond in a way that is not known here.
    """
    from mudsc_fast.adapters.pretrained import stacked_as

    first = checkpoints[0]
    if not has_config(first):
        return None
    try:
        model = empty_model(first)
    except (ValueError, OSError, ImportError):
        return None
    if names_on_disk(model, first) is not None:
        return None
    return stacked_as(model, checkpoints)


def _builder(checkpoint: AnyFolder) -> Any:
    path = (checkpoint.folder or Path()) / "config.json"
    names = read_config(checkpoint).get("architectures")
    name = names[0] if isinstance(names, list) and names else "AutoModel"
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(
            f"{path.parent}: transformers builds the networks of Hugging Face folders: pip install 'mudsc-fast[hf]', "
            "or give --model"
        ) from error
    settings = options.settings()
    # Its bars are for a terminal: in a log, or between lines of JSON, they are noise.
    if settings.quiet or settings.log_format == "json" or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    # Only classes of transformers itself: a folder's own code is never run.
    builder = getattr(transformers, str(name), None)
    if not (inspect.isclass(builder) and hasattr(builder, "from_pretrained")):
        raise ValueError(f"{path}: transformers {transformers.__version__} has no model {name!r}")
    return builder
