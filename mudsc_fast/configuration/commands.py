"""Schemas of configuration files, made from the commands themselves: a key is an option without its dashes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import click
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, create_model

from mudsc_fast.configuration.mergekit import MudscSection

# Of the command line alone.
LEFT_OUT = ("config", "print_config", "help")


def _text(value: Any) -> Any:
    """Numbers, and lists of them, as the command line writes them: 1.5 and "1,0.5"."""
    if isinstance(value, list | tuple) and all(isinstance(v, int | float | str) for v in value):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


_ANY = {"anyOf": [{"type": "string"}, {"type": "number"}, {"type": "array", "items": {"type": "number"}}]}
_Text = Annotated[str, BeforeValidator(_text), WithJsonSchema(_ANY)]


def key_of(parameter: click.Parameter) -> str:
    """The key that stands for a parameter: its first long option, or the argument's name."""
    return str(parameter.name) if isinstance(parameter, click.Argument) else _long(parameter)[2:].replace("-", "_")


def _long(parameter: click.Parameter) -> str:
    return next((option for option in parameter.opts if option.startswith("--")), parameter.opts[0])


def parameters_of(command: click.Command) -> dict[str, click.Parameter]:
    """{key: parameter} of all that a configuration file may say."""
    return {key_of(p): p for p in command.params if key_of(p) not in LEFT_OUT}


def schema_of(command: click.Command) -> type[BaseModel]:
    """The schema of a command's configuration files; all keys are optional, since flags may give the rest."""
    fields: dict[str, Any] = {
        "option_command": (
            Literal[command.name] | None,
            Field(None, alias="command", description=f"The command that this file is for: {command.name}."),
        )
    }
    for key, parameter in parameters_of(command).items():
        about = getattr(parameter, "help", None) or f"The command's {parameter.human_readable_name}."
        # An own prefix: a field must not be called "json" or "copy", which pydantic's models have themselves.
        told = Field(None, alias=key, description=" ".join(about.split()))
        fields[f"option_{key}"] = (_type_of(parameter) | None, told)
    made: type[BaseModel] = create_model(
        f"{str(command.name).capitalize()}Config",
        __config__=ConfigDict(extra="forbid"),
        __doc__=command.get_short_help_str(200),
        **fields,
    )
    return made


def value_of(config: BaseModel, key: str) -> Any:
    """What a configuration says for this key; None if nothing."""
    return getattr(config, f"option_{key}")


def _type_of(parameter: click.Parameter) -> Any:
    one = _one_of(parameter)
    many = parameter.nargs == -1 or getattr(parameter, "multiple", False)
    return list[one] if many else one  # type: ignore[valid-type]


def _one_of(parameter: click.Parameter) -> Any:
    kind = parameter.type
    if getattr(parameter, "is_flag", False) or isinstance(kind, click.types.BoolParamType):
        return bool
    if isinstance(kind, click.Choice):
        return Literal[tuple(kind.choices)]
    if isinstance(kind, click.IntRange | click.FloatRange):
        base: Any = int if isinstance(kind, click.IntRange) else float
        limits: dict[str, Any] = {"gt" if kind.min_open else "ge": kind.min, "lt" if kind.max_open else "le": kind.max}
        limits = {name: limit for name, limit in limits.items() if limit is not None}
        return Annotated[base, Field(**limits)]
    if isinstance(kind, click.types.IntParamType):
        return int
    if isinstance(kind, click.types.FloatParamType):
        return float
    return _Text if isinstance(kind, click.types.StringParamType) else str


def arguments_of(command: click.Command, config: BaseModel, given: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(options, positionals) that say what the configuration says, except for parameters that are given already.

    given: {parameter name: value} from the command line.
    """
    options: list[str] = []
    positionals: list[str] = []
    for key, parameter in parameters_of(command).items():
        value = value_of(config, key)
        if value is None or given.get(str(parameter.name)) not in (None, (), [], 0, False):
            continue
        if isinstance(parameter, click.Argument):
            positionals += [str(v) for v in value] if isinstance(value, list) else [str(value)]
        else:
            options += list(_flags(parameter, value))
    return options, positionals


def _flags(parameter: click.Parameter, value: Any) -> Iterator[str]:
    name = _long(parameter)
    if isinstance(value, bool):
        if value:
            yield name
        elif parameter.secondary_opts:
            yield parameter.secondary_opts[0]
    else:
        for each in value if isinstance(value, list) else [value]:
            yield f"{name}={each}"


def whole(command: click.Command, values: Mapping[str, Any]) -> dict[str, Any]:
    """{key: value} of everything that a run of the command is given, defaults included, ready for YAML."""
    result: dict[str, Any] = {"command": command.name}
    for key, parameter in parameters_of(command).items():
        value = values.get(str(parameter.name))
        if isinstance(value, tuple | list):
            result[key] = [_plain(v) for v in value]
        else:
            result[key] = _plain(value)
    return result


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def json_schema(commands: Sequence[click.Command]) -> dict[str, Any]:
    """One JSON schema for the configuration files of all these commands, told apart by their key ``command``."""
    definitions: dict[str, Any] = {}
    for command in commands:
        schema = schema_of(command).model_json_schema()
        definitions.update(schema.pop("$defs", {}))
        schema["properties"]["command"] = {"const": command.name}
        schema["required"] = ["command"]
        definitions[str(command.name)] = schema
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mudsc-fast configuration",
        "oneOf": [{"$ref": f"#/$defs/{command.name}"} for command in commands],
        "$defs": definitions,
    }


def mudsc_schema() -> dict[str, Any]:
    """The JSON schema of a mergekit configuration with a ``mudsc:`` section; mergekit's own keys are not checked."""
    section = MudscSection.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mergekit configuration with a mudsc section",
        "type": "object",
        "required": ["merge_method"],
        "properties": {"mudsc": section},
    }
