"""Builds the driver with the AVX2 kernels, counts its instructions, and compares."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECORDED = HERE / "counts.json"
CASES = ("assign_unrelated", "assign_related", "assign_batch", "zip", "regroup_gather", "regroup_mean")
ALLOWED = 0.05
# The flags of CMakeLists.txt for kernels and for avx2; a test compares them.
KERNEL_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti")
ISA_FLAGS = ("-march=x86-64-v3",)
COMMON = ("-std=c++17", "-DNDEBUG", "-fPIC", f"-I{ROOT / 'csrc'}")
UPDATE = "python -m benchmarks.instructions --update"


def why_not() -> str | None:
    """What is missing on this machine, or None."""
    if os.uname().machine not in ("x86_64", "AMD64"):
        return "counts are of the AVX2 kernels"
    for tool in ("valgrind", compiler()):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    return None


def compiler() -> str:
    """The C++ compiler: $CXX or g++."""
    return os.environ.get("CXX", "g++")


def compiler_version() -> str:
    """The name and version by which counts are recorded."""
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def build(folder: Path) -> Path:
    """Compile the driver and one set of kernels; returns the program."""
    isa = ["-DMUDSC_ISA=avx2", '-DMUDSC_ISA_NAME="avx2"', *KERNEL_FLAGS, *ISA_FLAGS]
    plain = ["-O2", "-DMUDSC_FAST_ISAS=X(avx2)"]
    kernels = [(source, isa) for source in sorted((ROOT / "csrc/cpu/kernels").glob("*.cpp"))]
    others = [(source, plain) for source in [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), HERE / "driver.cpp"]]
    objects = []
    running = []
    for source, flags in kernels + others:
        objects.append(folder / f"{source.stem}_{len(objects)}.o")
        command = [compiler(), *COMMON, *flags, "-c", str(source), "-o", str(objects[-1])]
        running.append(subprocess.Popen(command))
        if len(running) >= 2 and running.pop(0).wait() != 0:
            raise RuntimeError("the driver of the instruction counts does not compile")
    if any(process.wait() != 0 for process in running):
        raise RuntimeError("the driver of the instruction counts does not compile")
    program = folder / "driver"
    subprocess.run([compiler(), *map(str, objects), "-pthread", "-o", str(program)], check=True)
    return program


def count(program: Path, case: str) -> int:
    """Instructions that one case executes inside ``measured``."""
    command = ["valgrind", "--tool=callgrind", "--toggle-collect=measured", "--callgrind-out-file=/dev/null"]
    ran = subprocess.run([*command, str(program), case], capture_output=True, text=True, check=False)
    found = re.search(r"Collected : (\d+)", ran.stderr)
    if ran.returncode != 0 or found is None:
        raise RuntimeError(f"{case}: callgrind failed: {ran.stderr[-500:]}")
    return int(found.group(1))


def recorded() -> dict[str, dict[str, int]]:
    """{compiler: {case: instructions}}."""
    found: dict[str, dict[str, int]] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    return found


def count_all() -> dict[str, int]:
    """Build, and count every case."""
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        return {case: count(program, case) for case in CASES}


def worse(now: dict[str, int], before: dict[str, int]) -> list[str]:
    """What needs more instructions than recorded, in words."""
    lines = []
    for case, instructions in now.items():
        if case not in before:
            lines.append(f"{case}: nothing recorded; run: {UPDATE}")
        elif instructions > before[case] * (1 + ALLOWED):
            more = instructions / before[case] - 1
            lines.append(
                f"{case}: {instructions:,} instructions, {more:.1%} more than {before[case]:,}; if meant: {UPDATE}"
            )
    return lines


def main(arguments: Sequence[str]) -> int:
    """Count and compare, or record; returns the exit code."""
    reason = why_not()
    if reason is not None:
        print(f"cannot count instructions here: {reason}")
        return 2
    version, table = compiler_version(), recorded()
    now = count_all()
    for case, instructions in now.items():
        print(f"{case:20s} {instructions:>15,}  recorded {table.get(version, {}).get(case, 0):>15,}")
    if "--update" in arguments:
        RECORDED.write_text(json.dumps({**table, version: now}, indent=1) + "\n")
        return 0
    if version not in table:
        print(f"nothing recorded for {version}; run: {UPDATE}")
        return 2
    problems = worse(now, table[version])
    for line in problems:
        print(line)
    return 1 if problems else 0
