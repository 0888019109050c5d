"""All cases with fresh inputs: python prove.py SEED [share of the cases, 0..1] prints {kernel: [cases, failures]} as
JSON."""

from __future__ import annotations

import json
import sys

import interpreted_kernels as kernels


def main() -> None:
    """Run the cases with the seed of the command line."""
    seed, share = int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    chosen = [case for k, case in enumerate(kernels.CASES) if (k + seed) % max(round(1 / share), 1) == 0]
    found: dict[str, list[int]] = {}
    failures = []
    for case in chosen:
        try:
            error = case.error(seed)
        except Exception as raised:  # noqa: BLE001 (whatever goes wrong is the finding)
            error = float("inf")
            failures.append(f"{case.name}: {type(raised).__name__}: {raised}")
        else:
            if not error <= case.tolerance:
                failures.append(f"{case.name}: {error}")
        for kernel in case.kernels:
            counts = found.setdefault(kernel, [0, 0])
            counts[0] += 1
            counts[1] += not error <= case.tolerance
    sys.stdout.write(json.dumps({"kernels": found, "failures": failures}))


if __name__ == "__main__":
    main()
