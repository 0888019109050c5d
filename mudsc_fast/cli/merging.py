"""``mudsc-fast merge`` and ``mudsc-fast align``: checkpoints in, one checkpoint out."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from mudsc_fast.cli import options, processes, requesting
from mudsc_fast.cli.jobs import Stream, find_plan, merged_layout, prepare, summarise, write
from mudsc_fast.cli.recording import Note, recorded
from mudsc_fast.cli.refitting import Refit, Refitted
from mudsc_fast.cli.refitting import refit as refit_options
from mudsc_fast.cli.requesting import Request

if TYPE_CHECKING:
    import torch

    from mudsc_fast.distributed import World


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
@requesting.matching
@click.option(
    "--weights", callback=requesting.parse_weights, metavar="1,1", help="Share of each checkpoint in the average."
)
@click.option(
    "--width",
    callback=requesting.parse_width,
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
@requesting.record
@requesting.running
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
        return prepare(request, device, world).show()
    if world is not None and world.rank:
        request = replace(request, record=None)
    with recorded(request) as note:
        _merge(request, device, note, world, start)


def _merge(request: Request, device: torch.device, note: Note, world: World | None, start: float) -> None:
    job = prepare(request, device, world)
    stream: Stream
    if request.method == "average":
        from mudsc_fast.averaging import check_weights, merge_pieces

        shares = check_weights(request.weights, len(job.states))
        plan, about, layout = None, {"method": "average"}, job.layout
        stream = partial(merge_pieces, job.spec, {}, {}, job.states, shares, job.piece)
    else:
        plan, about = find_plan(job)
        stream = partial(plan.merge_pieces, job.states, request.weights, job.piece)
        layout = merged_layout(plan, job.layout)
        if request.refit is not None:
            stream = Refitted(request.refit, job.states, job.opened, plan, device)
            about["refit"] = ", ".join(f"{key} {value}" for key, value in request.refit.described().items())
    if request.weights is not None:
        about["weights"] = ",".join(f"{w:g}" for w in request.weights)
    note(about, plan, job.opened)
    write("merged", job, stream, layout, 0, about, plan)
    summarise("merged", request, plan, about, layout, time.perf_counter() - start)


@click.command(short_help="Put one checkpoint into the unit order of another.")
@options.checkpoints("A B")
@options.output
@requesting.matching
@requesting.running
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
    job = prepare(request, device, world)
    if request.dry_run:
        return job.show()
    plan, about = find_plan(job)
    layout = job.states[1].layout
    write("aligned", job, partial(plan.align_pieces, job.states[1], 1, job.piece), layout, 1, about, plan)
    summarise("aligned", request, plan, about, layout, time.perf_counter() - start)
