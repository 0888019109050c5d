"""The house rules that no linter knows: import direction, a quick import, unwanted statements, the stub."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mudsc_fast
from mudsc_fast import _core

PACKAGE = Path(mudsc_fast.__file__).resolve().parent
ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.is_relative_to(ROOT / "mudsc_fast"))

# Lowest floor first. A module imports from its own floor and from those below. A new module is given its place here.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("_core", "build"),
    ("backends",),
    (
        "regrouping", "tiled_zip", "zipping", "assignment", "covariance", "similarity", "library", "moments",
        "scalars", "selection", "tiles", "tiled_assignment",
    ),
    ("layout", "axes", "law", "orthogonal", "spaces", "spec", "tracing"),
    ("specs",),
    (
        "agreeing", "best", "counts", "elastic", "installing", "leading", "partial", "repairs", "resizing", "searching",
        "arguments", "averaging", "batches", "batchnorm", "calibration", "checkpoints", "distributed",
        "expert_merging", "experts", "hooks", "journal", "matching", "merging", "network", "plan", "progress",
        "records", "rematch", "rotations", "stats_files", "streaming", "streams", "weights", "wide_statistics",
        "workplan",
    ),
    ("__main__", "adapters", "checking", "cli", "configuration", "evaluation"),
)  # fmt: skip
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def _part(path: Path) -> str:
    """The module or subpackage directly below mudsc_fast that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes except those below `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _runtime_nodes(node)


def _imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in _runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ("mudsc_fast", *path.relative_to(PACKAGE).parts)[: -node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" if module == "mudsc_fast" else module for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name and name.startswith("mudsc_fast.")}
    return parts


@pytest.mark.skipif(not FILES, reason="the package is not imported from this checkout")
def test_every_module_has_a_floor() -> None:
    parts = {_part(path) for path in FILES} - {"__init__", "reference"}
    assert parts <= set(FLOOR_OF), f"give these a floor in FLOORS: {sorted(parts - set(FLOOR_OF))}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    part = _part(path)
    if part == "__init__":
        pytest.skip("imports lazily, by name")
    imported = _imported_parts(path) - {part}
    if part == "reference":
        assert not imported, "the reference imports nothing of the rest of the package"
        return
    # `check` compares every backend with the reference, so the top floor may see it.
    allowed = {name for name in FLOOR_OF if FLOOR_OF[name] <= FLOOR_OF[part]} | {"__version__", "build_config"}
    if FLOOR_OF[part] == len(FLOORS) - 1:
        allowed |= {"reference", *mudsc_fast.__all__}
    assert imported <= allowed, f"{path.relative_to(ROOT)} imports {sorted(imported - allowed)} from above"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_unwanted_in_the_package(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = []
    for node in ast.walk(ast.parse(text)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Assert):
            found.append(f"{line}: assert")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "breakpoint"):
            found.append(f"{line}: {node.func.id}()")
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"{line}: bare except")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            defaults = [*node.args.defaults, *(default for default in node.args.kw_defaults if default)]
            if any(isinstance(default, ast.List | ast.Dict | ast.Set) for default in defaults):
                found.append(f"{line}: mutable default")
    found += [f"{n}: {mark}" for n, row in enumerate(text.splitlines(), 1) for mark in ("TODO", "FIXME") if mark in row]
    assert not found


def _python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=PACKAGE.parent
    ).stdout


def test_import_is_quick() -> None:
    code = "import torch, time; t = time.perf_counter(); import mudsc_fast; print(time.perf_counter() - t)"
    seconds = min(float(_python(code)) for _ in range(3))
    assert seconds < 0.1, f"import mudsc_fast took {seconds:.3f} s beyond torch"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the libraries of a process from /proc")
def test_import_never_touches_the_driver() -> None:
    code = """
import torch
maps = lambda: {line.split()[-1] for line in open('/proc/self/maps') if '.so' in line}
before = maps()
import mudsc_fast
mudsc_fast.build_config()
[getattr(mudsc_fast, name) for name in mudsc_fast.__all__]
print('\\n'.join(sorted(maps() - before)))
print('initialised:', torch.cuda.is_initialized())
"""
    output = _python(code)
    assert "initialised: False" in output
    assert "_core" in output  # the extension was loaded, so the list is not empty by accident
    assert not any("libcuda" in line or "libnvidia" in line for line in output.splitlines())


def test_every_public_name_is_there() -> None:
    for name in mudsc_fast.__all__:
        assert getattr(mudsc_fast, name) is not None
    assert set(mudsc_fast.__all__) <= set(dir(mudsc_fast))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mudsc_fast.nothing


def _arguments(function: object) -> list[str]:
    """Argument names of a compiled function, as the first line of its docstring gives them."""
    signature = ((function.__doc__ or "").splitlines() or [""])[0].split("->")[0].strip()
    tree = ast.parse(f"def {signature}: ...").body[0]
    assert isinstance(tree, ast.FunctionDef)
    return [arg.arg for arg in tree.args.args]


def _compare_with_stub(declared: list[ast.stmt], there: object, where: str) -> None:
    functions = {
        node.name: [arg.arg for arg in node.args.args] for node in declared if isinstance(node, ast.FunctionDef)
    }
    if not _core.build_info()["cuda_archs"]:
        functions = {name: arguments for name, arguments in functions.items() if not name.endswith("_cuda")}
    for name, arguments in functions.items():
        assert hasattr(there, name), f"{where}.{name} is not in the extension"
        assert _arguments(getattr(there, name)) == arguments, f"{where}.{name}"
    classes = {node.name: node for node in declared if isinstance(node, ast.ClassDef)}
    constants = {
        node.target.id for node in declared if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    public = {name for name in vars(there) if not name.startswith("_")}
    assert public <= {*functions, *classes, *constants}, f"the stub of {where} lacks names"
    for name in constants:
        assert hasattr(there, name), f"{where}.{name} is not in the extension"
    for name, node in classes.items():
        _compare_with_stub(node.body, getattr(there, name), f"{where}.{name}")


def test_stub_agrees_with_the_extension() -> None:
    stub = ast.parse((PACKAGE / "_core.pyi").read_text(encoding="utf-8"))
    assert len(stub.body) > 5
    _compare_with_stub(stub.body, _core, "_core")
