"""The landscape: coordinates on the plane, losses that are known in closed form, resuming, figures, the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mudsc_fast.cli import main
from mudsc_fast.evaluation import Landscape, Path1D, landscape, loss_path
from mudsc_fast.evaluation.plane import Plane

State = dict[str, Tensor]


def _states(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[State]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "w": torch.randn(4, 3, generator=generator, dtype=torch.float64).to(dtype),
            "b": torch.randn(5, generator=generator, dtype=torch.float64).to(dtype),
            "steps": torch.tensor(7 + k),
        }
        for k in range(3)
    ]


def _flat(state: State) -> Tensor:
    return torch.cat([state["w"].reshape(-1), state["b"]]).double()


def _squares(states: list[State]) -> object:
    """Losses that are squared distances to the first two networks, times a factor."""

    def evaluate(state: State) -> dict[str, float]:
        return {f"t{k}": float((_flat(state) - _flat(states[k])).square().sum()) for k in (0, 1)}

    return evaluate


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_corners_are_the_networks_and_distances_are_euclidean(dtype: torch.dtype, tolerance: float) -> None:
    states = _states(1, dtype)
    plane = Plane(states)
    for state, corner in zip(states, plane.corners, strict=True):
        found = plane.at(*corner)
        for name in ("w", "b"):
            assert found[name].dtype == dtype
            assert torch.allclose(found[name], state[name], atol=tolerance), name
    assert plane.at(0.3, 0.4)["steps"] == 7  # integers are the first network's
    away = float((_flat(plane.at(0.3, -0.4)) - _flat(states[0])).norm())
    assert math.isclose(away, 0.5, rel_tol=100 * tolerance)


def test_losses_on_the_grid_are_those_of_the_networks_there() -> None:
    states = _states()
    found = landscape(states, _squares(states), resolution=5, margin=0.5, progress=False)  # type: ignore[arg-type]
    length = found.points["B"][0]
    for i, y in enumerate(found.ys):
        for j, x in enumerate(found.xs):
            assert math.isclose(found.losses["t0"][i][j], x * x + y * y, rel_tol=1e-9, abs_tol=1e-9)
            assert math.isclose(found.losses["t1"][i][j], (x - length) ** 2 + y * y, rel_tol=1e-9, abs_tol=1e-9)
    assert found.at_points["A"]["t0"] == 0.0
    reach = found.points["merged"][1]
    assert math.isclose(found.ys[0], -0.5 * reach)
    assert math.isclose(found.ys[-1], 1.5 * reach)


def test_overlap_needs_every_task() -> None:
    grid = {"a": [[0.0, 1.0], [2.0, 3.0]], "b": [[3.0, 2.0], [1.0, 0.0]]}
    points = {"A": (0.0, 0.0), "B": (1.0, 0.0), "merged": (0.5, 1.0)}
    at = {"A": {"a": 0.0, "b": 3.0}, "B": {"a": 3.0, "b": 0.0}, "merged": {"a": 0.5, "b": 0.5}}
    found = Landscape([0, 1], [0, 1], grid, points, at)
    assert found.low("a", 0.5) == 1.5
    assert [found.in_overlap(name, 0.5) for name in points] == [False, False, True]
    assert [found.in_overlap(name, 0.1) for name in points] == [False, False, False]
    assert [found.needed_share(name) for name in points] == [1.0, 1.0, 0.5 / 3.0]


def test_shares_where_the_parents_are_level_or_a_loss_is_missing() -> None:
    points = {"A": (0.0, 0.0), "B": (1.0, 0.0), "merged": (0.5, 1.0)}

    def share(first: float, second: float, merged: float) -> float:
        at = {"A": {"a": first}, "B": {"a": second}, "merged": {"a": merged}}
        return Landscape([0, 1], [0, 1], {"a": [[0.0, 0.0], [0.0, 0.0]]}, points, at).needed_share("merged")

    assert share(1.0, 1.0, 1.0) == 0.0
    assert share(1.0, 1.0, 2.0) == math.inf
    assert share(1.0, 3.0, 0.5) == 0.0
    assert math.isnan(share(1.0, math.nan, 2.0))
    assert math.isnan(share(1.0, 2.0, math.nan))


def test_barrier_is_the_excess_over_the_straight_line() -> None:
    path = Path1D([0.0, 0.5, 1.0], {"a": [1.0, 5.0, 3.0], "b": [4.0, 1.0, 0.0]})
    assert path.barrier("a") == 3.0
    assert path.barrier("b") == 0.0
    states = _states(2)
    found = loss_path(states[0], states[1], _squares(states), steps=5, progress=False)  # type: ignore[arg-type]
    whole = float((_flat(states[0]) - _flat(states[1])).square().sum())
    assert all(
        math.isclose(v, (s**2) * whole, abs_tol=1e-9) for s, v in zip(found.shares, found.losses["t0"], strict=True)
    )


def test_the_order_of_names_is_not_part_of_a_network(tmp_path: Path) -> None:
    states, file = _states(), tmp_path / "grid.json"
    first = landscape(states, _squares(states), resolution=2, path=file, progress=False)  # type: ignore[arg-type]

    def never(state: State) -> dict[str, float]:
        raise AssertionError("all losses are in the file")

    turned = [dict(reversed(list(state.items()))) for state in states]
    assert landscape(turned, never, resolution=2, path=file, progress=False) == first


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    states, file, calls = _states(), tmp_path / "grid.json", []
    plain = _squares(states)

    def fails(state: State) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 6:
            raise ArithmeticError("no more")
        return plain(state)  # type: ignore[operator, no-any-return]

    with pytest.raises(RuntimeError, match="evaluate: raised at landscape point 1,1: no more"):
        landscape(states, fails, resolution=4, path=file, progress=False)
    before = len(calls) - 1
    resumed = landscape(states, fails, resolution=4, path=file, progress=False)
    assert len(calls) == 1 + 16 + 3
    assert before == 5
    assert resumed == landscape(states, plain, resolution=4, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="other networks or of another grid"):
        landscape(_states(9), plain, resolution=4, path=file, progress=False)  # type: ignore[arg-type]


def test_losses_that_are_not_finite_leave_holes(tmp_path: Path) -> None:
    states = _states()
    seen = []

    def evaluate(state: State) -> dict[str, float]:
        seen.append(1)
        return {"t": math.inf if len(seen) == 3 else float(len(seen))}

    file = tmp_path / "grid.json"
    found = landscape(states, evaluate, resolution=3, path=file, progress=False)
    assert math.isnan(found.losses["t"][0][2])
    assert "NaN" not in file.read_text()  # JSON has none
    again = landscape(states, evaluate, resolution=3, path=file, progress=False)
    assert math.isnan(again.losses["t"][0][2])
    assert len(seen) == 12


def _on_a_line() -> list[State]:
    first, second, _ = _states()
    return [first, second, {n: (t + second[n]) / 2 if t.is_floating_point() else t for n, t in first.items()}]


BAD = {
    "two networks": (lambda: _states()[:2], {}, "expected three"),
    "one line": (_on_a_line, {}, "on one line"),
    "the same twice": (lambda: [_states()[0], _states()[0], _states()[1]], {}, "are the same"),
    "another width": (lambda: [*_states()[:2], {**_states()[2], "b": torch.zeros(6)}], {}, "'b' has shape"),
    "a tensor missing": (lambda: [*_states()[:2], {"w": torch.zeros(4, 3)}], {}, "'b' is not in both"),
    "NaN": (lambda: [*_states()[:2], {**_states()[2], "b": torch.full((5,), math.nan)}], {}, "holds NaN"),
    "no mapping": (lambda: [*_states()[:2], 3], {}, "expected mappings"),
    "resolution": (_states, {"resolution": 1}, "resolution: expected"),
    "margin": (_states, {"margin": -1}, "margin: expected"),
    "names": (_states, {"names": ["A", "A", "B"]}, "names: expected"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    make, arguments, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        landscape(make(), lambda state: {"t": 0.0}, progress=False, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("losses", "message"),
    [({}, "at least one task"), ({"t": "much"}, "expected a number"), (None, "expected the tasks")],
)
def test_bad_losses_are_named(losses: object, message: str) -> None:
    count = iter(range(100))
    with pytest.raises((ValueError, TypeError), match=message):
        landscape(
            _states(),
            lambda state: {f"t{next(count)}": 0.0} if losses is None else losses,  # type: ignore[arg-type, return-value]
            progress=False,
        )


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, state in zip("abm", _states(dtype=torch.float32), strict=True):
        save_file(state, f"{name}.safetensors")
    Path("landscape_tasks.py").write_text(
        "def losses(state):\n    return {'up': float((state['w'] - 1).square().sum()), 'down': float((state['w'] + 1)."
        "square().sum())}\n"
    )
    return tmp_path


def test_the_command_draws_and_resumes(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["landscape", "a.safetensors", "b.safetensors", "m.safetensors", "--evaluate", "landscape_tasks:losses"]
    command += ["-o", "out", "--resolution", "6"]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "merged network is inside" in said or "merged network is outside" in said
    for name in ("landscape.png", "landscape.svg", "paths.png", "paths.svg"):
        assert (checkpoints / "out" / name).stat().st_size > 5000, name
    summary = json.loads((checkpoints / "out/summary.json").read_text())
    assert set(summary["barriers"]) == {"A to B", "A to merged", "B to merged"}
    before = (checkpoints / "out/grid.json").read_bytes()
    assert main(command) == 0
    assert (checkpoints / "out/grid.json").read_bytes() == before
    assert not list((checkpoints / "out").glob(".*"))


def test_two_checkpoints_give_a_line_and_say_so(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["landscape", "a.safetensors", "b.safetensors", "--evaluate", "landscape_tasks:losses", "-o", "out"]
    assert main(command) == 0
    assert "only the line" in capsys.readouterr().err
    assert (checkpoints / "out/paths.png").exists()
    assert not (checkpoints / "out/landscape.png").exists()
    assert main([*command[:4], "nothing:losses", *command[5:]]) == 2
    assert "--evaluate: cannot import 'nothing'" in capsys.readouterr().err
