"""``mudsc-fast merge --refit``: the merged network's layers solved for what the parents' layers give on some inputs."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mudsc_fast.cli import huggingface, options

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mudsc_fast.averaging import Piece
    from mudsc_fast.checkpoints import Checkpoint
    from mudsc_fast.plan import MergePlan

_SOURCES = {"inputs": "--inputs", "text": "--text", "images": "--images"}


def _parse_folder(context: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    if value == "":
        raise click.BadParameter("expected a folder, got an empty name; give . if the current one is meant")
    return None if value is None else Path(value)


refit = options.together(
    click.option(
        "--refit",
        is_flag=True,
        help="Afterwards solve every layer in closed form for what the checkpoints' layers give on --text, --inputs or "
        "--images, without labels. All networks are in memory.",
    ),
    click.option("--text", type=click.Path(path_type=Path), metavar="FILE", help="With --refit: as for calibrate."),
    click.option("--inputs", type=click.Path(path_type=Path), metavar="FILE", help="With --refit: as for calibrate."),
    click.option("--images", type=click.Path(path_type=Path), metavar="DIR", help="With --refit: as for calibrate."),
    click.option("--max-length", type=click.IntRange(min=1), help="With --text: tokens of a line.  [default: 128]"),
    click.option("--batch-size", type=click.IntRange(min=1), help="With --refit: rows a batch.  [default: 16]"),
    click.option("--model", "model_path", metavar="MODULE:FACTORY", help="With --refit: as for calibrate."),
    click.option(
        "--ridge", type=click.FloatRange(min=0), help="With --refit: its ridge; more for few inputs.  [default: 0.01]"
    ),
    click.option(
        "--spill",
        type=click.Path(file_okay=False),
        callback=_parse_folder,
        metavar="FOLDER",
        help="With --refit: keep activations in a file there, on a disk, so that memory holds one batch's.",
    ),
)


@dataclass(frozen=True)
class Refit:
    """What the user asked for; the names are those of the options."""

    refit: bool
    text: Path | None
    inputs: Path | None
    images: Path | None
    max_length: int | None
    batch_size: int | None
    model_path: str | None
    ridge: float | None
    spill: Path | None

    @classmethod
    def taken(cls, given: dict[str, Any]) -> Refit:
        """Take the options out of those of the command."""
        return cls(**{name: given.pop(name) for name in cls.__dataclass_fields__})

    @property
    def source(self) -> Path | None:
        """The file or folder of inputs."""
        return self.text or self.inputs or self.images

    @property
    def files(self) -> list[Path]:
        """All files of inputs."""
        if self.source is None or not self.source.is_dir():
            return [] if self.source is None else [self.source]
        return sorted(path for path in self.source.rglob("*") if path.is_file())

    def described(self) -> dict[str, Any]:
        """What decides about the result, as plain values, files by their names alone."""
        return {
            name: value.name if isinstance(value, Path) else value
            for name, value in ((name, getattr(self, name)) for name in self.__dataclass_fields__)
            if value is not None and name not in ("refit", "spill")
        }

    def check_usage(self, method: str, weights: Any, width: Any) -> None:
        """Refuse options that do not go together, and inputs that are not there."""
        fields = [n for n in self.__dataclass_fields__ if n != "refit" and getattr(self, n) is not None]
        if not self.refit:
            if fields:
                flag = "--model" if fields[0] == "model_path" else f"--{fields[0].replace('_', '-')}"
                raise click.UsageError(f"{flag} is for --refit, which is not given")
            return
        sources = [name for name in _SOURCES if getattr(self, name) is not None]
        if len(sources) != 1:
            raise click.UsageError("--refit: give one of --text FILE, --inputs FILE and --images DIR")
        if method == "average":
            raise click.UsageError("--refit: needs a match; give --method align or zip")
        for name, value in (("--weights", weights), ("--width", width)):
            if value is not None:
                raise click.UsageError(f"{name}: --refit solves for the mean of the checkpoints in their own width")
        if self.max_length is not None and self.text is None:
            raise click.UsageError("--max-length is for --text, which is not given")
        if self.source is not None and not self.source.exists():
            raise FileNotFoundError(f"{_SOURCES[sources[0]]}: no such file or folder: {self.source}")
        if self.spill is not None and not self.spill.is_dir():
            raise FileNotFoundError(f"--spill: the folder {self.spill} does not exist")

    def check_network(self, checkpoint: Checkpoint, given: MergePlan | None) -> None:
        """Refuse, before hours of matching, networks that cannot be built or read the inputs, and plans of any width.

        given: the plan of --plan.
        """
        from mudsc_fast.cli.models import check_buildable

        if given is not None and any(given.widths[space.name] != space.width for space in given.spec.spaces):
            raise click.UsageError("--plan: its merged widths are others; --refit needs the checkpoints' own widths")
        check_buildable(checkpoint, self.model_path)
        if self.inputs is None:
            self.batches(checkpoint, None)

    def batches(self, checkpoint: Checkpoint, model: nn.Module | None) -> Any:
        """The inputs in batches, for a network of this checkpoint; those of --inputs ask it for its arguments."""
        import torch

        from mudsc_fast.cli.inputs import Batches
        from mudsc_fast.cli.texts import ImageBatches, TextBatches

        size = self.batch_size or 16
        if self.text is not None:
            return TextBatches(self.text, size, checkpoint, self.max_length or 128)
        if self.images is not None:
            parameters = () if model is None else model.parameters()
            dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)
            return ImageBatches(self.images, size, checkpoint, dtype)
        if model is None or self.inputs is None:
            raise ValueError("--inputs: a network has to say what its arguments are")
        return Batches(self.inputs, size, model)

    def check_memory(self, layout: Mapping[str, Any], models: int, limit: int | None) -> None:
        """Say what is needed at least; ValueError if that is more than --max-memory."""
        from mudsc_fast.repairs.regression import matrix_bytes
        from mudsc_fast.workplan import MARGIN, in_words, resident_bytes

        size = sum(info.nbytes for info in layout.values())
        layers = {name: matrix_bytes(info.shape) for name, info in layout.items() if _is_layer(name, info)}
        widest = max(layers, key=lambda name: layers[name], default="")
        matrices = layers.get(widest, 0)
        # The merge's tensors are made beside the networks, and are gone before the first matrix is.
        needed = resident_bytes() + MARGIN + (models + 1) * size + max(size, matrices)
        where = "one batch's activations" if self.spill is not None else "the activations of all batches at one layer"
        text = (
            f"refit: {models + 1} networks of {in_words(size)} in memory and up to {in_words(matrices)} for the "
            f"matrices of {widest}; in all {in_words(needed)}, and {where}"
        )
        if limit is not None and needed > limit:
            raise ValueError(f"max_memory: expected at least {needed} bytes, got {limit} ({text})")
        options.settings().say(text)


def _is_layer(name: str, info: Any) -> bool:
    """Not embeddings of positions or experts in one tensor, which no layer multiplies with as a whole."""
    return name.endswith("weight") and len(info.shape) >= 2


class Refitted:
    """The stream of a merge whose network is refitted before its tensors are given.

    Raises ValueError for checkpoints whose tensors do not correspond to their network's one by one.
    """

    def __init__(self, request: Refit, states: Any, opened: list[Checkpoint], plan: MergePlan, device: Any) -> None:
        self._request, self._states, self._opened, self._plan, self._device = request, states, opened, plan, device

    def __call__(self, *, only: Container[str] | None) -> Iterator[Piece]:
        from mudsc_fast.averaging import Piece

        for name, tensor in self._solved().items():
            if only is None or name in only:
                yield Piece(name, 0, tensor, True)

    def _solved(self) -> dict[str, Tensor]:
        """The tensors of the refitted network, by the checkpoint's names."""
        from mudsc_fast.cli.models import build_model
        from mudsc_fast.installing import install
        from mudsc_fast.repairs import refit

        settings, request = options.settings(), self._request
        models = [build_model(checkpoint, request.model_path).to(self._device) for checkpoint in self._opened]
        names, plan = self._by_network(models[0])
        merged = build_model(self._opened[0], request.model_path).to(self._device)
        state = self._plan.merge(self._states)
        install(merged, {name: state[disk].to(self._device) for name, disk in names.items()})
        del state
        batches = list(request.batches(self._opened[0], models[0]))
        layers = refit(
            merged,
            models,
            batches,
            plan,
            ridge=0.01 if request.ridge is None else request.ridge,
            progress=not settings.quiet,
            spill=request.spill,
        )
        settings.say(f"refitted {layers} layers on {len(batches)} batch{'' if len(batches) == 1 else 'es'}")
        found = merged.state_dict()
        return {disk: found[name].detach() for name, disk in names.items()}

    def _by_network(self, model: nn.Module) -> tuple[dict[str, str], MergePlan]:
        """{the network's name: the states' name}, and the plan by the network's names."""
        from mudsc_fast.cli.verifying import in_network
        from mudsc_fast.plan import MergePlan

        first, plan = self._states[0], self._plan
        own = list(model.state_dict())
        names = {name: name for name in own} if set(own) == set(first) else huggingface.names_on_disk(model, first)
        if names is None:
            raise ValueError(
                f"--refit: the tensors of {self._opened[0].path} do not correspond to its network's one by one; "
                "merge without --refit"
            )
        spec = in_network(plan.spec, model, first) if set(own) != set(first) else plan.spec
        return names, MergePlan(spec, plan.labels, plan.method, plan.values, leaders=plan.leaders)
