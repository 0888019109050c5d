"""Makes the virtual environment that the Makefile works in, and installs what pyproject.toml declares into it.

torch comes first and by itself, because a plain `pip install torch` on Linux brings several gigabytes of CUDA
packages. When this Python already has a torch that sees a GPU, the environment is laid on top of that Python's packages
instead and only what is missing is installed: a GPU machine is often one where nothing can be downloaded.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10: pip always carries the same parser
    tomllib = importlib.import_module("pip._vendor.tomli")

ROOT = Path(__file__).resolve().parent.parent
BUILD_TOOLS = ["cmake>=3.24", "ninja>=1.10"]  # scikit-build-core asks for them only in isolated builds

SEES_GPU = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"


def sees_gpu(python: str) -> bool:
    """Whether `python` already has a torch that can use a GPU of this machine."""
    return subprocess.run([python, "-c", SEES_GPU], capture_output=True, check=False).returncode == 0


def create(venv: Path, reuse: bool) -> None:
    """Makes an empty environment; with `reuse`, one that also sees the packages of the Python that runs this script."""
    # A pip and setuptools of its own would hide the parent's setuptools, and torch may need the newer one.
    subprocess.run([sys.executable, "-m", "venv", *(["--without-pip"] if reuse else []), str(venv)], check=True)
    if not reuse:
        return
    # --system-site-packages skips the packages of a parent that is itself a virtual environment; a .pth does not.
    python = str(venv / "bin/python")
    folders = [folder for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))]
    inside = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    Path(inside.strip(), "parent_packages.pth").write_text("\n".join(folders) + "\n", encoding="utf-8")
    if subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode != 0:
        subprocess.run([python, "-m", "ensurepip"], check=True)


def has_torch(venv: Path) -> bool:
    """Whether the environment finds a torch, without importing it."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    return subprocess.run([str(venv / "bin/python"), "-c", code], check=False).returncode == 0


def declared(extras: list[str]) -> list[str]:
    """The requirements of the build system, of the package and of the named extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    optional = project["project"].get("optional-dependencies", {})
    unknown = sorted(set(extras) - set(optional))
    if unknown:
        raise SystemExit(f"setup_venv: no such extras {unknown}; pyproject.toml has {sorted(optional)}")
    requirements = [*project["build-system"]["requires"], *BUILD_TOOLS, *project["project"]["dependencies"]]
    return requirements + [line for extra in extras for line in optional[extra]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--torch", default="torch==2.13.0", help="what to ask pip for when torch is not there yet")
    parser.add_argument("--extras", default="", help="extras of pyproject.toml, separated by commas")
    parser.add_argument(
        "--reuse", choices=("auto", "always", "never"), default="auto", help="build on this Python's packages"
    )
    options = parser.parse_args()

    marker = options.venv / "reuses-parent"
    if not (options.venv / "bin/python").exists():
        reuse = options.reuse == "always" or (options.reuse == "auto" and sees_gpu(sys.executable))
        create(options.venv, reuse)
        if reuse:
            marker.touch()

    environment = dict(os.environ)
    if marker.exists():  # most likely offline: what is missing should fail at once, not after minutes of retries
        environment.setdefault("PIP_RETRIES", "0")
        environment.setdefault("PIP_DEFAULT_TIMEOUT", "10")
    pip = [str(options.venv / "bin/python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    if not has_torch(options.venv):  # a torch that is there stays, whichever it is
        print(f"setup_venv: {options.torch}", flush=True)
        subprocess.run([*pip, *options.torch.split()], env=environment, check=True)
    extras = [name for name in options.extras.split(",") if name]
    print(f"setup_venv: requirements of pyproject.toml{''.join(f' [{name}]' for name in extras)}", flush=True)
    subprocess.run([*pip, *declared(extras)], env=environment, check=True)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"setup_venv: {error}")
