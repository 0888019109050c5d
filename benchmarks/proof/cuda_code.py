"""The machine code of every CUDA C++ kernel for every chip, compiled without a GPU and read back.

python -m benchmarks.proof.cuda_code prints one JSON list of records.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.proof import occupancy

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("regroup", "zip", "assign")
CHIPS = ("sm_80", "sm_90a", "sm_100")
# Warnings are errors, spills and local memory too.
FLAGS = (
    *("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin"),
    *("-Xcompiler", "-Wall,-Wextra", "--Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"),
)
THREADS = {"zip_kernel": 512, "assign_kernel": 32, "vectors_kernel": 256, "lines_kernel": 256}


def why_not() -> str | None:
    """Why nothing can be compiled or read here, or None."""
    if nvcc() is None:
        return "nvcc was not found (put it on PATH or set CUDACXX)"
    if _cuobjdump() is None:
        return "cuobjdump was not found (it comes with the CUDA toolkit and with the triton package)"
    return None


def nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@functools.cache
def version() -> str:
    """Such as "13.0"."""
    text = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found.group(1) if found else text.strip().splitlines()[-1]


def _cuobjdump() -> str | None:
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


def records(chips: Sequence[str] = CHIPS, sources: Sequence[str] = SOURCES, workers: int = 2) -> list[dict[str, Any]]:
    """One record for each kernel, instantiation and chip.

    Raises:
        RuntimeError: a source does not compile, or spills.
    """
    jobs = [(source, chip) for source in sources for chip in chips]
    with ThreadPoolExecutor(workers) as pool:
        return [record for found in pool.map(lambda job: _compiled(*job), jobs) for record in found]


def _compiled(source: str, chip: str) -> list[dict[str, Any]]:
    path = Path("csrc") / "cuda" / f"{source}.cu"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{source}.cubin"
        command = [str(nvcc()), *FLAGS, f"-arch={chip}", f"-I{ROOT / 'csrc'}", str(ROOT / path), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        dumped = subprocess.run([str(_cuobjdump()), "-sass", str(cubin)], capture_output=True, text=True, check=True)
    usage = _usage(done.stdout + done.stderr)
    code = _instructions(dumped.stdout)
    names = _demangled(list(usage))
    return [_record(names[symbol], path, chip, usage[symbol], code[symbol]) for symbol in usage]


def _usage(report: str) -> dict[str, dict[str, int]]:
    """What ptxas says of each entry function."""
    found: dict[str, dict[str, int]] = {}
    symbol = ""
    for line in report.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)'", line):
            symbol = entry.group(1)
            found[symbol] = {"registers": 0, "spills": 0, "stack": 0, "shared_bytes": 0}
        elif symbol and (stack := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", line)):
            found[symbol]["stack"] = int(stack.group(1))
            found[symbol]["spills"] = int(stack.group(2)) + int(stack.group(3))
        elif symbol and (used := re.search(r"Used (\d+) registers", line)):
            found[symbol]["registers"] = int(used.group(1))
            shared = re.search(r"(\d+) bytes smem", line)
            found[symbol]["shared_bytes"] = int(shared.group(1)) if shared else 0
    return found


def _instructions(dump: str) -> dict[str, list[str]]:
    """Each function's opcodes, in order."""
    found: dict[str, list[str]] = {}
    symbol = ""
    for line in dump.splitlines():
        if entry := re.search(r"Function : (\S+)", line):
            symbol = entry.group(1)
            found[symbol] = []
        elif opcode := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            found[symbol].append(opcode.group(1))
    return found


def _demangled(symbols: list[str]) -> dict[str, str]:
    """Readable names, such as "lines_kernel<Move<unsigned int>, 4>"; the symbols where c++filt is missing."""
    tool = shutil.which("c++filt") or shutil.which("llvm-cxxfilt")
    if tool is None:
        return {symbol: symbol for symbol in symbols}
    text = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    names = {}
    for symbol, line in zip(symbols, text.splitlines(), strict=True):
        plain = line.replace("mudsc::cuda::", "").replace("(anonymous namespace)::", "")
        plain = re.sub(r"_GLOBAL__N__\w+::", "", plain)
        names[symbol] = re.sub(r"\(.*$", "", plain).removeprefix("void ").strip()
    return names


def _record(name: str, path: Path, chip: str, usage: dict[str, int], code: list[str]) -> dict[str, Any]:
    def count(prefix: str, width: str = "") -> int:
        return sum(op.startswith(prefix) and width in op for op in code)

    found = re.search(r"(vectors_kernel|lines_kernel|zip_kernel|assign_kernel)", name)
    kernel = found.group(1) if found else name
    return {
        "kernel": kernel,
        "variant": name,
        "source": str(path),
        "arch": chip,
        "nvcc": version(),
        **usage,
        "wgmma": 0,  # matrix products and bulk loads are Triton's part
        "tma": 0,
        "instructions": len(code),
        "local_accesses": count("LDL") + count("STL"),
        "loads_16": count("LDG", ".128"),
        "stores_16": count("STG", ".128"),
        "loads_8": count("LDG", ".64"),
        "stores_8": count("STG", ".64"),
        "staged_16": count("STS", ".128"),
        "block_barriers": count("BAR"),
        "warp_barriers": count("WARPSYNC") + count("BAR.WARP"),
        "blocks_an_sm": _blocks(usage, THREADS.get(kernel, 256), _stage(chip) if kernel == "lines_kernel" else 0, chip),
    }


def shared_limit(chip: str) -> int:
    """Bytes of shared memory that one block may have on a chip such as "sm_90a"."""
    return occupancy.SHARED_LIMIT[_number(chip)]


def _number(chip: str) -> int:
    return int(chip.removeprefix("sm_").rstrip("a"))


def _stage(chip: str) -> int:
    """Dynamic bytes of lines_kernel, as its launcher asks for them, for lines that are not longer."""
    return (shared_limit(chip) + occupancy.OF_SYSTEM) // 2 - occupancy.OF_SYSTEM


def _blocks(usage: dict[str, int], threads: int, dynamic: int, chip: str) -> int:
    return occupancy.blocks(occupancy.Use(threads, usage["registers"], usage["shared_bytes"] + dynamic), _number(chip))


def faults(found: dict[str, Any]) -> list[str]:
    """What a record shows that must not be."""
    said = []
    if found["spills"] or found["stack"] or found["local_accesses"]:
        said.append(f"{found['spills']} bytes spilled, {found['local_accesses']} accesses to local memory")
    if found["shared_bytes"] > shared_limit(found["arch"]):
        said.append(f"{found['shared_bytes']} bytes of shared memory")
    if found["blocks_an_sm"] < 1:
        said.append(f"no block fits a multiprocessor: {found['registers']} registers")
    if found["kernel"] == "lines_kernel" and found["blocks_an_sm"] < 2:
        said.append("two blocks of lines must share a multiprocessor, to load while the other stores")
    bytes_ = vector_bytes(found["variant"])
    if bytes_ in (8, 16):
        said += [f"no {bytes_}-byte {what}" for what in ("loads", "stores") if not found[f"{what}_{bytes_}"]]
    return said


# Bytes of what regroup moves, by how the demangler spells it.
_ELEMENTS = {"char": 1, "short": 2, "__half": 2, "bfloat16": 2, "int": 4, "float": 4, "long": 8, "double": 8}


def vector_bytes(variant: str) -> int:
    """Bytes that an instantiation of regroup, such as "lines_kernel<Move<unsigned int>, 4>", moves at a time; 0:
    another kernel."""
    taken = re.match(r"(?:vectors|lines)_kernel<\w+<([^,>]+).*, (\d+)>$", variant)
    if taken is None:
        return 0
    if "Sixteen" in taken.group(1):
        return 16
    size = next(size for name, size in _ELEMENTS.items() if taken.group(1).strip().endswith(name))
    return size * int(taken.group(2))


if __name__ == "__main__":
    print(json.dumps(records(), indent=1))
