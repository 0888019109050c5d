"""What a merge did, written while it runs: enough for a report, also of a run that did not finish."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mudsc_fast.plan import MergePlan

RUN_FILE, PLAN_FILE = "run.json", "plan.safetensors"
_VERSION = 1


@dataclass
class RunRecord:
    """One merge. Paths are as they were given, relative ones to `folder`.

    status: "running" until it is "done" or "failed"; a record that still says "running" is of a run that was killed.
    """

    command: list[str]
    folder: str
    inputs: list[str]
    output: str
    options: dict[str, Any]
    stats: str | None = None
    status: str = "running"
    error: str | None = None
    seconds: float | None = None
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))
    version: str = ""
    torch: str = ""

    def resolve(self, path: str) -> Path:
        """The path as seen from the folder of the run."""
        return Path(self.folder, path)


def write_run(
    folder: Path, record: RunRecord, plan: MergePlan | None = None, about: Mapping[str, Any] | None = None
) -> None:
    """Write the record, and the plan once there is one, into an existing folder; each file whole or not at all.

    about: what else the plan's header says.
    """
    if plan is not None:
        plan.save(folder / PLAN_FILE, about)
    part = folder / f".{RUN_FILE}.part"
    part.write_text(json.dumps({"format": _VERSION, **vars(record)}, indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / RUN_FILE)


def read_run(folder: Path) -> tuple[RunRecord, MergePlan | None]:
    """The record and, if the run came that far, the plan; ValueError or FileNotFoundError if there is no such run."""
    path = folder / RUN_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no run here: {RUN_FILE} is missing ('mudsc-fast merge --record' writes it)")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    if not isinstance(given, Mapping) or given.get("format") != _VERSION:
        raise ValueError(f"{path}: not the record of a run that this version can read")
    try:
        record = RunRecord(**{key: value for key, value in given.items() if key != "format"})
    except TypeError as error:
        raise ValueError(f"{path}: not the record of a run: {error}") from error
    return record, MergePlan.load(folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else None
