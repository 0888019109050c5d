"""``mudsc-fast calibrate``: checkpoints and inputs in, activation statistics out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from mudsc_fast.cli import options, processes, work


@click.command(short_help="Record activation statistics for merge.")
@options.checkpoints("A B [C...]")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="Where to write the statistics, for 'mudsc-fast merge --stats'.",
)
@click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Inputs, one a row: a .npy file, or a .safetensors file with one tensor for each argument of the model.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Instead of --inputs: a text file, one text a line, for Hugging Face folders with a tokenizer.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Instead of --inputs: a folder of image files, for Hugging Face folders of vision models.",
)
@click.option(
    "--max-length", default=128, show_default=True, type=click.IntRange(min=1), help="With --text: tokens of a line."
)
@options.model
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(min=1), help="Rows a batch.")
@click.option(
    "--scope",
    type=click.Choice(["full", "cross"]),
    default="full",
    show_default=True,
    help="full: also similarities inside each model, which zip needs. cross: between models, enough for align and half "
    "the work.",
)
@work.max_memory
@options.device
@options.spec
@options.force
@options.allow_torch_load
@options.quiet
@options.debug
def calibrate(
    checkpoints: tuple[Path, ...],
    output: Path,
    inputs: Path | None,
    text: Path | None,
    images: Path | None,
    max_length: int,
    model_path: str | None,
    batch_size: int,
    scope: str,
    max_memory: str | None,
    device: str,
    spec_from: str,
    heads: int | None,
    groups: int | None,
    force: bool,
    allow_torch_load: bool,
) -> None:
    """Record the activation statistics of two or more checkpoints on the same inputs.

    The inputs need no labels; a few hundred to a few thousand rows of the data that the merged network will see are
    enough. Give the checkpoints in the order in which they will be merged; merge refuses another one.

    \b
    A network of your own, built by the function `build` in net.py:
      mudsc-fast calibrate a.safetensors b.safetensors --model net:build \\
          --inputs images.npy -o stats.safetensors
    Hugging Face folders of a language model, or of a vision model:
      mudsc-fast calibrate a/ b/ --text lines.txt -o stats.safetensors
      mudsc-fast calibrate a/ b/ --images photos/ -o stats.safetensors
    Hugging Face folders, with pixel_values, or input_ids and attention_mask,
    in inputs.safetensors:
      mudsc-fast calibrate a/ b/ --inputs inputs.safetensors -o stats.safetensors
    """
    if len(checkpoints) < 2:
        raise click.UsageError(f"expected two or more checkpoints, got {len(checkpoints)}")
    source = inputs or text or images
    if source is None or len([x for x in (inputs, text, images) if x is not None]) > 1:
        raise click.UsageError("give one of --inputs FILE, --text FILE and --images DIR")
    # Before models are loaded, which may take minutes.
    flag, kind = ("--images", "folder") if images else ("--text" if text else "--inputs", "file")
    if not source.exists():
        raise FileNotFoundError(f"{flag}: no such {kind}: {source}")
    import torch

    from mudsc_fast import calibration
    from mudsc_fast.cli.inputs import Batches
    from mudsc_fast.cli.models import build_model
    from mudsc_fast.cli.origins import ORIGINS, digests
    from mudsc_fast.cli.specs import find_spec
    from mudsc_fast.cli.texts import ImageBatches, TextBatches
    from mudsc_fast.records import write_record
    from mudsc_fast.specs import spec_for
    from mudsc_fast.stats_files import calibrate_to_file

    settings = options.settings()
    start = time.perf_counter()
    where = options.as_device(device)
    world = processes.join()
    options.check_record(output, "--output", [*checkpoints, source], force)
    opened = options.open_all(checkpoints, allow_torch_load)
    models = [build_model(checkpoint, model_path) for checkpoint in opened]
    batches: Batches | TextBatches | ImageBatches
    if text is not None:
        batches = TextBatches(text, batch_size, opened[0], max_length)
    elif images is not None:
        dtype = next((p.dtype for p in models[0].parameters() if p.is_floating_point()), torch.float32)
        batches = ImageBatches(images, batch_size, opened[0], dtype)
    else:
        batches = Batches(source, batch_size, models[0])
    if model_path is not None and spec_from == "auto":
        spec = spec_for(models[0], heads=heads, groups=groups)
    else:
        spec = find_spec(opened[0], spec_from, heads, groups)
    about = {ORIGINS: digests(opened)}
    limit = work.limit_of(max_memory)
    if limit is not None:
        with _naming(flag, source, batches):
            spaces, passes = calibrate_to_file(
                models, batches, spec, output, limit, scope, where, not settings.quiet, world, about
            )
        settings.say(
            f"calibrated {len(models)} checkpoints on {batches.rows} rows in {passes} passes: {spaces} of "
            f"{len(spec.spaces)} spaces in {output}, {time.perf_counter() - start:.1f} s"
        )
        return
    with _naming(flag, source, batches):
        stats = calibration.calibrate(
            models, batches, spec, scope=scope, device=where, progress=not settings.quiet, group=world
        )
    tensors, header = stats.parts()
    save = partial(write_record, output, calibration.KIND, tensors, {**header, **about})
    if world is None:
        save()
    else:
        world.first(save)
    settings.say(
        f"calibrated {len(models)} checkpoints on {batches.rows} rows: {len(stats)} of {len(spec.spaces)} spaces in "
        f"{output}, {time.perf_counter() - start:.1f} s"
    )


@contextmanager
def _naming(flag: str, source: Path, batches: Any) -> Iterator[None]:
    """Errors of the networks themselves name the inputs: mostly these have another shape than the network takes."""
    try:
        yield
    except RuntimeError as error:
        first = next(iter(batches))
        named = first if isinstance(first, dict) else {"a batch": first}
        shapes = ", ".join(f"{name} of shape {tuple(x.shape)}" for name, x in named.items())
        raise RuntimeError(f"{flag} {source}: with {shapes}: {error}") from error
