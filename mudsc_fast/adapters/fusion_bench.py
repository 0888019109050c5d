"""fusion_bench: MuDSC as a method of its own; its lazy state dicts are read tensor by tensor.

``fusion_bench --config-dir FOLDER method=mudsc`` runs it with the configuration of ``write_config``; the class is made
when it is first asked for, since its base class is fusion_bench's.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mudsc_fast.adapters.pretrained import OnDisk, network_spec
from mudsc_fast.calibration import calibrate
from mudsc_fast.matching import match
from mudsc_fast.specs import spec_for

if TYPE_CHECKING:
    from mudsc_fast.spec import PermutationSpec

TARGET = "mudsc_fast.adapters.fusion_bench.MudscAlgorithm"

CONFIG = f"""# MuDSC (arXiv 2403.01753) by mudsc_fast; Hydra makes the class named here.
_target_: {TARGET}
method: align # or zip
balance: null # share of the weights; null: 1 without calibration inputs, else 0.5
attenuation: 0.5
budget: 1.0
seed: 0
weights: null # share of each model
"""


_TAKEN = ("config", "fusion_bench_config")


def write_config(folder: str | Path) -> Path:
    """Write ``method/mudsc.yaml`` below the folder, for ``fusion_bench --config-dir FOLDER method=mudsc``.

    ValueError for a folder ``config`` or ``fusion_bench_config``: where one stands in the working directory,
    fusion_bench takes it instead of all configurations of its own.
    """
    if Path(folder).name in _TAKEN:
        raise ValueError(
            f"folder: fusion_bench would read {Path(folder).name!r} instead of its own configurations and find none of "
            "them; expected another name, such as 'mudsc_config'"
        )
    path = Path(folder) / "method" / "mudsc.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CONFIG, encoding="utf-8")
    return path


def fuse(
    models: Sequence[nn.Module | Mapping[str, Tensor]],
    batches: Iterable[Any] | None = None,
    spec: PermutationSpec | None = None,
    method: str = "align",
    balance: float | None = None,
    weights: Sequence[float] | None = None,
    progress: bool = True,
    **options: Any,
) -> Any:
    """Modules, or state dicts such as a LazyStateDict, merged: a module like the first, or a dict of tensors.

    batches: calibration inputs, for modules. spec: None: of the architecture's family, or traced from the module, or
    from the lazy dict's ``meta_module``. options: as for ``match``. ValueError or TypeError as ``match`` raises them.
    """
    models = list(models)
    if len(models) < 2:
        raise ValueError(f"models: expected two or more, got {len(models)}")
    for m, model in enumerate(models):
        if not isinstance(model, nn.Module | Mapping):
            raise TypeError(f"models: expected modules or state dicts, got {type(model).__name__} for model {m}")
    first = models[0]
    if spec is None:
        spec = network_spec(first) if isinstance(first, nn.Module) else _spec_of_names(first)
    states = [model.state_dict() if isinstance(model, nn.Module) else model for model in models]
    modules = [model for model in models if isinstance(model, nn.Module)]
    stats = None
    if batches is not None:
        if len(modules) < len(models):
            raise ValueError("batches: activations need modules, got state dicts")
        stats = calibrate(modules, batches, spec, "full" if method == "zip" else "cross", progress=progress)
    if balance is None:
        balance = 1.0 if stats is None else 0.5
    plan = match(states, spec, stats, method, balance=balance, progress=progress, **options)
    merged = plan.merge(states, weights)
    if not isinstance(first, nn.Module):
        return merged
    result = copy.deepcopy(first)
    result.load_state_dict(merged)
    return result


def _spec_of_names(state: Mapping[str, Tensor]) -> PermutationSpec:
    """By the names and shapes of a state dict, or traced from a lazy one's module, whose tied tensors it may lack."""
    network: Any = getattr(state, "meta_module", None)
    if not isinstance(network, nn.Module):
        return spec_for(state)
    found = OnDisk(_tied(copy.deepcopy(network)))
    try:
        return found.spec_of(state)
    except ValueError as error:
        raise ValueError(f"models: {error} by the name that meta_module has for it; give modules instead") from error


def _tied(network: Any) -> nn.Module:
    """Tensors that are one with weights are made one again: without them they are two."""
    if hasattr(network, "tie_weights"):
        network.tie_weights()
    module: nn.Module = network
    return module


def _loaded(network: nn.Module, merged: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network without weights that has these; tied ones are tied again, other buffers stay."""
    result = copy.deepcopy(network)
    result.load_state_dict(merged, strict=False, assign=True)
    result = _tied(result)
    empty = [
        name
        for tensors in (result.state_dict(), dict(result.named_buffers()))
        for name in tensors
        if tensors[name].is_meta
    ]
    if empty:
        raise ValueError(
            f"meta_module: {empty[0]!r} has no values, neither in the models nor in their network, which must keep its "
            "buffers, as with accelerate.init_empty_weights"
        )
    return result


def _make_algorithm() -> type:
    try:
        base: Any = importlib.import_module("fusion_bench.method").BaseAlgorithm
    except ImportError as error:
        raise ImportError("MudscAlgorithm needs fusion_bench: pip install fusion_bench") from error

    class MudscAlgorithm(base):  # type: ignore[misc]
        """fusion_bench's method ``mudsc``: ``run(modelpool)`` gives a module like the pool's first.

        Of lazy state dicts too, if they have a ``meta_module``: fusion_bench saves and evaluates modules.
        """

        def __init__(
            self,
            method: str = "align",
            balance: float | None = None,
            attenuation: float = 0.5,
            budget: float = 1.0,
            seed: int = 0,
            weights: Sequence[float] | None = None,
            batches: Iterable[Any] | None = None,
            spec: PermutationSpec | None = None,
            **kwargs: Any,
        ) -> None:
            super().__init__(**kwargs)
            self.method, self.balance, self.attenuation, self.budget = method, balance, attenuation, budget
            self.seed, self.weights, self.batches, self.spec = seed, weights, batches, spec

        def run(self, modelpool: Any) -> Any:
            models = _models_of(modelpool)
            fused = fuse(
                models,
                self.batches,
                self.spec,
                self.method,
                self.balance,
                None if self.weights is None else list(self.weights),
                attenuation=self.attenuation,
                budget=self.budget,
                seed=self.seed,
            )
            network = None if isinstance(fused, nn.Module) else getattr(models[0], "meta_module", None)
            return fused if network is None else _loaded(network, fused)

    MudscAlgorithm.__module__ = __name__
    MudscAlgorithm.__qualname__ = "MudscAlgorithm"
    # Both are written to its configuration file by fusion_bench.
    names = ("method", "balance", "attenuation", "budget", "seed", "weights")
    MudscAlgorithm._config_mapping = getattr(base, "_config_mapping", {}) | {name: name for name in names}
    return MudscAlgorithm


def _models_of(pool: Any) -> list[Any]:
    """The models of a fusion_bench pool (its pretrained one, "_pretrained_", is left out), of a mapping or a list."""
    names = getattr(pool, "model_names", None)
    if names is not None:
        return [pool.load_model(name) for name in names]
    if isinstance(pool, Mapping):
        return [model for name, model in pool.items() if not str(name).startswith("_")]
    return list(pool)


def __getattr__(name: str) -> Any:
    if name != "MudscAlgorithm":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = _make_algorithm()
    globals()[name] = made
    return made
