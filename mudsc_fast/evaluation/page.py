"""A report as one HTML file that needs nothing else: no script, no font, no picture from outside."""

from __future__ import annotations

import os
import shlex
from importlib import resources
from pathlib import Path

from mudsc_fast.evaluation.report import Report


def render(report: Report) -> str:
    """The page."""
    import jinja2

    source = resources.files("mudsc_fast.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    columns = list(dict.fromkeys(key for row in report.table for key in row))
    there = [row.name for row in report.models if row.missing is None]
    command = shlex.join(report.record.command)
    return environment.from_string(source).render(report=report, columns=columns, there=there, command=command)


def write_page(report: Report, path: Path) -> None:
    """Write the page, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(render(report), encoding="utf-8")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
