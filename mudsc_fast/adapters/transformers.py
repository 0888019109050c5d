"""transformers: several pretrained models in, one loaded model out."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mudsc_fast.adapters.pretrained import network_spec
from mudsc_fast.merging import merge_models
from mudsc_fast.progress import Progress

if TYPE_CHECKING:
    from torch import nn

    from mudsc_fast.spec import PermutationSpec


def merge_pretrained(
    models: Sequence[Any],
    batches: Iterable[Any] | None = None,
    spec: PermutationSpec | None = None,
    method: str = "align",
    weights: Sequence[float] | None = None,
    model_class: Any = None,
    progress: Progress = True,
    load: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """One loaded model, a copy of the first with merged weights, in eval mode.

    models: names or folders, which ``model_class.from_pretrained`` loads (None: the class that the folder's or hub's
        config names), or loaded models, which stay as they are. Two or more of one architecture.
    batches: calibration inputs, such as what a tokenizer gives; None: units are compared by their weights alone.
    spec: None: of the architecture's family, or traced. method: "align", "zip" and whatever ``merge_models`` offers.
    weights: share of each model. load: keyword arguments of ``from_pretrained``. options: as for ``match``.

    Raises ValueError, naming the model, if one has another architecture or width, or cannot be loaded; TypeError for
    what is no model.
    """
    if isinstance(models, str | os.PathLike):
        raise TypeError(f"models: expected a list of two or more, got {os.fspath(models)!r}")
    given = list(models)
    if len(given) < 2:
        raise ValueError(f"models: expected two or more, got {len(given)}")
    loaded = [_loaded(model, model_class, load or {}) for model in given]
    _check_alike(given, loaded)
    if spec is None:
        spec = network_spec(loaded[0])
    options.setdefault("balance", 1.0 if batches is None else 0.5)
    merged = merge_models(loaded, batches, spec, method, weights=weights, progress=progress, **options)
    result = copy.deepcopy(loaded[0])
    result.load_state_dict(merged)
    return result.eval()


def _loaded(model: Any, model_class: Any, load: dict[str, Any]) -> nn.Module:
    from torch import nn

    if isinstance(model, nn.Module):
        return model
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"models: expected names, folders or modules, got {type(model).__name__}")
    import transformers

    name = os.fspath(model)
    if (Path(name).is_absolute() or name.startswith(".")) and not Path(name).is_dir():
        raise ValueError(f"models: {name} is no folder")
    try:
        if model_class is None:
            config = transformers.AutoConfig.from_pretrained(name)
            classes = getattr(config, "architectures", None) or ["AutoModel"]
            model_class = getattr(transformers, classes[0], None)
            if model_class is None:
                raise ValueError(f"transformers {transformers.__version__} has no network {classes[0]!r}")
        found: nn.Module = model_class.from_pretrained(name, **load)
    except (OSError, ValueError) as error:
        raise ValueError(f"models: {name} cannot be loaded: {error}") from error
    return found


def _check_alike(given: Sequence[Any], loaded: Sequence[nn.Module]) -> None:
    shapes = [{name: tuple(t.shape) for name, t in model.state_dict().items()} for model in loaded]
    for m, own in enumerate(shapes[1:], 1):
        name = given[m] if isinstance(given[m], str | os.PathLike) else f"model {m}"
        odd = sorted(own.keys() ^ shapes[0].keys())
        if odd:
            raise ValueError(f"models: {name} has another architecture than the first: only one of them has {odd[0]!r}")
        for tensor, shape in own.items():
            if shape != shapes[0][tensor]:
                raise ValueError(f"models: {name} has another width: {tensor} is {shape}, not {shapes[0][tensor]}")
