"""The before and after of docs/adapters.md run: all of the after side, the before side of tools that are packages."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import language_models
import pytest
import torch
from networks import MLP
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from mudsc_fast.adapters import rebasin
from mudsc_fast.cli import main

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "adapters.md"
SHELL = ("mergekit-yaml", "mudsc-fast", "fusion_bench", "python")
# Published as scripts beside each other: nothing to install. tests/tool_algorithms.py restates what they compute.
NO_PACKAGES = ("matching_functions", "metric_calculators", "utils.weight_matching", "mudsc")
pytest.importorskip("transformers")


def _blocks() -> list[str]:
    text = DOCUMENT.read_text(encoding="utf-8")
    return re.findall(r"^```diff\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


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


def _seeded(make: Any, **options: Any) -> list[Any]:
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(make(**options).eval())
    return made


def _namespace() -> dict[str, Any]:
    """What the lines of the document take as given."""
    transformers = pytest.importorskip("transformers")
    a, b = (net.state_dict() for net in _seeded(MLP, inputs=12, widths=(16, 16), num_outputs=4))
    axes = {"fc1.weight": ("P_0", None), "fc1.bias": ("P_0",), "fc2.weight": ("P_1", "P_0"), "fc2.bias": ("P_1",)}
    axes |= {"head.weight": (None, "P_1"), "head.bias": (None,)}
    ups, gates, downs = torch.randn(4, 12, 8), torch.randn(4, 12, 8), torch.randn(4, 8, 12)
    return {
        "torch": torch,
        "linear_sum_assignment": linear_sum_assignment,
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "ps": rebasin.permutation_spec_from_axes_to_perm(axes),
        "params_a": a,
        "params_b": b,
        "nets": _seeded(_ResNet20),
        "loader": [(torch.randn(16, 3, 8, 8), None) for _ in range(2)],
        "ups": ups,
        "gates": gates,
        "downs": downs,
        "units": torch.cat([ups, downs.transpose(1, 2), gates], 2),
        "perm": {},
    }


def _folders(folder: Path) -> None:
    model = language_models.network("Llama", 0)
    for seed, name in enumerate(("base", "tuned")):
        language_models.save(model, language_models.tuned(model, seed), folder / name)
    models = "".join(f"  - {{model: ./{name}, parameters: {{weight: 0.5}}}}\n" for name in ("base", "tuned"))
    (folder / "config.yml").write_text(f"merge_method: linear\ndtype: float32\nmodels:\n{models}")


def _run(words: list[str], folder: Path) -> None:
    if words[0] == "mudsc-fast":
        assert main(words[1:]) == 0, shlex.join(words)
        return
    where = {"python": [sys.executable], "mergekit-yaml": [sys.executable, "-m", "mergekit.scripts.run_yaml"]}
    command = [*where.get(words[0], words[:1]), *words[1:]]
    done = subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"


def _there(words: list[str]) -> bool:
    """Whether the tool that the command is of is installed."""
    tool = {"mergekit-yaml": "mergekit", "fusion_bench": "fusion_bench"}.get(words[0])
    if words[:2] == ["mudsc-fast", "mergekit"]:
        tool = "mergekit"
    return tool is None or importlib.util.find_spec(tool) is not None


@pytest.mark.parametrize("block", _blocks(), ids=_title)
def test_what_stands_after(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _folders(tmp_path)
    commands, python = _side(block, "+")
    for words in commands:
        # An ellipsis stands for models of the reader's own; tests/test_adapters_models.py runs that algorithm.
        if _there(words) and not any("..." in word for word in words):
            _run(words, tmp_path)
    names = _namespace()
    if _there(["mergekit-yaml"]) or "mergekit" not in python:
        exec(compile(python, str(DOCUMENT), "exec"), names)
    made = {
        "mergekit": lambda: (tmp_path / "merged" / "model.safetensors").is_file() or not _there(["mergekit-yaml"]),
        "ZipIt": lambda: callable(names["match_tensors_zipit"]) and callable(names["CovarianceMetric"]),
        "git-re-basin": lambda: names["aligned"].keys() == names["params_b"].keys(),
        "The official MuDSC module": lambda: isinstance(names["merged"], nn.Module),
        "Mixtures of experts": lambda: names["perm"].shape == (4, 12),
        "fusion_bench": lambda: (tmp_path / "config" / "method" / "mudsc.yaml").is_file(),
        "transformers": lambda: isinstance(names["model"], nn.Module),
    }
    assert made[_title(block)]()


@pytest.mark.parametrize("block", _blocks(), ids=_title)
def test_what_stands_before(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _folders(tmp_path)
    commands, python = _side(block, "-")
    if any(re.search(rf"^(from|import) {re.escape(name)}\b", python, re.MULTILINE) for name in NO_PACKAGES):
        compile(python, str(DOCUMENT), "exec")
        pytest.skip("the tool is no package; its algorithm is restated and compared in the adapter's own test")
    for words in commands:
        if _there(words) and not any("..." in word for word in words):
            _run(words, tmp_path)
    if _there(["mergekit-yaml"]) or "mergekit" not in python:
        exec(compile(python, str(DOCUMENT), "exec"), _namespace())
