"""Kernels broken on purpose, one edit each, and the case that must notice. Prints those that nobody noticed, as
JSON."""

# ruff: noqa: E501 (an edit is a line)
from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import mudsc_fast

FOLDER = Path(mudsc_fast.__file__).parent / "backends" / "triton"
# module, text in it, what it becomes, case that fails then
MUTANTS = (
    ("product", "acc = tl.dot(x.T, y, acc)", "acc = tl.dot(x.T, y)", "covariance, bfloat16, 65 samples"),
    ("product", "& 3) * plane_rows if PRODUCTS > 1 else row\n        right", "& 3) * 0 if PRODUCTS > 1 else row\n        right", "covariance, float32, 33 samples"),
    ("product", "inside = (t < rows_left)[:, None] &", "inside = (t < DEPTH)[:, None] &", "covariance, bfloat16, pointers, a slice of rows"),
    ("product", "j * COLUMNS, samples - row", "0, samples - row", "covariance, bfloat16, width 33"),
    ("product", "step = first + at - pair * count", "step = at - pair * count", "covariance, bfloat16, 130 samples"),
    ("product", "at = out + (r - first_row).to", "at = out + r.to", "candidates, reduced costs and rows, in pieces"),
    ("product", "inside = row_in[:, None] & column_in[None, :]", "inside = row_in[:, None] & (c >= 0)[None, :]", "similarity, float32, 33 x 65"),
    ("product", "below = below & (r[None, :] < c[:, None])", "below = below & (r[None, :] <= c[:, None] + 64)", "similarity, float32, 33 x 65"),
    ("product", "centred = products * over - row_mean[:, None] * column_mean[None, :]", "centred = products * over", "covariance, bfloat16, mean/std 1.5, cross"),
    ("split", "finite = tl.abs(value) < float(\"inf\")", "finite = tl.abs(value) >= 0.0", "covariance, not finite"),
    ("split", "at + p * plane_step", "at", "covariance, float32, 33 samples"),
    ("split", "row = first_row + o.to(tl.int64) * inner + s", "row = o.to(tl.int64) * inner + s", "similarity, float32, layouts"),
    ("split", "offset = s.to(tl.int64)[:, None] * inner_step", "offset = (s * inner_step.to(tl.int32))[:, None]", "covariance, strides past 32 bits"),
    ("correlation", "(r[None, :] < c[:, None])\n        tl.store", "(r[None, :] < c[:, None] + 200)\n        tl.store", "covariance, bfloat16, width 65"),
)  # fmt: skip


def survivors() -> list[str]:
    """Mutants that their case did not notice."""
    found = []
    for module, text, other, case_name in MUTANTS:
        source = (FOLDER / f"{module}.py").read_text(encoding="utf-8")
        if source.count(text) < 1:
            found.append(f"{module}: {text!r} is not in the source any more")
            continue
        if not _noticed(module, source.replace(text, other, 1), case_name):
            found.append(f"{module}: {text!r} -> {other!r} passes {case_name!r}")
    return found


def _noticed(module: str, source: str, case_name: str) -> bool:
    prefix = "mudsc_fast.backends.triton"
    for name in [name for name in sys.modules if name.startswith(prefix) or name == "kernels"]:
        del sys.modules[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{module}.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"{prefix}.{module}", path)
        if spec is None or spec.loader is None:
            raise RuntimeError(f"cannot load {path}")
        # The package first, then the mutant in the place of its module, then those that import from it.
        package = importlib.util.spec_from_file_location(
            prefix, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )
        if package is None:
            raise RuntimeError(f"cannot load {FOLDER}")
        sys.modules[prefix] = importlib.util.module_from_spec(package)
        mutant = importlib.util.module_from_spec(spec)
        sys.modules[f"{prefix}.{module}"] = mutant
        spec.loader.exec_module(mutant)
        if package.loader is not None:
            package.loader.exec_module(sys.modules[prefix])
        import kernels

        case = next(case for case in kernels.CASES if case.name == case_name)
        try:
            return not case.error(0) <= case.tolerance
        except (RuntimeError, ValueError):
            return True


if __name__ == "__main__":
    sys.stdout.write(json.dumps(survivors()))
