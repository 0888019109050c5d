"""Activation statistics that stay on disk: a space's covariance is read when it is asked for, and nothing is kept."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mudsc_fast.backends.cpu_covariance import DEPTH, PANEL
from mudsc_fast.batches import check_models
from mudsc_fast.calibration import KIND, ActivationStats, calibrate, record
from mudsc_fast.checkpoints import CheckpointWriter, TensorInfo
from mudsc_fast.checkpoints.reading import SafetensorsFile
from mudsc_fast.covariance import Covariance
from mudsc_fast.distributed import World, world_of
from mudsc_fast.progress import Progress
from mudsc_fast.records import KEY, PathLike
from mudsc_fast.wide_statistics import Band, Sums, bands
from mudsc_fast.workplan import MARGIN, accumulator_bytes, in_words, resident_bytes

if TYPE_CHECKING:
    from mudsc_fast.spaces import Space
    from mudsc_fast.spec import PermutationSpec

# Statistics are copied in pieces of about as many bytes.
_SLAB = 1 << 26


class StatsInfo(NamedTuple):
    """What is known of a space's statistics before they are read."""

    width: int
    models: int
    scope: str


class StatsFile(Mapping[str, Covariance]):
    """The statistics that ``ActivationStats.save`` or ``join_stats`` wrote, read space by space.

    device: where a covariance goes when it is read. ValueError for a file that holds something else.
    """

    def __init__(self, path: PathLike, device: torch.device | str = "cpu") -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        self.device = torch.device(device)
        self._file = SafetensorsFile(self.path)
        try:
            header = json.loads(self._file.metadata.get(KEY, "null"))
            if not isinstance(header, dict) or header.get("kind") != KIND or header.get("version") != 1:
                raise ValueError(f"not a file of {KIND}")
            self._plain: dict[str, dict[str, Any]] = {str(e["name"]): dict(e["plain"]) for e in header["spaces"]}
            self._number = {name: k for k, name in enumerate(self._plain)}
            for name in self._plain:
                self.info(name)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: damaged, or no statistics: {error}") from error

    def info(self, name: str) -> StatsInfo:
        """Width, number of models and scope of a space, without reading its statistics."""
        plain = self._plain[name]
        return StatsInfo(int(plain["width"]), int(plain["models"]), "cross" if plain["cross"] else "full")

    def tensors(self, name: str) -> dict[str, str]:
        """{entry of the covariance's state: its name in the file}."""
        prefix = f"{self._number[name]}."
        return {key.removeprefix(prefix): key for key in self._file.infos if key.startswith(prefix)}

    def __getitem__(self, name: str) -> Covariance:
        plain = self._plain[name]
        state = {key: self._file.get_tensor(stored).to(self.device) for key, stored in self.tensors(name).items()}
        try:
            return Covariance.from_state_dict({**state, **plain})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.path}: damaged statistics of space {name!r}: {error!r}") from error

    def sums(self, name: str) -> Sums:
        """A space's statistics without their products, which are read when they are asked for, some rows at a time."""
        plain, stored = self._plain[name], self.tensors(name)
        try:
            numbers = {key: int(plain[key]) for key in ("width", "models", "block", "count")}
            vectors = self._file.get_tensor(stored["vectors"])
            gram = stored["gram"]
            return Sums(
                **numbers,
                cross=bool(plain["cross"]),
                wide=bool(plain["wide"]),
                vectors=vectors,
                read=lambda start, stop: self._file.get_rows(gram, slice(start, stop)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: damaged statistics of space {name!r}: {error!r}") from error

    def __contains__(self, name: object) -> bool:
        return name in self._plain

    def __iter__(self) -> Iterator[str]:
        return iter(self._plain)

    def __len__(self) -> int:
        return len(self._plain)


def calibrate_to_file(
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    spec: PermutationSpec,
    path: PathLike,
    max_memory: int,
    scope: str = "full",
    device: torch.device | str | None = None,
    progress: Progress = False,
    group: Any = None,
    about: Mapping[str, Any] | None = None,
) -> tuple[int, int]:
    """Record the statistics that ``calibrate`` gives straight into a file, within `max_memory` bytes.

    Spaces whose statistics do not fit together beside the models are recorded in groups, one pass over the batches
    each; of a space whose own statistics do not fit, scope "cross" records as many rows in a pass as fit. `batches` is
    read once a pass and gives the same samples each time, in any order. Other arguments as in ``calibrate``; of several
    processes the one with the least memory left says what goes together, each pass is shared among them, and the first
    one writes. about: what else goes into the file's header.

    Returns the numbers of spaces and of passes. ValueError, which says how much is needed, if that does not fit, and
    for batches that give other numbers of samples in each pass; IsADirectoryError for a folder.
    """
    models = check_models(models)
    if Path(path).is_dir():
        raise IsADirectoryError(f"path: expected a file, found the folder {path}")
    world = world_of(group)
    room = max_memory - resident_bytes() - MARGIN
    if world is not None:
        room = min(world.exchange(lambda: room))
    groups = groups_of(spec, len(models), scope, room)
    target, passes = Path(path), 0
    with ExitStack() as stack:
        parts: list[Path] = []
        folders: list[str] = []

        def prepare() -> None:
            folder = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
            folders.append(stack.enter_context(folder))

        _by_first(world, prepare)
        place = Path(folders[0] if folders else "")
        for k, spaces in enumerate(groups):
            parts.append(place / f"{k}.safetensors")
            heard = only_taps_of(spec, spaces)
            height = rows_that_fit(spec[spaces[0]].width, len(models), scope, room)
            if height < spec[spaces[0]].width:
                passes += _in_bands(models, batches, heard, spec[spaces[0]], height, parts[-1], device, progress, world)
                continue
            stats = calibrate(models, batches, heard, scope, device, progress=progress, group=world)
            passes += 1
            _by_first(world, partial(_save, stats, parts[-1]))
            del stats
        _by_first(world, partial(join_stats, parts, target, [space.name for space in spec.spaces], about))
    return sum(map(len, groups)), passes


def _save(stats: ActivationStats, path: Path) -> None:
    """What ``ActivationStats.save`` writes, tensor by tensor, so that no copy of all sums is made."""
    tensors, about = stats.parts()
    layout = {key: TensorInfo(tuple(x.shape), x.dtype) for key, x in tensors.items()}
    header = {KEY: json.dumps({"kind": KIND, "version": 1, **about})}
    with CheckpointWriter(path, layout, metadata=header) as writer:
        for key, x in tensors.items():
            writer.write(key, x)


def _in_bands(
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    heard: PermutationSpec,
    space: Space,
    height: int,
    path: Path,
    device: torch.device | str | None,
    progress: Progress,
    world: World | None,
) -> int:
    """Record one space's "cross" statistics into a file, `height` rows in each pass; the number of passes."""
    width, others = space.width, len(models) - 1
    layout = {
        "0.gram": TensorInfo((width, others * width), torch.float64),
        "0.vectors": TensorInfo((4, len(models) * width), torch.float64),
    }
    plan = bands(width, height)
    vectors, samples = torch.zeros(0), 0
    with ExitStack() as stack:
        opened: list[CheckpointWriter] = []
        for k, (first, skip) in enumerate(plan):

            def make(space: Space, home: torch.device, first: int = first) -> Band:
                return Band(width, len(models), first, height, home)

            band = record(models, batches, heard, make, device, progress, world)[space.name]
            if k == 0:
                vectors, samples = band.vectors(), band.plain["count"]
            elif band.plain["count"] != samples:
                raise ValueError(
                    f"batches: expected the same samples in every pass, got {samples} in the first one and "
                    f"{band.plain['count']} in a later one"
                )
            else:
                # Other passes may put their shifts elsewhere by rounding; the products have to be about the same ones.
                band.rebase(vectors)
                fresh = slice(first + skip, first + height)
                vectors[:, 0, fresh] = band.vectors()[:, 0, fresh]

            def write(
                band: Band = band, skip: int = skip, last: bool = k == len(plan) - 1, seen: Tensor = vectors
            ) -> None:
                if not opened:
                    header = {"kind": KIND, "version": 1, "spaces": [{"name": space.name, "plain": band.plain}]}
                    writer = CheckpointWriter(path, layout, metadata={KEY: json.dumps(header)})
                    opened.append(stack.enter_context(writer))
                for start, rows in band.rows(skip):
                    opened[0].write_rows("0.gram", start, rows)
                if last:
                    opened[0].write("0.vectors", seen.reshape(4, -1))
                    stack.close()

            _by_first(world, write)
            del band, write  # before the next one takes as much
    return len(plan)


def rows_that_fit(width: int, models: int, scope: str, room: int) -> int:
    """How many rows of a space's statistics a pass can record in `room` bytes; `width`: all of them.

    As few passes as can be, of as many rows each. 0 if there is no way: less room than a few rows need, or scope
    "full", of which a zip needs the whole at once.
    """
    if accumulator_bytes(width, models, scope == "full") <= room:
        return width
    if scope == "full":
        return 0
    # Rows of model 0, with the samples that wait to be multiplied, of all models; a slab of the file beside them.
    waiting, slab = 4 * DEPTH * models * (width + PANEL), 4 * 8 * PANEL * models * (width + PANEL)
    height = (room - waiting - slab) // (8 * (models - 1) * (width + PANEL))
    while height > 0:
        pieces = (models - 1) * -(-width // height)
        if accumulator_bytes(height, 1 + pieces, False) + waiting + slab <= room:
            return -(-width // -(-width // height))
        height -= PANEL
    return 0


def _by_first(world: World | None, work: Callable[[], None]) -> None:
    work() if world is None else world.first(work)


def join_stats(
    parts: Sequence[PathLike], path: PathLike, order: Sequence[str], about: Mapping[str, Any] | None = None
) -> None:
    """Write the statistics of several files into one, tensor by tensor, whole or not at all.

    order: the spaces, as they shall stand in the file; those that no part has are left out. about: what else goes into
    its header.
    """
    files = [StatsFile(part) for part in parts]
    found = {name: file for file in files for name in file}
    layout: dict[str, TensorInfo] = {}
    sources: dict[str, tuple[StatsFile, str]] = {}
    spaces: list[dict[str, Any]] = []
    for name in order:
        if name in found:
            file = found[name]
            for key, stored in file.tensors(name).items():
                layout[f"{len(spaces)}.{key}"] = file._file.infos[stored]
                sources[f"{len(spaces)}.{key}"] = file, stored
            spaces.append({"name": name, "plain": file._plain[name]})
    target = Path(path)
    made = target.with_name(f".{target.name}.{secrets.token_hex(4)}.safetensors")
    header = {KEY: json.dumps({"kind": KIND, "version": 1, "spaces": spaces, **(about or {})})}
    with CheckpointWriter(made, layout, metadata=header) as writer:
        for name, (file, stored) in sources.items():
            shape = layout[name].shape
            step = max(1, _SLAB * shape[0] // max(layout[name].nbytes, 1))
            for start in range(0, shape[0], step):
                rows = file._file.get_rows(stored, slice(start, min(start + step, shape[0])))
                writer.write_rows(name, start, rows)
    try:
        os.replace(made, target)
    except OSError:
        made.unlink(missing_ok=True)
        raise


def groups_of(spec: PermutationSpec, models: int, scope: str, room: int) -> list[list[str]]:
    """Tapped spaces in groups whose statistics fit in `room` bytes together, in the spec's order.

    A space of which only some rows fit is a group of its own. ValueError, which says how much is needed, if not even
    these do.
    """
    groups: list[list[str]] = []
    filled = 0
    for space in spec.spaces:
        if not space.taps:
            continue
        size = accumulator_bytes(space.width, models, scope == "full")
        height = rows_that_fit(space.width, models, scope, room)
        if 0 < height < space.width:
            groups.append([space.name])
            filled = room  # nothing beside it
            continue
        if size > room:
            raise ValueError(
                f"max_memory: the statistics of space {space.name!r} ({space.width} units, scope {scope!r}) need "
                f"{in_words(size)}, and {in_words(max(room, 0))} are left beside the models"
                + ("" if scope == "cross" else "; scope 'cross', which is enough to align, needs less")
            )
        if not groups or filled + size > room:
            groups.append([])
            filled = 0
        groups[-1].append(space.name)
        filled += size
    return groups


def only_taps_of(spec: PermutationSpec, names: Sequence[str]) -> PermutationSpec:
    """The spec, in which other spaces are not listened to."""
    wanted = set(names)
    spaces = tuple(space if space.name in wanted else replace(space, taps=()) for space in spec.spaces)
    return replace(spec, spaces=spaces)
