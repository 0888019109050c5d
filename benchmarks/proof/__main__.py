"""Proofs A and B of every GPU kernel, without a GPU: `make prove SEED=n` leaves build/prove/kernels.json.

A: the kernels' sources run on the CPU, with inputs and schedules drawn from the seed (triton_cases, cuda_cases).
B: the kernels are compiled for sm_80, sm_90 and sm_100 and their machine code is read (triton_code, cuda_code).

The file is a list with one record for each kernel, variant and chip: kernel, source, arch, triton or nvcc (the version
of the compiler), registers, spills, shared_bytes, wgmma, tma, and of proof A the cases and failures of that kernel. The
exit status is 1 when a case failed, the code shows what it must not, or a part did not end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "build" / "prove" / "kernels.json"


@dataclass(frozen=True)
class Part:
    """One half of a proof, run in a process of its own so that a crash loses that half alone."""

    name: str
    code: str  # prints one JSON value as its last line; a string is the reason why it cannot run here


def parts(seed: int, share: float) -> list[Part]:
    """What is run, the longest first."""
    cases = "print(json.dumps(m.why_not() or m.run({seed}, {share})))"
    code = "print(json.dumps(m.why_not() or [dict(r, faults=m.faults(r)) for r in m.records({arguments})]))"
    return [
        Part("triton_code", code.format(arguments=f"quick={share < 1}, workers=1")),
        Part("triton_cases", cases.format(seed=seed, share=share)),
        Part("cuda_cases", cases.format(seed=seed, share=share)),
        Part("cuda_code", code.format(arguments="workers=1")),
    ]


def run_part(part: Part, limit: float) -> tuple[Any, str, float]:
    """(what it printed, why it did not or "", seconds)."""
    start = time.monotonic()
    module = f"import importlib, json\nm = importlib.import_module('benchmarks.proof.{part.name}')\n"
    missing = "m.why_not = getattr(m, 'why_not', lambda: None)\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", module + missing + part.code]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"no end after {limit:g} s", time.monotonic() - start
    seconds = time.monotonic() - start
    if done.returncode:
        return None, f"exit {done.returncode}: {done.stderr.strip()[-1500:]}", seconds
    return json.loads(done.stdout.strip().splitlines()[-1]), "", seconds


def joined(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of the machine code with the counts of proof A beside them."""
    records = []
    for kind, key in (("triton", "kernel"), ("cuda", "source")):
        cases = results.get(f"{kind}_cases")
        cases = cases if isinstance(cases, dict) else {}
        code = results.get(f"{kind}_code")
        code = code if isinstance(code, list) else []
        seen = set()
        for record in code:
            name = Path(record[key]).stem if key == "source" else record[key]
            name = name if name in cases else name.rsplit(".", 1)[-1]
            seen.add(name)
            counted = cases.get(name, {"cases": 0, "failures": 0})
            records.append({**record, "cases": counted["cases"], "failures": counted["failures"]})
        # Without a compiler proof A is all there is.
        for name, counted in cases.items():
            if name not in seen:
                empty = dict.fromkeys(("arch", "registers", "spills", "shared_bytes", "wgmma", "tma"))
                records.append({"kernel": name, "source": kind, **empty, **counted})
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts, two at a time; write the file whole or not at all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of proof A, and below 1 of B's variants")
    parser.add_argument(
        "--limit", type=float, default=900.0, help="seconds for each part, more than it takes on a busy machine"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    chosen = parts(options.seed, options.share)
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda part: run_part(part, options.limit), chosen))
    results, troubles = {}, []
    for part, (result, error, seconds) in zip(chosen, outcomes, strict=True):
        results[part.name] = result
        if error:
            troubles.append(f"{part.name}: {error}")
        elif isinstance(result, str):
            print(f"{part.name}: skipped: {result}")
        else:
            print(f"{part.name}: {len(result)} entries, {seconds:.0f} s")
    records = joined(results)
    for record in records:
        troubles += [
            f"{record['kernel']} {record.get('variant', '')} {record['arch']}: {f}" for f in record.get("faults", ())
        ]
    for kind in ("triton_cases", "cuda_cases"):
        if isinstance(results.get(kind), dict):
            for kernel, counted in results[kind].items():
                if counted["failures"]:
                    troubles.append(
                        f"{kernel}: {counted['failures']} of {counted['cases']} cases failed: {counted['messages'][:3]}"
                    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = options.out.with_suffix(".part")
    unfinished.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, options.out)
    print(f"{options.out}: {len(records)} records, seed {options.seed}")
    for trouble in troubles:
        print(trouble)
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main())
