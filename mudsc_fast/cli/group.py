"""The group of all commands: options that every command has, and configuration files in place of flags."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from mudsc_fast.cli.options import Settings
from mudsc_fast.progress import styled

# These read a file of their own, or nothing that a file could say.
_WITHOUT_CONFIG = ("mergekit", "schema", "completion", "doctor", "info", "run")
_WITH_OWN_THREADS = ("mergekit", "schema", "completion", "info", "run")


def _set(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if not value or not parameter.name:
        return
    setattr(context.ensure_object(Settings), parameter.name, value)
    if parameter.name == "log_format" and value == "json":
        context.with_resource(styled("json"))
    if parameter.name == "threads" and not context.resilient_parsing:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(value)
        context.call_on_close(lambda: torch.set_num_threads(before))


def _common(name: str) -> list[click.Parameter]:
    """Options that every command has; fresh objects, since click keeps state in them."""
    found: list[click.Parameter] = []
    if name not in _WITHOUT_CONFIG:
        found += [
            click.Option(
                ["--config"],
                type=click.Path(path_type=Path),
                metavar="FILE.yml",
                expose_value=False,
                help="Options from a YAML file, by their names without dashes; flags go before them.",
            ),
            click.Option(["--print-config"], is_flag=True, expose_value=False, help="Show all options, and end."),
        ]
    if name not in _WITH_OWN_THREADS:
        found += [
            click.Option(
                ["--threads"],
                type=click.IntRange(min=1),
                metavar="N",
                expose_value=False,
                callback=_set,
                help="Threads for the CPU kernels.  [default: torch's]",
            ),
            click.Option(
                ["-v", "--verbose"], is_flag=True, expose_value=False, callback=_set, help="Say more about the run."
            ),
        ]
    found.append(
        click.Option(
            ["--log-format"],
            type=click.Choice(["text", "json"]),
            expose_value=False,
            callback=_set,
            help="json: what is said on stderr as one JSON object a line, progress too.",
        )
    )
    return found


class Commands(click.Group):
    """A group whose commands take ``--config FILE`` and the options that all have."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Register a command, with the options that all commands have."""
        taken = {option for parameter in cmd.params for option in parameter.opts}
        cmd.params += [p for p in _common(str(cmd.name)) if not taken & set(p.opts)]
        super().add_command(cmd, name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command and its arguments, those of its configuration file among them."""
        if args and args[0] == "run" and len(args) > 1 and not args[1].startswith("-"):
            args = _of_file(args[1], args[2:])
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not ctx.resilient_parsing and any(_is(arg, "--config") for arg in rest):
            rest = _expanded(ctx, command, rest)
        if command is not None and "--print-config" in rest and str(command.name) not in _WITHOUT_CONFIG:
            _print_config(ctx, command, [arg for arg in rest if arg != "--print-config"])
        return name, command, rest


def _is(argument: str, option: str) -> bool:
    return argument == option or argument.startswith(f"{option}=")


def configured(ctx: click.Context) -> list[click.Command]:
    """The commands that take configuration files."""
    root: Any = ctx.find_root().command
    return [command for name, command in sorted(root.commands.items()) if name not in _WITHOUT_CONFIG]


def _of_file(path: str, rest: Iterable[str]) -> list[str]:
    """``run FILE`` as the command that the file is for."""
    from mudsc_fast.configuration.reading import Document

    document = Document(_read(path), path)
    command = document.data.get("command")
    if not isinstance(command, str):
        if "merge_method" in document.data:
            raise ValueError(f"{path}: a configuration of mergekit's: 'mudsc-fast mergekit {path} OUT' runs it")
        raise ValueError(f"{path}: command: missing; 'mudsc-fast run' needs it, such as 'command: merge'")
    return [command, "--config", path, *rest]


def _read(path: str) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config: no such file: {path}")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error})") from error


def _parsed(ctx: click.Context, command: click.Command, args: list[str]) -> dict[str, Any]:
    """What the command line says, unconverted: {parameter name: value}."""
    with click.Context(command, info_name=command.name, parent=ctx, resilient_parsing=True) as inner:
        opts, _, _ = command.make_parser(inner).parse_args(list(args))
    return {name: value for name, value in opts.items() if not _unset(value)}


def _unset(value: Any) -> bool:
    return value is None or value == () or type(value).__name__ == "Sentinel"


def _expanded(ctx: click.Context, command: click.Command, args: list[str]) -> list[str]:
    from mudsc_fast.configuration.commands import arguments_of, parameters_of, schema_of
    from mudsc_fast.configuration.reading import Document

    given = _parsed(ctx, command, args)
    path = given.get("config")
    if not isinstance(path, str):  # click says what is wrong with it
        return args
    document = Document(_read(path), path)
    config: Any = document.validate(schema_of(command), document.data)
    options, positionals = arguments_of(command, config, given)
    lines = {
        f"--{key.replace('_', '-')}": document.where((key,)) for key in parameters_of(command) if key in document.data
    }
    ctx.ensure_object(Settings).config_lines.update(lines)
    return [*args, *options, *positionals]


def _print_config(ctx: click.Context, command: click.Command, args: list[str]) -> None:
    import yaml

    from mudsc_fast.configuration.commands import schema_of, value_of, whole

    values = {str(p.name): _default(ctx, p) for p in command.params} | _parsed(ctx, command, args)
    everything = whole(command, values)
    # through the schema, which turns what the command line wrote into numbers
    typed: Any = schema_of(command).model_validate({k: v for k, v in everything.items() if v is not None})
    shown = {key: value_of(typed, key) for key in everything}
    click.echo(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).rstrip())
    ctx.exit(0)


def _default(ctx: click.Context, parameter: click.Parameter) -> Any:
    value = parameter.get_default(ctx)
    return None if _unset(value) else value
