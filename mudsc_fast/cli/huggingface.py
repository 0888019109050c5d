"""Hugging Face folders: their networks, and the names that tensors have on disk, which are not always the network's."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mudsc_fast.cli import options

if TYPE_CHECKING:
    from torch import nn

    from mudsc_fast.checkpoints import Checkpoint


def has_config(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is a folder whose config.json says how to build its network."""
    return checkpoint.folder is not None and (checkpoint.folder / "config.json").is_file()


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of config.json; ValueError, naming the file, if it holds something else."""
    path = (checkpoint.folder or Path()) / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected the JSON of a model's configuration ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: expected the JSON of a model's configuration, got {type(fields).__name__}")
    return fields


def load_model(checkpoint: Checkpoint) -> nn.Module:
    """The network with its weights. ValueError without transformers, or for an architecture that it does not have."""
    model: nn.Module = _builder(checkpoint).from_pretrained(str(checkpoint.folder), local_files_only=True)
    return model


def empty_model(checkpoint: Checkpoint) -> nn.Module:
    """The network on the meta device, without weights; errors as in ``load_model``."""
    import torch
    import transformers

    builder = _builder(checkpoint)
    config = transformers.AutoConfig.from_pretrained(str(checkpoint.folder), local_files_only=True)
    with torch.device("meta"):
        model: nn.Module = builder.from_config(config) if hasattr(builder, "from_config") else builder(config)
    return model


def names_on_disk(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str] | None:
    """{name in the network's state dict: name in the checkpoint}; None if they do not correspond one to one.

    transformers 5 renames tensors between disk and network; it also splits and stacks some, which have no one name.
    """
    import torch

    state = list(model.state_dict())
    if set(state) == set(checkpoint):
        return {name: name for name in state}
    try:
        loading: Any = importlib.import_module("transformers.core_model_loading")
        # Each tensor is a number, by which it is known again under its other name.
        renamed = loading.revert_weight_conversion(model, {name: torch.tensor(i) for i, name in enumerate(state)})
        found = {state[int(number)]: name for name, number in renamed.items()}
    except Exception:  # noqa: BLE001 (not a public function of transformers: whatever it raises, it does not tell)
        return None
    return found if set(found.values()) == set(checkpoint) and len(found) == len(state) else None


def _builder(checkpoint: Checkpoint) -> Any:
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
    if options.settings().quiet:
        transformers.utils.logging.disable_progress_bar()
    # Only classes of transformers itself: a folder's own code is never run.
    builder = getattr(transformers, str(name), None)
    if not (inspect.isclass(builder) and hasattr(builder, "from_pretrained")):
        raise ValueError(f"{path}: transformers {transformers.__version__} has no model {name!r}")
    return builder
