"""Time and memory of tracing Llama-3-8B and 70B on the meta device, each in a process of its own.

python -m benchmarks.tracing --json benchmarks/results/tracing.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "Llama-3-70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
TARGETS = {"Llama-3-8B": {"seconds": 15, "gigabytes": 1}, "Llama-3-70B": {"seconds": 30}}


def traced(name: str) -> dict[str, Any]:
    """Seconds of making the empty network and of tracing it, this process's peak memory, and what was found."""
    import torch
    import transformers

    import mudsc_fast as mf

    torch.set_num_threads(1)
    start = time.perf_counter()
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES[name]))
    made, cpu = time.perf_counter(), time.process_time()
    spec = mf.PermutationSpec.trace(model, (torch.zeros(2, 8, dtype=torch.long, device="meta"),))
    return {
        "seconds_model": made - start,
        "seconds": time.perf_counter() - made,
        "cpu_seconds": time.process_time() - cpu,
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "spaces": len(spec),
        "frozen": len(spec.frozen),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--one", choices=SIZES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(traced(options.one)))
        return
    import torch
    import transformers

    rows = {}
    for name in SIZES:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.tracing", "--one", name], capture_output=True, text=True, check=True
        )
        rows[name] = {**json.loads(done.stdout.splitlines()[-1]), "targets": TARGETS[name]}
        row = rows[name]
        cost = f"{row['seconds']:.1f} s ({row['cpu_seconds']:.1f} of the CPU), {row['peak_gigabytes']:.2f} GB"
        print(f"{name}: {cost}, {row['spaces']} spaces")
    if options.json is not None:
        about = {"command": "python -m benchmarks.tracing", "machine": platform.machine(), "cores": os.cpu_count()}
        about |= {"torch": torch.__version__, "transformers": transformers.__version__}
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
