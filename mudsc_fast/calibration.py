"""Activation statistics of every space, from one pass of all models over the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mudsc_fast.arguments import check_spec
from mudsc_fast.axes import rows
from mudsc_fast.batches import check_batches, check_models, evaluation, feed, length_of, placed
from mudsc_fast.covariance import Covariance
from mudsc_fast.distributed import world_of
from mudsc_fast.hooks import Port, Recorder
from mudsc_fast.progress import Progress, bar
from mudsc_fast.records import PathLike, read_record, write_record

if TYPE_CHECKING:
    from mudsc_fast.spaces import Space, Tap
    from mudsc_fast.spec import PermutationSpec

KIND = "activation statistics"


class Gathering(Protocol):
    """What takes the activations of a space: a `Covariance`, or some rows of one."""

    width: int

    def update(self, features: Sequence[Tensor], dim: int) -> None: ...
    def all_reduce(self, group: Any = None) -> None: ...


Recorded = TypeVar("Recorded", bound=Gathering)


class ActivationStats(Mapping[str, Covariance]):
    """The covariance of every tapped space, by the space's name; read-only."""

    def __init__(self, covariances: Mapping[str, Covariance]) -> None:
        self._covariances = dict(covariances)

    def __getitem__(self, space: str) -> Covariance:
        return self._covariances[space]

    def __iter__(self) -> Iterator[str]:
        return iter(self._covariances)

    def __len__(self) -> int:
        return len(self._covariances)

    def __repr__(self) -> str:
        return f"ActivationStats({len(self)} spaces)"

    def save(self, path: PathLike) -> None:
        """Write all statistics to one safetensors file, atomically."""
        write_record(path, KIND, *self.parts())

    def parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `save` writes: the tensors, which are not copied, and what stands beside them in the header."""
        tensors: dict[str, Tensor] = {}
        spaces: list[dict[str, Any]] = []
        for k, (name, covariance) in enumerate(self.items()):
            plain = {}
            for key, value in covariance.state_dict(copy=False).items():
                if isinstance(value, Tensor):
                    tensors[f"{k}.{key}"] = value
                else:
                    plain[key] = value
            spaces.append({"name": name, "plain": plain})
        return tensors, {"spaces": spaces}

    @classmethod
    def load(cls, path: PathLike, device: torch.device | str = "cpu") -> ActivationStats:
        """The statistics that `save` wrote; ValueError if the file is damaged or holds something else."""
        tensors, header = read_record(path, KIND)
        covariances = {}
        try:
            for k, entry in enumerate(header["spaces"]):
                prefix = f"{k}."
                state = {
                    key[len(prefix) :]: value.to(device) for key, value in tensors.items() if key.startswith(prefix)
                }
                covariances[str(entry["name"])] = Covariance.from_state_dict({**state, **entry["plain"]})
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: damaged file: {error!r}") from error
        return cls(covariances)


def calibrate(
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    spec: PermutationSpec,
    scope: str = "full",
    device: torch.device | str | None = None,
    backend: str = "auto",
    progress: Progress = False,
    group: Any = None,
) -> ActivationStats:
    """Run all models over the same batches, in eval mode, and stream their activations into covariances.

    models: two or more modules of one architecture; their training flags, devices and hooks are as before afterwards.
    batches: an iterable, read once; a batch is a tensor, a tuple or list whose first item is the input, or a mapping of
        keyword arguments (a Hugging Face BatchEncoding is one); it is moved to each model's device.
    spec: its spaces' taps say where to look; a space with several taps counts the samples of each, one without has no
        entry in the result.
    scope: "full", or "cross" (model 0 against each other model only: enough to align, half the work for two models).
    device: where to run and to keep the statistics; None: where the models are.
    progress: True draws a bar on a terminal, "always" also elsewhere.
    group: a torch.distributed process group, True for the default one: all its processes make this call with the same
        batches, each runs every n-th of them, and all get the statistics of all.

    Only the activations of the current batch are held. Raises ValueError for fewer than two models, no or empty
    batches, a tap whose module does not exist or is never called, and activations whose width is not the space's.
    """

    def make(space: Space, home: torch.device) -> Covariance:
        return Covariance(space.width, models=len(models), scope=scope, device=home, backend=backend)

    models = check_models(models)
    return ActivationStats(record(models, batches, spec, make, device, progress, group))


def record(
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    spec: PermutationSpec,
    make: Callable[[Space, torch.device], Recorded],
    device: torch.device | str | None,
    progress: Progress,
    group: Any,
) -> dict[str, Recorded]:
    """What `calibrate` does, into sums of any kind. make: those of a space, on a device."""
    check_spec(spec)
    batches = check_batches(batches)
    world = world_of(group)
    ports: dict[Port, list[tuple[str, Tap]]] = {}
    for space in spec.spaces:
        for tap in space.taps:
            ports.setdefault((tap.module, tap.port), []).append((space.name, tap))

    where = None if device is None else torch.device(device)
    with placed(models, where) as homes, evaluation(models):
        covariances = {space.name: make(space, homes[0]) for space in spec.spaces if space.taps}
        reached: set[Port] = set()

        def add(port: Port, activations: list[Tensor]) -> None:
            reached.add(port)
            for name, tap in ports[port]:
                seen = [_units(x.to(homes[0]), tap) for x in activations]
                shapes = {tuple(x.shape) for x, _ in seen}
                dim = seen[0][1]
                if len(shapes) > 1 or seen[0][0].shape[dim] != covariances[name].width:
                    raise ValueError(
                        f"tap {tap.module!r} ({tap.port}) of space {name!r}: expected activations of one shape in all "
                        f"models, with {covariances[name].width} units, got {sorted(shapes)} with units on dim {dim}"
                    )
                covariances[name].update([x for x, _ in seen], dim=dim)

        recorder = Recorder(models, list(ports), add)
        count = 0
        with recorder.attached(), bar("calibrating", length_of(batches), progress) as steps:
            for number, batch in enumerate(batches):
                count += 1
                steps.advance()
                if world is not None and number % world.size != world.rank:
                    continue
                for m, model in enumerate(models):
                    with recorder.running(m):
                        feed(model, batch, homes[m])
                recorder.end_batch()
    if count == 0:
        raise ValueError("batches: expected at least one batch, got none")
    if world is not None:
        reached = set().union(*world.exchange(lambda: reached))
        for covariance in covariances.values():
            covariance.all_reduce(world.group)
    for port in ports:
        if port not in reached:
            raise ValueError(f"tap {port[0]!r} ({port[1]}): the module was never called in {count} batches")
    return covariances


def _units(x: Tensor, tap: Tap) -> tuple[Tensor, int]:
    """The activation with all units on one dim, and this dim; a view unless the tap's factors lie apart."""
    try:
        x, dims = rows(x, tap)
    except ValueError as error:
        raise ValueError(f"tap {tap.module!r} ({tap.port}): {error}") from error
    if len(dims) == 1:
        return x, dims[0]
    if dims != tuple(range(dims[0], dims[0] + len(dims))):
        x = x.movedim(dims, tuple(range(x.ndim - len(dims), x.ndim)))
        dims = tuple(range(x.ndim - len(dims), x.ndim))
    return x.flatten(dims[0], dims[-1]), dims[0]
