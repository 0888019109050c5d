"""Kernels broken on purpose, one edit each, and the case that must notice. Prints those that nobody noticed, as
JSON."""

# ruff: noqa: E501 (an edit is a line)
from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch  # noqa: F401 (imported once, before the forks)
import triton.language  # noqa: F401

import mudsc_fast

FOLDER = Path(mudsc_fast.__file__).parent / "backends" / "triton"
# module, text in it, what it becomes, case that fails then
MUTANTS = (
    ("product", "acc = tl.dot(x.T, y, acc)", "acc = tl.dot(x.T, y)", "covariance, bfloat16, 65 samples"),
    ("product", "& 3) * plane_rows if PRODUCTS > 1 else row\n        right", "& 3) * 0 if PRODUCTS > 1 else row\n        right", "covariance, float32, 33 samples"),
    ("product", "inside = (t < rows_left)[:, None] &", "inside = (t < DEPTH)[:, None] &", "covariance, bfloat16, pointers, a slice of rows"),
    ("product", "j * COLUMNS, samples - row", "0, samples - row", "covariance, bfloat16, width 33"),
    ("product", "step = first + at - pair * count", "step = at - pair * count", "covariance, bfloat16, many samples, mean/std 100"),
    ("product", "at = out + (r - first_row).to(tl.int64) * out_pitch", "at = out + r.to(tl.int64) * out_pitch", "candidates, reduced costs and rows, in pieces"),
    ("product", "inside = row_in[:, None] & column_in[None, :]", "inside = row_in[:, None] & (c >= 0)[None, :]", "similarity, float32, 33 x 65"),
    ("product", "below = below & (r[None, :] < c[:, None])", "below = below & (r[None, :] <= c[:, None] + 64)", "similarity, blend full into full"),
    ("product", "centred = products * over - row_mean[:, None] * column_mean[None, :]", "centred = products * over", "covariance, bfloat16, mean/std 1.5, cross"),
    ("product", "gram + r.to(tl.int64)[:, None] * gram_pitch + c[None, :]", "gram + r.to(tl.int64)[:, None] * gram_pitch + 0 * c[None, :]", "similarity, blend cross into cross"),
    ("diagonal", "acc = tl.dot(x.T, y, acc)", "acc = tl.dot(x.T, y)", "covariance, bfloat16, 65 samples"),
    ("diagonal", "counted = (r < units) &", "counted = (r < units + 1) &", "covariance, bfloat16, width 33"),
    ("diagonal", " & (r == j * SIDE + tl.arange(0, SIDE))", "", "covariance, bfloat16, cross, means change and stay raw"),
    ("diagonal", "return sums + wide,", "return sums + wide + wide,", "covariance, bfloat16, mean/std 0, full"),
    ("diagonal", "return sums + wide,", "return sums,", "covariance, bfloat16, mean/std 0, full"),
    ("diagonal", "chunk * ((4 if BOTH", "0 * ((4 if BOTH", "covariance, bfloat16, 130 samples"),
    ("diagonal", "_count_in(x, left_sums, left_squares)", "_count_in(y, left_sums, left_squares)", "covariance, bfloat16, 130 samples"),
    ("diagonal", "tl.store(at + 3 * units, tl.sum(left_squares", "tl.store(at + 3 * units, tl.sum(left_sums", "covariance, bfloat16, 130 samples"),
    ("diagonal", "tl.where(wide != 0.0, 1e-37, 0.0)", "0.0 * wide", "covariance, tiny units"),
    ("diagonal", "j * SIDE - i * SIDE // BAND * BAND", "j * SIDE % BAND - i * SIDE // BAND", "covariance, bfloat16, cross, means change and stay raw"),
    ("diagonal", "for i in range(number)", "for i in range(1, number)", "covariance, bfloat16, mean/std 0, full"),
    ("diagonal", "out[rest:, rest:] +=", "out[rest:, rest:] =", "covariance, bfloat16, cross, means change and stay raw"),
    ("covariance_sums", "beyond = near.band", "beyond = 0", "covariance, bfloat16, mean/std 0, full"),
    ("covariance_sums", "torch.where(known, ratio, torch.nan)", "ratio", "covariance, not finite midway"),
    ("launching", "!= pairs[:, 0] * tall // beyond", "!= pairs[:, 0]", "covariance, bfloat16, cross, means change and stay raw"),
    ("split", "finite = tl.abs(value) < float(\"inf\")", "finite = tl.abs(value) >= 0.0", "covariance, not finite"),
    ("split", "at + p * plane_step", "at", "covariance, float32, 33 samples"),
    ("split", "row = first_row + o * inner + s", "row = o * inner + s", "similarity, float32, layouts"),
    ("split", "offset = s.to(tl.int64)[:, None] * inner_step", "offset = (s * inner_step.to(tl.int32))[:, None]", "covariance, strides past 32 bits"),
    ("candidates", "(above > 3 * KEPT)", "(above < 0)", "lists of a tile, clumped, 1700 columns, 16 kept"),
    ("candidates", "n, turn) < last)", "n, turn) <= last)", "lists of a tile, any, 33 columns, 16 kept"),
    ("candidates", "c = tl.where(c >= n, c - n, c)", "c = tl.where(c > n, c - n, c)", "lists of a tile, first, 33 columns, 4 kept"),
    ("candidates", "tl.where(inside, narrow, float(\"-inf\"))", "narrow", "lists of a tile, any, 33 columns, 16 kept"),
    ("candidates", "(same > 0) & (at < KEPT)", "(same > 0) & (at < 1)", "lists of a tile, equal, 70 columns, 8 kept"),
    ("candidates", "== room - 1", "== 0", "lists of a tile, ties, 97 columns, 9 kept"),
    ("correlation", "inside = inside & (r[:, None] <= c[None, :])", "inside = inside & (r[:, None] <= c[None, :] + 200)", "covariance, bfloat16, width 65"),
)  # fmt: skip


def survivors() -> list[str]:
    """Mutants that their case did not notice."""
    found = []
    for module, text, other, case_name in MUTANTS:
        source = (FOLDER / f"{module}.py").read_text(encoding="utf-8")
        if source.count(text) < 1:
            found.append(f"{module}: {text!r} is not in the source any more")
            continue
        # A process each: a mutant may write where it must not, and a crash is a notice, too.
        child = os.fork()
        if child == 0:
            signal.alarm(120)
            os._exit(0 if _noticed(module, source.replace(text, other, 1), case_name) else 1)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 1:
            found.append(f"{module}: {text!r} -> {other!r} passes {case_name!r}")
        elif os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
            found.append(f"{module}: {text!r} -> {other!r} does not end")
    return found


def _noticed(module: str, source: str, case_name: str) -> bool:
    prefix = "mudsc_fast.backends.triton"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{module}.py"
        path.write_text(source, encoding="utf-8")
        # The package first, then the mutant in the place of its module, then those that import from it.
        package = importlib.util.spec_from_file_location(
            prefix, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )
        spec = importlib.util.spec_from_file_location(f"{prefix}.{module}", path)
        if spec is None or spec.loader is None or package is None or package.loader is None:
            raise RuntimeError(f"cannot load {path}")
        sys.modules[prefix] = importlib.util.module_from_spec(package)
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
        package.loader.exec_module(sys.modules[prefix])
        import interpreted_kernels as kernels

        case = next(case for case in kernels.CASES if case.name == case_name)
        try:
            return not case.error(0) <= case.tolerance
        except (RuntimeError, ValueError):
            return True


if __name__ == "__main__":
    sys.stdout.write(json.dumps(survivors()))
