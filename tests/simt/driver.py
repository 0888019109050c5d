"""Builds the CUDA sources against the emulator and runs cases through their launchers.

A build is kept under build/simt by the hash of all that goes into it. Modes:
    plain    any schedule, the bits that come out
    asan     AddressSanitizer and UBSan: steps beyond memory, misaligned vectors
    tsan     ThreadSanitizer with every CUDA thread announced: order that no barrier gives
and the same with "-mutants" behind: sources whose deliberate faults (mutants.py) can be switched on by number.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import resource
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = ROOT / "tests" / "simt"
EMULATOR = ("schedule", "fibers", "blocks", "collectives", "runtime")
KERNELS = ("regroup", "zip", "assign")
POLICIES = ("uniform", "by warp", "by thread", "newest first", "oldest first", "by block")
REGROUP, ZIP, ASSIGN, TOY = range(4)
FOUND_RACE, FOUND_FAULT, REFUSED = 66, 67, 70  # exit codes: TSan, ASan and UBSan, the emulator itself

_FLAGS = {
    "plain": ["-O1"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-fsanitize=thread"],
}
_COMMON = ["-std=c++17", "-g1", "-fno-strict-aliasing", "-fno-omit-frame-pointer", "-Wall", "-Wextra", "-Werror"]
_QUIET = ["-Wno-unknown-pragmas", "-Wno-tsan"]


def why_not() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        return "the CUDA emulator needs Linux on x86-64"
    if shutil.which(compiler()) is None:
        return f"the CUDA emulator needs a C++ compiler; {compiler()} was not found"
    return None


def compiler() -> str:
    return os.environ.get("CXX", "g++")


@dataclass
class Case:
    """One call of a launcher. Arrays are changed in place by ``run``."""

    op: int
    integers: Sequence[int]
    arrays: list[np.ndarray]
    reals: Sequence[float] = ()
    seed: int = 0
    policy: int = 0
    multiprocessors: int = 2
    mutant: int = -1
    device: int = 0
    fail_call: str = ""
    fail_code: int = 0
    error: str = field(default="", init=False)

    def packed(self) -> bytes:
        settings = (self.op, self.seed, self.policy, self.multiprocessors, self.mutant, self.fail_code, self.device)
        parts = []
        for values, kind in ((settings, "q"), (self.integers, "q"), (self.reals, "d")):
            parts.append(struct.pack(f"<q{len(values)}{kind}", len(values), *values))
        call = self.fail_call.encode()
        parts.append(struct.pack("<q", len(call)) + call + struct.pack("<q", len(self.arrays)))
        for array in self.arrays:
            parts.append(struct.pack("<q", array.nbytes) + array.tobytes())
        return b"".join(parts)


@dataclass(frozen=True)
class Run:
    """How a run of the harness ended."""

    code: int
    output: str

    @property
    def ok(self) -> bool:
        return self.code == 0


def run(binary: Path, cases: Sequence[Case], timeout: float = 300, cpu_seconds: int = 0) -> Run:
    """Runs the cases in one process; fills their arrays and errors when it ends well.

    cpu_seconds: processor time after which it is ended, for kernels that may not end; 0: no limit.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "cases", Path(folder) / "results"
        source.write_bytes(struct.pack("<q", len(cases)) + b"".join(case.packed() for case in cases))
        command = [str(binary), str(source), str(result)]
        if shutil.which("setarch") is not None and "tsan" in binary.name:
            command = ["setarch", platform.machine(), "-R", *command]  # its shadow memory wants a fixed layout
        environment = {
            **os.environ,
            "ASAN_OPTIONS": f"detect_leaks=0:exitcode={FOUND_FAULT}",
            "UBSAN_OPTIONS": f"print_stacktrace=0:exitcode={FOUND_FAULT}",
            "TSAN_OPTIONS": f"halt_on_error=1:exitcode={FOUND_RACE}:report_signal_unsafe=0",
        }
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                env=environment,
                timeout=timeout,
                check=False,
                preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds)))
                if cpu_seconds
                else None,
            )
        except subprocess.TimeoutExpired:
            return Run(124, f"no end after {timeout:g} s")
        text = (done.stdout + done.stderr).decode(errors="replace")
        if done.returncode == 0:
            _unpack(result.read_bytes(), cases)
    return Run(done.returncode, text)


def _unpack(data: bytes, cases: Sequence[Case]) -> None:
    at = 0

    def take(length: int) -> bytes:
        nonlocal at
        at += length
        return data[at - length : at]

    def number() -> int:
        return int(struct.unpack("<q", take(8))[0])

    for case in cases:
        case.error = take(number()).decode()
        for k in range(number()):
            array = case.arrays[k]
            case.arrays[k] = np.frombuffer(take(number()), dtype=array.dtype).reshape(array.shape).copy()


# ---- building ----


def build(mode: str) -> Path:
    """The harness of a mode, compiled unless it is there already."""
    from simt import mutants

    kind, _, mutated = mode.partition("-")
    sources = {name: (ROOT / "csrc" / "cuda" / f"{name}.cu").read_text(encoding="utf-8") for name in KERNELS}
    if mutated:
        sources = {name: mutants.with_switches(name, text) for name, text in sources.items()}
    fixed = sorted([*HERE.glob("*.cpp"), *HERE.glob("*.cu"), *HERE.rglob("*.h"), *(ROOT / "csrc").rglob("*.h")])
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((mode, version, _FLAGS[kind], _COMMON, sources)).encode())
    for path in fixed:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "simt"
    folder.mkdir(parents=True, exist_ok=True)
    binary = folder / f"{mode}-{digest.hexdigest()[:16]}"
    with _locked(folder / f"{mode}.lock"):
        if not binary.exists():
            for old in folder.glob(f"{mode}-????????????????"):
                old.unlink()
            with tempfile.TemporaryDirectory(dir=folder) as work:
                _compile(kind, sources, Path(work), binary)
    return binary


def _compile(kind: str, sources: dict[str, str], work: Path, binary: Path) -> None:
    include = [f"-I{HERE / 'include'}", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
    common = [*_COMMON, *_QUIET, *include]
    objects = []
    told = ["-O2", *([f"-DSIMT_{kind.upper()}"] if kind != "plain" else [])]
    jobs = [(HERE / f"{name}.cpp", told) for name in EMULATOR]
    jobs += [(HERE / "harness.cpp", _FLAGS[kind]), (HERE / "toys.cu", _FLAGS[kind])]
    for name, text in sources.items():
        path = work / f"{name}.cu"
        path.write_text(text, encoding="utf-8")
        jobs.append((path, _FLAGS[kind]))
    for path, flags in jobs:
        objects.append(work / f"{path.stem}.o")
        _call([compiler(), *common, *flags, "-x", "c++", "-c", str(path), "-o", str(objects[-1])])
    unfinished = work / "harness"
    _call([compiler(), *_FLAGS[kind], *map(str, objects), "-o", str(unfinished)])
    os.replace(unfinished, binary)


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
