"""``mudsc-fast mergekit``: mergekit's own command, on models that are matched first."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mudsc_fast.cli import options

if TYPE_CHECKING:
    from mudsc_fast.configuration.mergekit import MudscSection
    from mudsc_fast.configuration.reading import Document


class _WithMergekitsOptions(click.Command):
    """A command that takes mergekit's options beside its own; mergekit is imported when they are asked for."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from mudsc_fast.adapters.mergekit import need_mergekit

        if ctx.resilient_parsing:  # completion: too quick for an import of seconds
            return super().get_params(ctx)
        need_mergekit()
        from mergekit.options import add_merge_options

        theirs: Any = add_merge_options(lambda merge_options: merge_options)
        ctx.meta["mudsc_fast.merge_options"] = theirs
        own = super().get_params(ctx)
        taken = {option for parameter in own for option in parameter.opts}
        offered = [parameter for parameter in theirs.__click_params__[::-1] if not taken & set(parameter.opts)]
        return [*own[:-1], *offered, own[-1]]


@click.command(cls=_WithMergekitsOptions, short_help="Run mergekit on models that are matched first.")
@click.argument("config", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path, file_okay=False))
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, and write nothing.")
@options.force
@options.debug
def mergekit(config: Path, output: Path, dry_run: bool, force: bool, **theirs: Any) -> None:
    """Run mergekit on models whose units are matched first.

    CONFIG is an ordinary mergekit configuration, OUT a folder. Every model is matched to the base model, or to the
    first one, and its tensors are regrouped as mergekit reads them; nothing aligned is written. A passthrough merge is
    left alone. A section 'mudsc:' in CONFIG says how to match; without one it is by weights:

    \b
      mudsc:
        balance: 0.5            # share of the weights in the similarity
        calibration: text.txt   # text for the activations
        spaces: ["*.mlp"]       # only these
        leave: [other/model]    # merge these as they are

    \b
    Example:
      mudsc-fast mergekit config.yml merged --random-seed 1

    All other options are mergekit's own.
    """
    from mergekit.config import MergeConfiguration

    from mudsc_fast.adapters.mergekit import models_of, run_merge

    start = time.perf_counter()
    merge_options = click.get_current_context().meta["mudsc_fast.merge_options"](**theirs)
    settings = options.settings()
    settings.quiet = settings.quiet or merge_options.quiet
    merge_options.apply_global_options()
    document, section = read_config(config)
    plain = {key: value for key, value in document.data.items() if key != "mudsc"}
    _check_keys(document, MergeConfiguration, plain)
    try:
        merge_config = MergeConfiguration.model_validate(plain)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{config}: mergekit: {error}") from error
    for model in models_of(merge_config):
        if model.model.path.startswith(("/", "./", "../")) and not Path(model.model.path).is_dir():
            raise ValueError(f"model {model}: cannot be opened: no such folder: {model.model.path}")
        if output.exists() and Path(model.model.path).exists() and output.samefile(model.model.path):
            raise ValueError(f"OUT: {output} is an input")
    if dry_run:
        _say_what_would_be_done(merge_config, merge_options, section)
        return
    source = config.read_text(encoding="utf-8")
    with whole_folder(output, force) as folder:
        found = run_merge(merge_config, str(folder), merge_options, source, section, settings.say)
    how = f"{len(found)} models matched" if found else "nothing to match"
    settings.say(f"merged with mergekit ({merge_config.merge_method}, {how}) in {output}, {_seconds(start)}")


def _check_keys(document: Document, schema: Any, plain: Any) -> None:
    """ValueError for keys that look like mistyped ones; a note on others, which mergekit ignores without a word."""
    found = list(document.strangers(schema, plain))
    mistyped = [text for text, close in found if close]
    if mistyped:
        raise ValueError("\n".join(mistyped))
    for text, _ in found:
        options.settings().say(f"note: {text}; mergekit ignores it")


def _say_what_would_be_done(config: Any, merge_options: Any, section: MudscSection) -> None:
    from mudsc_fast.adapters.mergekit import prepare
    from mudsc_fast.workplan import in_words

    prepared = prepare(config, merge_options, section)
    if prepared is None:
        click.echo(f"would run mergekit's {config.merge_method} with nothing matched")
        return
    base = prepared.base
    for source, spec in zip(prepared.others, prepared.specs, strict=True):
        widest = max(space.width for space in spec.spaces)
        click.echo(
            f"would match {source.model} to {base.model}: {len(spec.spaces)} spaces, the widest of {widest} units "
            f"(similarities of {in_words(4 * widest**2)}), reading {in_words(source.checkpoint.nbytes)}"
        )
    size = in_words(base.checkpoint.nbytes)
    click.echo(f"would then run mergekit's {config.merge_method}, writing about {size}")


def read_config(path: Path) -> tuple[Document, MudscSection]:
    """A mergekit configuration and its ``mudsc:`` section, checked."""
    from mudsc_fast.configuration.mergekit import MudscSection
    from mudsc_fast.configuration.reading import Document

    document = Document(path.read_text(encoding="utf-8"), str(path))
    return document, document.validate(MudscSection, document.data.get("mudsc") or {}, ("mudsc",))


@contextmanager
def whole_folder(output: Path, force: bool) -> Iterator[Path]:
    """A folder of the same name to write into, which takes the place of `output` if the block ends well."""
    if output.exists() and any(output.iterdir()) and not force:
        raise FileExistsError(f"OUT: {output} exists already and is not empty (--force replaces it)")
    output = output.resolve()
    if not output.parent.is_dir():
        raise FileNotFoundError(f"OUT: the folder {output.parent} does not exist")
    parent = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent))
    try:
        inside = parent / output.name
        yield inside
        aside = parent / ".old"
        if output.exists():
            output.rename(aside)
        try:
            os.replace(inside, output)
        except BaseException:
            if aside.exists():
                aside.rename(output)
            raise
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def _seconds(start: float) -> str:
    return f"{time.perf_counter() - start:.1f} s"
