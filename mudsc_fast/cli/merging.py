"""``mudsc-fast merge`` and ``mudsc-fast align``: checkpoints in, one checkpoint out."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from mudsc_fast.cli import huggingface, options, processes, work
from mudsc_fast.cli.card import model_card
from mudsc_fast.cli.progress import track
from mudsc_fast.cli.recording import Note, check_run_folder, recorded
from mudsc_fast.cli.refitting import Refit, Refitted
from mudsc_fast.cli.refitting import refit as refit_options
from mudsc_fast.cli.specs import find_spec
from mudsc_fast.cli.verifying import check_law

if TYPE_CHECKING:
    import torch

    from mudsc_fast.arguments import Width
    from mudsc_fast.averaging import Piece
    from mudsc_fast.checkpoints import Checkpoint, StackedCheckpoint, TensorInfo
    from mudsc_fast.distributed import World
    from mudsc_fast.plan import MergePlan
    from mudsc_fast.spec import PermutationSpec
    from mudsc_fast.workplan import WorkPlan

    States = Sequence[Checkpoint] | Sequence[StackedCheckpoint]


# Options that do not decide the result, or that are told apart.
_UNRECORDED = {
    "checkpoints", "output", "resume", "dry_run", "max_memory", "force", "save_plan", "record", "verify", "refit",
}  # fmt: skip


class Stream(Protocol):
    """The tensors of the output, those of some names or all."""

    def __call__(self, *, only: Container[str] | None) -> Iterable[Piece]: ...


@dataclass(frozen=True)
class Request:
    """What the user asked for; the names are those of the options."""

    checkpoints: tuple[Path, ...]
    output: Path
    spec_from: str
    heads: int | None
    groups: int | None
    dtype: str
    max_shard_size: str
    device: str
    seed: int
    force: bool
    allow_torch_load: bool
    balance: float | None = None
    stats: Path | None = None
    plan_from: Path | None = None
    save_plan: Path | None = None
    method: str = "align"
    weights: list[float] | None = None
    width: int | float | None = None
    width_budget: float | None = None
    max_memory: str | None = None
    dry_run: bool = False
    resume: bool = False
    record: Path | None = None
    verify: bool = True
    split_hubs: bool = False
    refit: Refit | None = None

    def check_usage(self) -> None:
        """Refuse options that contradict each other, before anything is opened."""
        count = len(self.checkpoints)
        if count < 2:
            raise click.UsageError(f"expected two or more checkpoints, got {count}")
        if self.weights is not None and len(self.weights) != count:
            raise click.UsageError(f"--weights: expected {count}, one for each checkpoint, got {len(self.weights)}")
        matching = {
            "--balance": self.balance,
            "--stats": self.stats,
            "--width": self.width,
            "--width-budget": self.width_budget,
            "--save-plan": self.save_plan,
        }
        unused = [name for name, value in matching.items() if value is not None]
        if self.plan_from is not None and unused:
            raise click.UsageError(f"{unused[0]} is for finding a match, but --plan gives one")
        if self.method == "average" and (unused or self.plan_from is not None):
            raise click.UsageError(f"--method average matches nothing, so it cannot use {[*unused, '--plan'][0]}")
        if self.width is not None and self.method != "zip":
            raise click.UsageError(f"--width: only --method zip changes widths, got --method {self.method}")
        if self.width_budget is not None:
            if self.method != "zip" or self.stats is None:
                raise click.UsageError("--width-budget: chooses widths by activations, for --method zip with --stats")
            for name, value in (("width", self.width), ("max-memory", self.max_memory), ("refit", self.refit)):
                if value is not None:
                    raise click.UsageError(f"--width-budget cannot be used with --{name}")
        if self.balance is not None and self.balance < 1 and self.stats is None:
            raise click.UsageError(
                f"--balance {self.balance:g} compares activations too, and there are no --stats. Record them with "
                "'mudsc-fast calibrate A B -o stats.safetensors --inputs FILE' and pass --stats stats.safetensors, "
                "or compare weights alone with --balance 1"
            )

    def check_outputs(self) -> None:
        """Refuse what could not be written at the end of a long run."""
        from mudsc_fast.checkpoints import check_output

        inputs = [path for path in (*self.checkpoints, self.stats, self.plan_from) if path is not None]
        check_output(self.output, inputs, self.force)
        if self.save_plan is not None:
            options.check_record(self.save_plan, "--save-plan", inputs, self.force)
            if self.save_plan.resolve() == self.output.resolve():
                raise ValueError(f"--save-plan: {self.save_plan} is the output too")
        if self.record is not None:
            check_run_folder(self.record, self.force)

    def used_balance(self) -> float:
        """The balance asked for, or the one that fits what is there."""
        if self.balance is not None:
            return self.balance
        if self.stats is None:
            options.settings().say("no --stats: matching by weights alone (--balance 1)")
            return 1.0
        return 0.5


def _parse_weights(context: click.Context, parameter: click.Parameter, value: str | None) -> list[float] | None:
    try:
        return None if value is None else [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected numbers with commas between them, such as 1,0.5, got {value!r}") from None


def _parse_width(context: click.Context, parameter: click.Parameter, value: str | None) -> int | float | None:
    if value is None:
        return None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    raise click.BadParameter(f"expected units (an integer) or a share of the width such as 1.5, got {value!r}")


_matching = options.together(
    click.option(
        "--balance",
        type=click.FloatRange(0, 1),
        help="Share of weight space in the similarity: 0 compares activations alone, 1 weights alone.  "
        "[default: 0.5 with --stats, else 1]",
    ),
    click.option(
        "--stats",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Activation statistics that 'mudsc-fast calibrate' wrote for the same checkpoints in the same order.",
    ),
    click.option(
        "--plan",
        "plan_from",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Use this match instead of finding one.",
    ),
    click.option(
        "--save-plan", type=click.Path(path_type=Path), metavar="FILE", help="Also write the match, for --plan."
    ),
)
_record = click.option(
    "--record",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Also write what was done, and the match, into this folder: 'mudsc-fast report FOLDER' makes a page of it.",
)
_running = options.together(
    click.option(
        "--verify/--no-verify",
        default=True,
        show_default=True,
        help="Before anything is written, try on the network of a Hugging Face folder that permuting all spaces "
        "at random leaves its outputs as they are.",
    ),
    click.option(
        "--split-hubs",
        is_flag=True,
        help="Of several processes: all of them share the tensors of a residual stream, which one compares "
        "alone otherwise. Much faster; similarities differ by rounding.",
    ),
    options.dtype,
    options.max_shard_size,
    work.large,
    options.device,
    options.seed,
    options.spec,
    options.force,
    options.allow_torch_load,
    options.quiet,
    options.debug,
)


@click.command(short_help="Merge checkpoints into one.")
@options.checkpoints("A B [C...]")
@options.output
@click.option(
    "--method",
    type=click.Choice(["align", "zip", "average"]),
    default="align",
    show_default=True,
    help="align: one-to-one, keeps the width. zip: similar units of one model may merge too. average: tensor by "
    "tensor, without matching.",
)
@_matching
@click.option("--weights", callback=_parse_weights, metavar="1,1", help="Share of each checkpoint in the average.")
@click.option(
    "--width",
    callback=_parse_width,
    metavar="N|SHARE",
    help="With zip: merged units of each space, or a share of its width such as 1.5.",
)
@click.option(
    "--width-budget",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SHARE",
    help="With zip and --stats: choose the widths, but not of attention heads, such that OUT holds this share of a "
    "checkpoint's parameters; with 1 spaces that merge badly become wider and others narrower.",
)
@refit_options
@_record
@_running
def merge(**given: Any) -> None:
    """Merge two or more checkpoints of one architecture into one network.

    Each checkpoint is a .safetensors file or a Hugging Face folder. OUT is written tensor by tensor, in the unit order
    of the first checkpoint; for a folder the first checkpoint's config and tokenizer files are copied.

    \b
    Weights alone:
      mudsc-fast merge a.safetensors b.safetensors -o merged.safetensors
    Weights and activations, units also merged inside a model:
      mudsc-fast merge a b -o merged --method zip --stats stats.safetensors
    Hugging Face folders, every layer solved afterwards on lines of text:
      mudsc-fast merge a/ b/ -o merged --refit --text lines.txt
    Find the match once, then try shares:
      mudsc-fast merge a b -o m1 --save-plan plan.safetensors
      mudsc-fast merge a b -o m2 --plan plan.safetensors --weights 1,0.5

    \b
    Several processes share the work when torchrun starts them:
      torchrun --nproc-per-node 4 -m mudsc_fast merge a b -o merged

    BatchNorm's running statistics are averaged like weights. They do not fit the merged network: recompute them from
    data with mudsc_fast.reset_batchnorm.
    """
    refit = Refit.taken(given)
    request = Request(**given, refit=refit if refit.refit else None)
    request.check_usage()
    refit.check_usage(request.method, request.weights, request.width)
    start = time.perf_counter()
    device = options.as_device(request.device)
    world = processes.join()
    if world is not None and refit.refit:
        raise click.UsageError("--refit: one process alone; start it without torchrun")
    request.check_outputs()
    if request.dry_run:
        return _prepare(request, device, world).show()
    if world is not None and world.rank:
        request = replace(request, record=None)
    with recorded(request) as note:
        _merge(request, device, note, world, start)


def _merge(request: Request, device: torch.device, note: Note, world: World | None, start: float) -> None:
    job = _prepare(request, device, world)
    stream: Stream
    if request.method == "average":
        from mudsc_fast.averaging import check_weights, merge_pieces

        shares = check_weights(request.weights, len(job.states))
        plan, about, layout = None, {"method": "average"}, job.layout
        stream = partial(merge_pieces, job.spec, {}, {}, job.states, shares, job.piece)
    else:
        plan, about = _plan(job)
        stream = partial(plan.merge_pieces, job.states, request.weights, job.piece)
        layout = _merged_layout(plan, job.layout)
        if request.refit is not None:
            stream = Refitted(request.refit, job.states, job.opened, plan, device)
            about["refit"] = ", ".join(f"{key} {value}" for key, value in request.refit.described().items())
    if request.weights is not None:
        about["weights"] = ",".join(f"{w:g}" for w in request.weights)
    note(about, plan)
    _write("merged", job, stream, layout, 0, about, plan)
    _summarise("merged", request, plan, about, layout, time.perf_counter() - start)


@click.command(short_help="Put one checkpoint into the unit order of another.")
@options.checkpoints("A B")
@options.output
@_matching
@_running
def align(**given: Any) -> None:
    """Write checkpoint B in the unit order of checkpoint A.

    The output computes what B computes, but its units stand where A has similar ones, so that other tools (averaging,
    SLERP, TIES, task vectors) can merge the two position by position.

    \b
    Example:
      mudsc-fast align a.safetensors b.safetensors -o b_like_a.safetensors
    """
    request = Request(**given)
    if len(request.checkpoints) != 2:
        raise click.UsageError(f"expected two checkpoints, A and B, got {len(request.checkpoints)}")
    request.check_usage()
    start = time.perf_counter()
    device = options.as_device(request.device)
    world = processes.join()
    request.check_outputs()
    job = _prepare(request, device, world)
    if request.dry_run:
        return job.show()
    plan, about = _plan(job)
    layout = job.states[1].layout
    _write("aligned", job, partial(plan.align_pieces, job.states[1], 1, job.piece), layout, 1, about, plan)
    _summarise("aligned", request, plan, about, layout, time.perf_counter() - start)


@dataclass(frozen=True)
class Job:
    """A request whose checkpoints are open.

    states: the checkpoints by the names that the spec has. given: the plan of --plan. ahead: the plan of work, where
    memory is limited or the work is only to be shown.
    """

    request: Request
    device: torch.device
    states: States
    spec: PermutationSpec
    given: MergePlan | None
    limit: int | None
    ahead: WorkPlan | None
    kept: work.Resumption
    world: World | None
    opened: list[Checkpoint]

    @property
    def layout(self) -> dict[str, TensorInfo]:
        """Of the first checkpoint."""
        return self.states[0].layout

    @property
    def piece(self) -> int | None:
        """The largest slab of a tensor in bytes; None: tensors are merged whole."""
        return None if self.ahead is None else self.ahead.merge_piece

    def show(self) -> None:
        """Print the plan of work."""
        files = [file for state in self.states for file in state.files]
        if self.ahead is not None:
            work.show(self.ahead, self.request.output, files, self.request.resume, self.limit)


def _prepare(request: Request, device: torch.device, world: World | None) -> Job:
    from mudsc_fast.plan import MergePlan
    from mudsc_fast.spec import PermutationSpec
    from mudsc_fast.workplan import plan_work

    limit = work.limit_of(request.max_memory)
    opened = options.open_all(request.checkpoints, request.allow_torch_load, device)
    states: States = opened
    given = None
    if request.method == "average":
        spec = PermutationSpec(())
    else:
        states = huggingface.stacked(opened) or opened
        if request.plan_from is not None:
            given = MergePlan.load(request.plan_from)
            spec = given.spec
            spec.check({name: info.shape for name, info in states[0].layout.items()})
        else:
            spec = find_spec(states[0], request.spec_from, request.heads, request.groups)
    layout, plan = states[0].layout, None
    if limit is not None or request.dry_run:
        dtype = options.as_dtype(request.dtype)
        item = {
            name: dtype if dtype is not None and i.dtype.is_floating_point else i.dtype for name, i in layout.items()
        }
        output = sum(info.nbytes // info.dtype.itemsize * item[name].itemsize for name, info in layout.items())
        balance = 1.0 if request.stats is None else 0.5 if request.balance is None else request.balance
        plan = plan_work(
            spec, layout, len(states), request.method, limit, balance, output=output, matching=given is None
        )
    if request.refit is not None:
        request.refit.check_network(opened[0], given)
        request.refit.check_memory(layout, len(states), limit)
    files = [file for state in states for file in state.files]
    options_given = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(request).items()
        if name not in _UNRECORDED
    }
    if request.refit is not None:
        options_given["refit"] = request.refit.described()
    read = [] if request.refit is None else request.refit.files
    inputs = work.files_of([*files, request.stats, request.plan_from, *read])
    about = {"inputs": inputs, "processes": 1 if world is None else world.size, **options_given}
    kept = work.Resumption(request.resume and not request.dry_run, request.output, about, world)
    return Job(request, device, states, spec, given, limit, plan, kept, world, opened)


def _plan(job: Job) -> tuple[MergePlan, dict[str, str]]:
    """The match, found or loaded, and what the output's header says about it."""
    from mudsc_fast.calibration import ActivationStats
    from mudsc_fast.matching import match
    from mudsc_fast.stats_files import StatsFile

    request, stats = job.request, None
    if job.given is not None and request.plan_from is not None:
        _check_law(job)
        return job.given, {"method": job.given.method, "plan": request.plan_from.name}
    balance = request.used_balance()
    _check_law(job)
    if request.stats is not None:
        # Under a limit each space's statistics are read when it is matched.
        read = ActivationStats.load if job.limit is None else StatsFile
        stats = read(request.stats, device=job.device)
    width: Width | None = request.width
    if request.width_budget is not None and stats is not None:
        from mudsc_fast.elastic import elastic_widths

        width = elastic_widths(
            job.states, job.spec, stats, request.width_budget, "zip", progress=not options.settings().quiet
        )
    plan = match(
        job.states,
        job.spec,
        stats,
        method=request.method,
        balance=balance,
        width=width,
        seed=request.seed,
        progress=not options.settings().quiet,
        device=job.device,
        max_memory=job.limit,
        journal=job.kept.journal,
        group=job.world,
        split_hubs=request.split_hubs,
    )
    about = {"method": request.method, "balance": f"{balance:g}", "seed": str(request.seed)}
    if request.stats is not None:
        about["stats"] = request.stats.name
    if request.width is not None:
        about["width"] = str(request.width)
    if request.width_budget is not None:
        about["width_budget"] = f"{request.width_budget:g}"
    if request.save_plan is not None:
        save = partial(plan.save, request.save_plan)
        save() if job.world is None else job.world.first(save)
    return plan, about


def _check_law(job: Job) -> None:
    check = partial(check_law, job.spec, job.states[0], job.request.verify, small=job.limit is not None)
    check() if job.world is None else job.world.first(check)


def _merged_layout(plan: MergePlan, layout: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Shapes after the merge: another width changes the sizes of every axis of its space."""
    from mudsc_fast.axes import axis_labels

    widths = plan.widths
    changed = [space for space in plan.spec.spaces if widths[space.name] != space.width]
    merged = dict(layout)
    for name in {axis.tensor for space in changed for axis in space.axes}:
        shape = list(layout[name].shape)
        for part in axis_labels(plan.spec, name, layout[name].shape, plan.labels, widths):
            for dim, size in zip(part.dims, part.sizes, strict=True):
                shape[dim] = size
        merged[name] = layout[name]._replace(shape=tuple(shape))
    return merged


def _write(
    verb: str,
    job: Job,
    stream: Stream,
    layout: Mapping[str, TensorInfo],
    like: int,
    about: Mapping[str, str],
    plan: MergePlan | None,
) -> None:
    """Write the stream; the files beside the weights come from the folder of checkpoint `like`, if it is one."""
    import mudsc_fast as mf
    from mudsc_fast.checkpoints import CheckpointWriter, StackedCheckpoint, cast_layout

    settings, request, model = options.settings(), job.request, job.states[like]
    dtype = options.as_dtype(request.dtype)
    if model.folder is not None and layout != model.layout:
        settings.say(f"note: config.json is copied from {model.path} and does not know the merged widths")
    sources = ",".join(path.resolve().name for path in request.checkpoints)
    form = model if isinstance(model, StackedCheckpoint) else None
    card = model_card(request.output.resolve().name, verb, request.checkpoints, about, mf.__version__, plan)
    writer = CheckpointWriter(
        request.output,
        cast_layout(layout if form is None else form.on_disk(layout), dtype),
        metadata={"mudsc_fast": mf.__version__, "sources": sources, **about},
        max_shard_size=request.max_shard_size,
        overwrite=request.force,
        inputs=[path for state in job.states for path in (state.path, *state.files)],
        companions=model.folder,
        companion_dtype=dtype,
        texts={"README.md": card},
        keep=job.kept.folder,
        world=job.world,
    )
    only = writer.own if form is None else {n for n in layout if not writer.own.isdisjoint(form.stored(n))}
    with writer:
        for piece in track(stream(only=only), "writing", None if job.piece else len(only), settings.quiet):
            if form is not None:
                form.write(writer, piece.name, piece.start, piece.tensor)
            elif piece.whole:
                writer.write(piece.name, piece.tensor)
            else:
                writer.write_rows(piece.name, piece.start, piece.tensor)
    job.kept.finish()


def _summarise(
    verb: str,
    request: Request,
    plan: MergePlan | None,
    about: Mapping[str, str],
    layout: Mapping[str, TensorInfo],
    seconds: float,
) -> None:
    how = ", ".join(f"{key} {value}" for key, value in about.items())
    text = f"{verb} {len(request.checkpoints)} checkpoints ({how}): "
    if plan is not None and plan.values:
        for name, value in plan.values.items():
            options.settings().tell(f"{name}: {plan.spec[name].width} units, match {value:.3f}")
        if plan.history:
            options.settings().tell("L of each sweep: " + " ".join(f"{value:.4f}" for value in plan.history))
        mean = sum(plan.values.values()) / len(plan.values)
        text += f"{len(plan.labels)} spaces with a mean match of {mean:.3f}, "
    options.settings().say(text + f"{len(layout)} tensors in {request.output}, {seconds:.1f} s")
