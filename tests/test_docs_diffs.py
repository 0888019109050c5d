"""The before and after of docs/adapters.md run on one input, and what comes out is compared."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import documents
import language_models
import pytest
import test_adapters
import torch
from networks import MLP, randomise_norms
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import mudsc_fast as mf
from mudsc_fast.adapters import rebasin
from mudsc_fast.cli import main

TESTS = Path(__file__).resolve().parent
DOCUMENT = documents.ROOT / "docs" / "adapters.md"
SHELL = ("mergekit-yaml", "mudsc-fast", "fusion_bench", "python")
# What each block imports of its tool is in this folder of tests/tools. fusion_bench: only where it is not installed.
TOOLS = {"ZipIt": "zipit", "git-re-basin": "rebasin", "The official MuDSC module": "mudsc"}
BENCH = importlib.util.find_spec("fusion_bench") is not None
pytest.importorskip("transformers")

# "official": 1e-5 is added to the number of members there. Others: one rounding of a mean in float32.
TOLERANCE = {"official": 5e-5, "zipit": 1e-5, "mean": 1e-6}


def _blocks() -> list[str]:
    return documents.blocks(DOCUMENT, "diff")


def _title(block: str) -> str:
    before = DOCUMENT.read_text(encoding="utf-8").split(block)[0]
    return re.findall(r"^## (.*)$", before, re.MULTILINE)[-1]


def _side(block: str, sign: str) -> tuple[list[list[str]], str]:
    """The commands, as words, and the Python of one side: its own lines and those that stay."""
    lines = [line[2:] for line in block.splitlines() if line[0] in (sign, " ")]
    commands = [shlex.split(line) for line in lines if line.split()[0] in SHELL]
    return commands, "\n".join(line for line in lines if line.split()[0] not in SHELL)


class _Block(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        stride = width // inputs
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(made + self.shortcut(x))


class _ResNet20(nn.Module):
    """With the module names of the published CIFAR networks."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        sizes = [width, width, 2 * width, 4 * width]
        for k in (1, 2, 3):
            first = _Block(sizes[k - 1], sizes[k])
            setattr(self, f"layer{k}", nn.Sequential(first, *(_Block(sizes[k], sizes[k]) for _ in range(2))))
        self.avgpool, self.linear = nn.AdaptiveAvgPool2d(1), nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
        out: Tensor = self.linear(self.avgpool(x).flatten(1))
        return out


def _pair() -> list[nn.Module]:
    """A network, and its copy in another unit order with noise: what decides is far above rounding."""
    torch.manual_seed(1)
    first, second = randomise_norms(_ResNet20()).eval(), _ResNet20().eval()
    # Statistics of inputs like those below: no unit is always off, which would have no correlation with any.
    mf.reset_batchnorm(first, [torch.randn(64, 3, 8, 8)])
    spec = mf.spec_for(first)
    moved = spec.permute(first.state_dict(), spec.random_permutation(1))
    noisy = {k: x + 0.01 * torch.randn(x.shape) if x.is_floating_point() else x for k, x in moved.items()}
    second.load_state_dict({k: x.abs() if k.endswith("var") else x for k, x in noisy.items()})
    return [first, second]


def _namespace() -> dict[str, Any]:
    """What the lines of the document take as given; the same at each call."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    a, b = (net.state_dict() for net in (MLP(inputs=12, widths=(16, 16), num_outputs=4) for _ in "ab"))
    axes = {"fc1.weight": ("P_0", None), "fc1.bias": ("P_0",), "fc2.weight": ("P_1", "P_0"), "fc2.bias": ("P_1",)}
    axes |= {"head.weight": (None, "P_1"), "head.bias": (None,)}
    ups, gates, downs = torch.randn(4, 12, 8), torch.randn(4, 12, 8), torch.randn(4, 8, 12)
    features = test_adapters.batches_of(2, 24)
    return {
        "torch": torch,
        "linear_sum_assignment": linear_sum_assignment,
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "features": features,
        "samples": sum(feats[0].shape[1] for feats in features),
        "ps": rebasin.permutation_spec_from_axes_to_perm(axes),
        "params_a": a,
        "params_b": b,
        "nets": _pair(),
        "loader": [(torch.randn(32, 3, 8, 8), None) for _ in range(4)],
        "ups": ups,
        "gates": gates,
        "downs": downs,
        "units": torch.cat([ups, downs.transpose(1, 2), gates], 2),
        "perm": {},
    }


def _mergekit_names() -> dict[str, Any]:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(documents.yaml_of(Path("config.yml")))
    return {"config": config, "options": MergeOptions(random_seed=3, quiet=True)}


def _folders(folder: Path) -> None:
    """The folders and configurations that the document names; both models are in one unit order."""
    model = language_models.network("Llama", 0)
    for seed, name in enumerate(("base", "tuned")):
        language_models.save(model, language_models.tuned(model, seed), folder / name)
    models = "".join(f"  - {{model: ./{name}, parameters: {{weight: 0.5}}}}\n" for name in ("base", "tuned"))
    (folder / "config.yml").write_text(f"merge_method: linear\ndtype: float32\nmodels:\n{models}")
    pool = folder / "pools" / "modelpool" / "two.yaml"
    pool.parent.mkdir(parents=True)
    pool.write_text(next(text for text in documents.blocks(DOCUMENT, "yaml") if "_target_" in text))


def _run(words: list[str], folder: Path) -> None:
    if words[0] == "mudsc-fast":
        assert main(words[1:]) == 0, shlex.join(words)
        return
    paths = [str(documents.ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    programs = {"python": [], "mergekit-yaml": ["-m", "mergekit.scripts.run_yaml"]}
    programs["fusion_bench"] = ["-m", "fusion_bench.scripts.cli" if BENCH else "fusion_bench"]
    if not BENCH:
        paths.append(str(TESTS / "tools" / "fusion_bench"))
    done = subprocess.run(
        [sys.executable, *programs[words[0]], *words[1:]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The modules of a folder can be imported, and are forgotten again."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def _side_run(block: str, sign: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What one side leaves: its names, and the tensors that it wrote below "merged" and "merged_in_python"."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    _folders(folder)
    commands, python = _side(block, sign)
    for words in commands:
        _run(words, folder)
    names = _namespace()
    if "mergekit" in python:
        names |= _mergekit_names()
    with _importable(TESTS / "tools" / TOOLS.get(_title(block), "none")):
        exec(compile(python, str(DOCUMENT), "exec"), names)
    for name in ("merged", "merged_in_python"):
        if (folder / name).is_dir():
            names[name] = load_file(folder / name / "model.safetensors")
    return names


def _all_close(before: Any, after: Any, tolerance: float) -> None:
    assert before.keys() == after.keys()
    assert before
    for name, x in before.items():
        if x.is_floating_point():
            torch.testing.assert_close(after[name], x, rtol=tolerance, atol=tolerance, msg=name)


def _compare_mergekit(before: dict[str, Any], after: dict[str, Any]) -> None:
    # Both models are in one order already: what is regrouped stays where it is, and every bit with it.
    for name in ("merged", "merged_in_python"):
        _all_close(before[name], after[name], 0)


def _compare_zipit(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert torch.equal(before["unmerge"], after["unmerge"])
    assert before["unmerge"].sum(0).max() > 1
    torch.testing.assert_close(after["merge"], before["merge"], rtol=TOLERANCE["zipit"], atol=TOLERANCE["zipit"])


def _compare_rebasin(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["perm"]["P_0"].dtype == torch.float32
    assert {p: x.int().tolist() for p, x in before["perm"].items()} == {p: x.tolist() for p, x in after["perm"].items()}
    assert after["perm"]["P_0"].tolist() != list(range(16))
    _all_close(before["aligned"], after["aligned"], 0)


def _compare_official(before: dict[str, Any], after: dict[str, Any]) -> None:
    _all_close(before["merged"].state_dict(), after["merged"].state_dict(), TOLERANCE["official"])
    plain = (before["nets"][0].conv1.weight + before["nets"][1].conv1.weight) / 2
    assert (plain - after["merged"].conv1.weight).abs().max() > 0.05
    assert set(before["perm"]) == set(after["perm"])


def _compare_experts(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert sorted(before["perm"]) == [1, 2, 3]
    assert all(after["perm"][e].tolist() == own.tolist() for e, own in before["perm"].items())
    assert after["perm"][0].tolist() == list(range(12))


def _compare_bench(before: dict[str, Any], after: dict[str, Any]) -> None:
    _all_close(before["merged"], after["merged"], TOLERANCE["mean"])


def _compare_transformers(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert type(before["model"]) is type(after["model"])
    _all_close(before["model"].state_dict(), after["model"].state_dict(), TOLERANCE["mean"])


COMPARED: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "mergekit": _compare_mergekit,
    "ZipIt": _compare_zipit,
    "git-re-basin": _compare_rebasin,
    "The official MuDSC module": _compare_official,
    "Mixtures of experts": _compare_experts,
    "fusion_bench": _compare_bench,
    "transformers": _compare_transformers,
}


def test_every_change_is_compared() -> None:
    assert [_title(block) for block in _blocks()] == list(COMPARED)


@pytest.mark.parametrize("block", _blocks(), ids=_title)
def test_before_and_after(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "mergekit" in block and importlib.util.find_spec("mergekit") is None:
        pytest.skip("mergekit is not installed: pip install 'mudsc-fast[mergekit]'")
    before, after = (
        _side_run(block, sign, tmp_path / name, monkeypatch) for name, sign in (("before", "-"), ("after", "+"))
    )
    COMPARED[_title(block)](before, after)
