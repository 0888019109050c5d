"""Networks for checkpoints: built by a function of the user's, or by transformers from a config.json."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mudsc_fast.cli import huggingface

if TYPE_CHECKING:
    from torch import nn

    from mudsc_fast.checkpoints import Checkpoint


def build_model(checkpoint: Checkpoint, model_path: str | None) -> nn.Module:
    """The network with the checkpoint's weights, from the user's function or from transformers."""
    if model_path is not None:
        model = call_factory(model_path)
        try:
            model.load_state_dict(dict(checkpoint))
        except RuntimeError as error:
            # torch lists every difference; the first lines are enough to see what is wrong
            reason = "\n".join(str(error).splitlines()[:6])
            raise ValueError(f"--model {model_path}: {checkpoint.path} does not fit it: {reason}") from error
        return model
    check_buildable(checkpoint, None)
    return huggingface.load_model(checkpoint)


def check_buildable(checkpoint: Checkpoint, model_path: str | None) -> None:
    """ValueError for a function that is not there, and for a checkpoint that needs one; builds nothing."""
    if model_path is not None:
        find_function(model_path, "--model", "MODULE:FACTORY")
    elif not huggingface.has_config(checkpoint):
        raise ValueError(
            f"{checkpoint.path}: a checkpoint without config.json does not say how to build its network: give a "
            "function that does with --model MODULE:FACTORY"
        )


def call_factory(model_path: str) -> nn.Module:
    """What the function at MODULE:FACTORY returns; ValueError, naming --model, if that is no network."""
    from torch import nn

    model = find_function(model_path, "--model", "MODULE:FACTORY")()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model: expected {model_path!r} to return a torch.nn.Module, got {type(model).__name__}")
    return model


def find_function(path: str, option: str, metavar: str = "MODULE:FUNCTION") -> Callable[..., Any]:
    """The function at MODULE:FUNCTION, from the current folder or the Python path; ValueError names the option."""
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"{option}: expected {metavar} such as net:build, got {path!r}")
    # Like `python -m`: a console script starts without the current folder on the path.
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{option}: cannot import {module_name!r}: {error}") from error
    for part in function_name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{option}: {module_name!r} has no {function_name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{option}: {path!r} is no function")
    return cast("Callable[..., Any]", found)
