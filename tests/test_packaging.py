"""The wheel and the sdist: what is in them, what the extension links, and that each, freshly installed, merges."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="not run from a source tree"),
    pytest.mark.skipif(
        importlib.util.find_spec("scikit_build_core") is None, reason="needs scikit-build-core, as in .venv"
    ),
]

# What a user of a fresh installation does first. Two MLPs whose hidden units are the same ones in another order.
USE = """
import subprocess, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
import mudsc_fast as mf

assert Path(mf.__file__).is_relative_to(sys.prefix), mf.__file__
assert mf.__version__ and mf.build_config()["isas_usable"]
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5))
spec = mf.PermutationSpec((mf.Space("hidden", 32, axes=(
    mf.Axis("0.weight", 0, "out"), mf.Axis("0.bias", 0, "out"), mf.Axis("2.weight", 1, "in")),
    taps=(mf.Tap("2", "input", 1),)),))
first = {name: tensor.detach() for name, tensor in model.state_dict().items()}
second = spec.permute(first, spec.random_permutation(3))
for method in ("align", "zip"):
    merged = mf.match([first, second], spec, method=method, balance=1.0, progress=False).merge([first, second])
    model.load_state_dict(merged)
    x = torch.randn(7, 6)
    expected = torch.nn.functional.linear(torch.relu(torch.nn.functional.linear(x, first["0.weight"], first["0.bias"])),
                                          first["2.weight"], first["2.bias"])
    assert torch.allclose(model(x), expected, atol=1e-5), method
named = {"fc1.weight": "0.weight", "fc1.bias": "0.bias", "fc2.weight": "2.weight", "fc2.bias": "2.bias"}
for name, state in (("a", first), ("b", second)):
    save_file({new: state[old].contiguous() for new, old in named.items()}, name + ".safetensors")
program = Path(sys.prefix, "bin", "mudsc-fast")
arguments = ["a.safetensors", "b.safetensors", "-o", "c.safetensors", "--method", "align", "--quiet"]
subprocess.run([program, "merge", *arguments], check=True)
merged = load_file("c.safetensors")
assert torch.allclose(merged["fc1.weight"], first["0.weight"], atol=1e-6)
print("merged from", mf.__file__)
"""


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The command's output; a failure shows all of it."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _fresh_environment(folder: Path) -> Path:
    """A virtual environment that has only this one's libraries (torch is too large to install again); its Python."""
    _run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin/python"
    inside = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder.parent).strip()
    # Folders named in a .pth file are searched last, and their own .pth files are not read: no editable install.
    parents = [folder for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))]
    Path(inside, "libraries.pth").write_text("\n".join(parents) + "\n", encoding="utf-8")
    return python


def _install_and_merge(package: Path, folder: Path, **environment: str) -> None:
    python = _fresh_environment(folder / "venv")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-build-isolation")
    _run(*pip, "--no-index", package, cwd=folder, MUDSC_FAST_CUDA="OFF", **environment)
    output = _run(python, "-c", USE, cwd=folder, PYTHONPATH="")
    assert f"merged from {folder}" in output


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in the tree's own build folder, so that only what changed is compiled."""
    folder = tmp_path_factory.mktemp("wheel")
    _run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT, cwd=folder
    )
    (path,) = folder.glob("mudsc_fast-*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    _run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("mudsc_fast-*.tar.gz")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"mudsc_fast/py.typed", "mudsc_fast/_core.pyi", "mudsc_fast/__init__.py"} <= set(names)
    extensions = [name for name in names if name.endswith((".so", ".dylib"))]
    assert len(extensions) == 1
    assert re.fullmatch(r"mudsc_fast/_core\..*\.so", extensions[0])
    assert any(name.endswith("LICENSE") for name in names)
    outside = {name.split("/")[0] for name in names} - {"mudsc_fast"}
    assert all(name.endswith(".dist-info") for name in outside), outside
    assert not any("__pycache__" in name or "/tests/" in name for name in names)
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "mudsc_fast").rglob("*.py")}
    benchmarks = {f"mudsc_fast/{path.relative_to(ROOT)}" for path in (ROOT / "benchmarks").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources | benchmarks


def test_wheel_declares_what_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    folder = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    metadata = archive.read(f"{folder}/METADATA").decode()
    needed = {
        re.split(r"[<>=;\s]", line.split(": ", 1)[1])[0]
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    }
    # Few, and each for a reason: rich and click are the command line, pydantic and pyyaml its configuration files.
    assert needed == {"torch", "numpy", "safetensors", "click", "rich", "pydantic", "pyyaml"}
    assert "Requires-Python: >=3.10" in metadata
    assert "mudsc-fast" in archive.read(f"{folder}/entry_points.txt").decode()


def test_extension_links_neither_torch_nor_cuda(wheel: Path, tmp_path: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith(".so"))
    extension = archive.extract(name, tmp_path)
    tool = ("otool", "-L") if sys.platform == "darwin" else ("readelf", "-d")
    libraries = [
        line for line in _run(*tool, extension, cwd=tmp_path).splitlines() if ".so" in line or ".dylib" in line
    ]
    assert any("libc" in line or "libSystem" in line for line in libraries)  # the list was read
    for library in ("torch", "c10", "cuda", "nvidia", "libpython"):
        assert not any(library in line for line in libraries), libraries


def test_sdist_holds_all_that_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
        sources = {
            member.name.split("/", 1)[1]: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in members
            if member.isfile() and re.search(r"^[^/]+/(csrc/|CMakeLists.txt$)", member.name)
        }
    names = {member.name.split("/", 1)[1] for member in members if "/" in member.name}
    assert {"pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "csrc/bindings/module.cpp"} <= names
    assert {"mudsc_fast/_core.pyi", "mudsc_fast/py.typed"} <= names
    tree = [ROOT / "CMakeLists.txt", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    assert sources == {str(path.relative_to(ROOT)): path.read_bytes() for path in tree}
    assert not any(
        name.endswith((".so", ".pyc", ".o")) or name.startswith(("build/", ".venv/", "out/")) for name in names
    )
    assert sum(member.size for member in members) < 20e6


def test_wheel_merges_outside_the_tree(wheel: Path, tmp_path: Path) -> None:
    _install_and_merge(wheel, tmp_path)


def test_sdist_merges_outside_the_tree(sdist: Path, tmp_path: Path) -> None:
    # Without optimisation: the sources are those of the tree, whose build with it is tested everywhere else.
    quick = {"SKBUILD_CMAKE_BUILD_TYPE": "None", "SKBUILD_CMAKE_DEFINE": "MUDSC_FAST_OPTIMISE=-O0"}
    _install_and_merge(sdist, tmp_path, **quick)
