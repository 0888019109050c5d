"""YAML read together with the line of every key, and errors that name it."""

from __future__ import annotations

import collections.abc
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

Path = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


class Document:
    """A YAML document: its data, and the line that each key or list entry stands on.

    text: YAML. name: what errors call it (a file's path). ValueError, with the line, for text that is no YAML, a key
    that stands twice, or a top level that is no mapping.
    """

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self._lines: dict[Path, int] = {}
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            data: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = name if mark is None else f"{name}:{mark.line + 1}"
            raise ValueError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
        except RecursionError as error:
            raise ValueError(f"{name}: not YAML that can be read: nested too deeply") from error
        if not isinstance(data, dict):
            raise ValueError(f"{name}: expected keys and values at the top level, got {_kind(data)}")
        self.data: dict[str, Any] = data
        self._walk(node, ())

    def _walk(self, node: Any, path: Path) -> None:
        self._lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if key.value in seen:
                    raise ValueError(f"{self.name}:{key.start_mark.line + 1}: the key {key.value!r} stands twice")
                seen.add(key.value)
                below = (*path, key.value)
                self._lines[below] = key.start_mark.line + 1
                self._walk(value, below)
        elif isinstance(node, yaml.SequenceNode):
            for k, value in enumerate(node.value):
                self._walk(value, (*path, k))

    def where(self, path: Sequence[str | int]) -> str:
        """``file:line`` of the deepest part of the path that is in the document."""
        line = self._line(path)
        return f"{self.name}:{line}" if line else self.name

    def _line(self, path: Sequence[str | int]) -> int:
        """The line of the deepest part of the path that is in the document; 0 if none is."""
        known = (self._lines.get(tuple(path[:length])) for length in range(len(path), -1, -1))
        return next((line for line in known if line is not None), 0)

    def validate(self, schema: type[Model], data: Any, at: Path = ()) -> Model:
        """`data`, which stands at the path `at`, as the schema's model; ValueError with one line a mistake."""
        if not isinstance(data, Mapping):
            raise ValueError(f"{self.where(at)}: {_dotted(at)}: expected keys and values, got {_kind(data)}")
        try:
            return schema.model_validate(data)
        except ValidationError as error:
            problems = sorted(error.errors(), key=lambda problem: self._line((*at, *problem["loc"])))
            raise ValueError("\n".join(self._explain(problem, schema, at) for problem in problems)) from error

    def strangers(self, schema: type[BaseModel], data: Any, at: Path = ()) -> Iterator[tuple[str, bool]]:
        """(what to say, whether a valid key is close) of every key that the schema, which may ignore it, lacks."""
        if not isinstance(data, Mapping):
            return
        fields = {field.alias or name: field for name, field in schema.model_fields.items()}
        for key, value in data.items():
            path = (*at, key)
            if key not in fields:
                close = difflib.get_close_matches(str(key), list(fields), n=1)
                advice = _nearest(str(key), list(fields))
                yield f"{self.where(path)}: {_dotted(path)}: unknown key; {advice}", bool(close)
                continue
            inner = _parts(fields[key].annotation)
            if inner is not None and isinstance(value, list):
                for k, part in enumerate(value):
                    yield from self.strangers(inner, part, (*path, k))
            elif inner is not None:
                yield from self.strangers(inner, value, path)

    def _explain(self, problem: Any, schema: type[BaseModel], at: Path) -> str:
        path: Path = (*at, *problem["loc"])
        if problem["type"] == "extra_forbidden":
            advice = _nearest(str(path[-1]), _keys(schema, problem))
            return f"{self.where(path)}: {_dotted(path)}: unknown key; {advice}"
        if problem["type"] == "missing":
            return f"{self.where(path)}: {_dotted(path)}: missing"
        told = problem["msg"].removeprefix("Value error, ")
        # pydantic names the members of a union in the path; only what is in the document helps the reader.
        shown = path
        while len(shown) > len(at) and tuple(shown) not in self._lines:
            shown = shown[:-1]
        value = problem["input"]
        got = "" if isinstance(value, dict | list) else f", got {value!r}"
        return f"{self.where(path)}: {_dotted(shown) + ': ' if shown else ''}{told}{got}"


def _keys(schema: type[BaseModel], problem: Any) -> list[str]:
    """The valid keys of the part of the schema in which an unknown key stands."""
    found: Any = schema
    for step in problem["loc"][:-1]:
        by_key = {field.alias or name: field for name, field in found.model_fields.items()}
        if isinstance(step, str) and step in by_key:
            inner = _models(by_key[step].annotation)
            if len(inner) != 1:
                return []
            found = inner[0]
    return [field.alias or name for name, field in found.model_fields.items()]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]


def _parts(annotation: Any) -> type[BaseModel] | None:
    """The one model that a value, or each entry of a list, has to be; None for mappings and for several models."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (dict, collections.abc.Mapping):
        return None
    found = {part for argument in get_args(annotation) if (part := _parts(argument)) is not None}
    return found.pop() if len(found) == 1 else None


def _nearest(key: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid keys: {', '.join(valid)}"


def _dotted(path: Path) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
