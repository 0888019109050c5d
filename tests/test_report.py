"""The report: what it gathers is what the merge found; the page opens in a real browser with every figure drawn."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import networks
import pytest
import torch
from safetensors.torch import load_file, save_file

import mudsc_fast as mf
from mudsc_fast.cli import main
from mudsc_fast.evaluation import charts
from mudsc_fast.evaluation.page import render
from mudsc_fast.evaluation.report import Report, gather
from mudsc_fast.evaluation.run_record import RunRecord, read_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two ResNets, the second one the first in another order with some noise, and their statistics."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = networks.randomise_norms(networks.ResNet(blocks=(1, 1), width=8, num_outputs=5), 0).eval()
    spec = mf.spec_for(model)
    first = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    second = spec.permute(first, spec.random_permutation(1))
    second = {n: t + 0.02 * torch.randn_like(t) if t.is_floating_point() else t for n, t in second.items()}
    save_file(first, "a.safetensors")
    save_file(second, "b.safetensors")
    models = []
    for state in (first, second):
        models.append(networks.ResNet(blocks=(1, 1), width=8, num_outputs=5).eval())
        models[-1].load_state_dict(state)
    mf.calibrate(models, [torch.randn(64, 3, 8, 8)], spec, progress=False).save("stats.safetensors")
    return tmp_path


def _merge(*more: str) -> list[str]:
    return ["merge", "a.safetensors", "b.safetensors", "-o", "m.safetensors", "--record", "run", "-q", *more]


@pytest.mark.parametrize("method", ["align", "zip"])
def test_the_report_shows_what_the_merge_found(folder: Path, method: str) -> None:
    assert main(_merge("--method", method, "--stats", "stats.safetensors")) == 0
    record, plan = read_run(folder / "run")
    assert record.status == "done"
    assert plan is not None
    found = gather(folder / "run", progress=False)
    assert found.notes == []
    assert [row.name for row in found.models] == ["model 0", "model 1", "merged"]
    state = load_file("a.safetensors")
    assert found.models[0].parameters == sum(tensor.numel() for tensor in state.values())
    assert {row.name: row.value for row in found.spaces} == plan.values
    assert all(len(values) == len(plan.history) for values in plan.sweeps.values())
    for k, mean in enumerate(plan.history):
        assert sum(values[k] for values in plan.sweeps.values()) / len(plan.sweeps) == pytest.approx(mean)
    assert len(found.figures) == len(plan.spec.spaces)
    for figure in found.figures:
        assert figure.matched > figure.diagonal + 0.2, figure.name
        if method == "align":
            assert figure.matched == pytest.approx(plan.values[figure.name], abs=1e-4), figure.name
    assert bool(found.group_sizes) == (method == "zip")
    weight = next(iter(name for name, tensor in state.items() if tensor.ndim >= 2))
    rms = float(state[weight].double().square().mean().sqrt())
    assert float(dict(found.norm_rows)[weight][0]) == pytest.approx(rms, rel=1e-3)


def test_values_over_sweeps_survive_a_save(folder: Path) -> None:
    states = [load_file(f"{name}.safetensors") for name in "ab"]
    spec = mf.spec_for(networks.ResNet(blocks=(1, 1), width=8, num_outputs=5))
    plan = mf.match(states, spec, method="align", balance=1.0, progress=False)
    plan.save("plan.safetensors")
    assert mf.MergePlan.load("plan.safetensors").sweeps == plan.sweeps
    assert set(plan.sweeps) == set(plan.labels)


def test_an_interrupted_run_gives_a_partial_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_merge()) == 0
    Path("m.safetensors").unlink()
    record = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps({**record, "status": "running", "seconds": None}))
    assert main(["report", "run", "-o", "report.html"]) == 0
    said = capsys.readouterr().err
    assert "did not finish" in said
    assert "merged: could not be read" in said
    page = Path("report.html").read_text()
    assert "This run did not finish." in page
    Path("run/plan.safetensors").unlink()
    assert "There is no match" in " ".join(gather(Path("run"), progress=False).notes)


def test_a_failed_run_is_recorded_as_failed(folder: Path) -> None:
    state = load_file("b.safetensors")
    name = next(name for name, tensor in state.items() if tensor.ndim == 4)
    state[name][0] = float("nan")
    save_file(state, "b.safetensors")
    assert main(_merge()) == 2
    record, plan = read_run(folder / "run")
    assert record.status == "failed"
    assert "NaN" in str(record.error)
    assert plan is None
    assert "NaN" in " ".join(gather(folder / "run", progress=False).notes)


def test_bad_input_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "nowhere", "-o", "r.html"]) == 2
    assert "no run here" in capsys.readouterr().err
    assert main(_merge()) == 0
    assert main(_merge("--force")) == 0
    assert main(["report", "run", "-o", "r.html", "--space", "nothing"]) == 2
    assert "the plan has no space 'nothing'" in capsys.readouterr().err
    Path("table.json").write_text("{")
    assert main(["report", "run", "-o", "r.html", "--table", "table.json"]) == 2
    assert "not JSON" in capsys.readouterr().err
    Path("run/run.json").write_text("[]")
    assert main(["report", "run", "-o", "r.html"]) == 2
    assert not Path("r.html").exists()
    assert main([*_merge()[:-3], "--record", "run", "-o", "other.safetensors"]) == 2
    assert "--record: run holds the record" in capsys.readouterr().err


def test_names_cannot_break_out_of_the_page() -> None:
    evil = '<script>alert("x")</script>'
    record = RunRecord([evil], "/", [evil], evil, {evil: evil}, error=evil, status="failed")
    svg = charts.line_chart({evil: [1.0, 2.0]}, evil, evil)
    page = render(Report(record, [], sweeps=svg, table=[{evil: evil}], notes=[evil]))
    assert "<script" not in page


def test_charts_place_their_values() -> None:
    svg = charts.line_chart({"a": [0.0, 1.0], "b": [0.5, float("nan")]}, "x", "y")
    points = re.findall(r'points="([^"]*)"', svg)
    first, last = (tuple(map(float, point.split(","))) for point in points[0].split())
    assert first[0] < last[0]
    assert first[1] > last[1]  # SVG's y axis points down
    assert len(points[1].split()) == 1
    assert charts.line_chart({"a": [0.0]}, "x", "y", log=True) == ""
    heights = [
        float(h) for h in re.findall(r'height="([\d.]+)"><title>', charts.bar_chart([1, 2], [0, 1, 2], "x", "y"))
    ]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)


def test_heat_maps_stay_light() -> None:
    wide = torch.eye(3000)
    assert len(charts.heat_map(wide)) < 30_000
    assert charts.heat_map(torch.zeros(1, 1)).startswith("data:image/png;base64,")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("size", [(390, 844), (1200, 900)], ids=["phone", "desk"])
def test_the_page_opens_in_a_browser(folder: Path, size: tuple[int, int]) -> None:
    """From a file, nothing on the console, every figure with a size, and no sideways scrolling."""
    assert main(_merge("--method", "zip", "--stats", "stats.safetensors")) == 0
    Path("table.json").write_text(json.dumps([{"network": "merged", "accuracy": 91.5}]))
    assert main(["report", "run", "-o", "report.html", "--table", "table.json", "-q"]) == 0
    probe = """<script>addEventListener('load', () => {
      const bad = [...document.querySelectorAll('svg, img')].filter(f => {
        const box = f.getBoundingClientRect();
        return box.width < 50 || box.height < 50 || (f.tagName === 'IMG' && !f.naturalWidth)
          || (f.tagName === 'svg' && !f.querySelector('polyline, rect')); });
      const all = document.querySelectorAll('svg, img').length;
      const wide = document.documentElement.scrollWidth > innerWidth;
      document.body.setAttribute('data-probe', `${all} ${bad.length} ${wide}`);
    })</script>"""
    page = Path("report.html").read_text()
    Path("probed.html").write_text(page.replace("</body>", probe + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--disable-quic", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [str(CHROMIUM), *flags, "--enable-logging=stderr", f"--window-size={size[0]},{size[1]}", "--dump-dom",
         (folder / "probed.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    probed = re.search(r'data-probe="(\d+) (\d+) (\w+)"', done.stdout)
    assert probed is not None, done.stdout[-2000:]
    figures = page.count("<svg") + page.count("<img")
    assert figures > 10
    assert probed.groups() == (str(figures), "0", "false")
