"""The work of ``mudsc-fast merge`` and ``align`` step by step: open checkpoints, find the match, write, sum it up."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mudsc_fast.cli import huggingface, options, work
from mudsc_fast.cli.card import model_card
from mudsc_fast.cli.origins import ORIGINS, check_origins, digests
from mudsc_fast.cli.progress import track
from mudsc_fast.cli.specs import find_spec
from mudsc_fast.cli.verifying import check_law

if TYPE_CHECKING:
    import torch

    from mudsc_fast.arguments import Width
    from mudsc_fast.averaging import Piece
    from mudsc_fast.checkpoints import Checkpoint, StackedCheckpoint, TensorInfo
    from mudsc_fast.cli.requesting import Request
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


def prepare(request: Request, device: torch.device, world: World | None) -> Job:
    from mudsc_fast.plan import MergePlan
    from mudsc_fast.spec import PermutationSpec
    from mudsc_fast.workplan import plan_work

    limit = work.limit_of(request.max_memory)
    opened = options.open_all(request.checkpoints, request.allow_torch_load, device)
    for flag, file in (("--stats", request.stats), ("--plan", request.plan_from)):
        if file is not None:
            check_origins(flag, file, opened)
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


def find_plan(job: Job) -> tuple[MergePlan, dict[str, str]]:
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

        choose = partial(
            elastic_widths,
            job.states,
            job.spec,
            stats,
            request.width_budget,
            "zip",
            progress=not options.settings().quiet,
        )
        # Of several processes one chooses: a float that rounds otherwise on another machine would choose other widths.
        width = choose() if job.world is None else job.world.first(choose)
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
        save = partial(plan.save, request.save_plan, {ORIGINS: digests(job.opened)})
        save() if job.world is None else job.world.first(save)
    return plan, about


def _check_law(job: Job) -> None:
    check = partial(check_law, job.spec, job.states[0], job.request.verify, small=job.limit is not None)
    check() if job.world is None else job.world.first(check)


def merged_layout(plan: MergePlan, layout: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
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


def write(
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


def summarise(
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
