"""The demo, hardly trained: it runs to its end, its table and picture are there, and its figures are what they say."""

from __future__ import annotations

from pathlib import Path

import digits_demo
import digits_task as task
import pytest
import torch
from digits_figure import Row, draw
from safetensors.torch import load_file
from torch import Tensor


@pytest.mark.slow
def test_the_demo_runs_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits_demo.main(["--quick", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    for line in ("parent A", "parent B", "ensemble", "plain average", *_merges(), "largest difference", ": 0\n"):
        assert line in output
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    merged, parent = (load_file(tmp_path / name) for name in ("merged.safetensors", "digits_0-4.safetensors"))
    assert {name: tensor.shape for name, tensor in merged.items()} == {name: t.shape for name, t in parent.items()}
    assert not torch.equal(merged["fc.weight"], parent["fc.weight"])


def _merges() -> list[str]:
    return [f"{method}, {compared}" for method in ("align", "zip") for compared in ("weights", "activations", "both")]


def test_test_images_are_held_out() -> None:
    digits = task.load()
    assert len(digits.test_labels) == task.TEST_IMAGES
    assert len(digits.train_labels) + len(digits.test_labels) == 1797
    test = {image.numpy().tobytes() for image in digits.test_images}
    assert not any(image.numpy().tobytes() in test for image in digits.train_images)
    assert {tuple(batch.shape[1:]) for batch in digits.calibration(100)} == {(1, 8, 8)}
    assert sum(len(batch) for batch in digits.calibration(100)) == 100


def test_class_vectors_are_orthonormal() -> None:
    vectors = task.class_vectors(64)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(10), atol=1e-6, rtol=0)


def test_accuracy_counts_what_it_says() -> None:
    digits, vectors = task.load(), task.class_vectors(64)

    def knows(classes: tuple[int, ...]) -> task.Accuracy:
        """A network that is right on `classes` and answers 0 to everything else."""
        answers = torch.where(torch.isin(digits.test_labels, torch.tensor(classes)), digits.test_labels, 0)
        return task.accuracy(lambda images: vectors[answers], digits, vectors)

    everything = knows(tuple(range(10)))
    assert (everything.joint, everything.tasks, everything.mean) == (100.0, (100.0, 100.0), 100.0)
    half = knows(task.TASKS[0])
    share = torch.isin(digits.test_labels, torch.tensor(task.TASKS[0])).double().mean().item()
    assert half.joint == pytest.approx(100 * share)
    assert half.tasks[0] == 100.0
    assert half.tasks[1] < 50.0


def test_shifted_moves_by_a_pixel() -> None:
    images = torch.zeros(2, 1, 8, 8)
    images[:, 0, 3, 4] = 1.0
    generator = torch.Generator().manual_seed(0)
    places = {tuple(task.shifted(images, generator)[0, 0].nonzero()[0].tolist()) for _ in range(60)}
    assert places == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}


def test_the_ensemble_is_the_mean_of_directions() -> None:
    first, second = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    x = torch.randn(5, 4)

    def direction(model: torch.nn.Module) -> Tensor:
        return torch.nn.functional.normalize(model(x), dim=1)

    expected = (direction(first) + direction(second)) / 2
    torch.testing.assert_close(task.ensemble([first, second])(x), expected)


def test_unit_similarity_puts_partners_on_the_diagonal() -> None:
    import mudsc_fast as mf

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 6, generator=generator)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    covariance = mf.Covariance(6)
    covariance.update([features, features[:, order]])
    space = mf.Space("h", 6, axes=(mf.Axis("w", 0, "out"),))
    labels = torch.stack([torch.arange(6), order])
    plan = mf.MergePlan(mf.PermutationSpec((space,)), {"h": labels}, "align")
    before, after = digits_demo.unit_similarity({"h": covariance}, plan, "h")  # type: ignore[arg-type]
    torch.testing.assert_close(after.diagonal().float(), torch.ones(6), atol=1e-4, rtol=0)
    assert before.diagonal().min() < 0.5


def test_the_picture_takes_any_rows(tmp_path: Path) -> None:
    rows = [Row("a", "parent", 0.0, 100.0), Row("b", "zip", 100.0, 0.0)]
    draw(rows, torch.zeros(3, 3), torch.eye(3), "space", tmp_path / "deep" / "f.png")
    assert (tmp_path / "deep" / "f.png").stat().st_size > 5000
