"""Draws docs/images/rules: one picture for each rule of the method, from small runs of the package itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mudsc_fast as mf  # noqa: E402

UNITS = 8
COLOURS = "tab20"


ORDER = torch.randperm(UNITS, generator=torch.Generator().manual_seed(7))


def features() -> tuple[Tensor, Tensor]:
    """Activations of two models whose units are alike in another order, (samples, units)."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, UNITS, generator=generator)
    x[:, 5] = x[:, 2] + 0.4 * torch.randn(400, generator=generator)  # two units of one model are alike too
    return x, x[:, ORDER] + 0.5 * torch.randn(400, UNITS, generator=generator)


def similarity(scope: str = "full") -> Tensor:
    """Their correlation: all units with all, or model 0 with model 1."""
    covariance = mf.Covariance(UNITS, scope=scope)
    covariance.update(list(features()))
    found = covariance.correlation()
    return found if scope == "full" else found[0]


def weights() -> tuple[Tensor, Tensor]:
    """A layer of two models, (units, inputs): the second is the first, both axes reordered, with noise."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(UNITS, 6, generator=generator)
    columns = torch.randperm(6, generator=generator)
    return w, w[ORDER][:, columns] + 0.2 * torch.randn(UNITS, 6, generator=generator)


def heat(ax: Any, matrix: Tensor, title: str, down: str, across: str, limit: float = 1.0) -> None:
    """A matrix in colours; down, across: what its rows and columns are."""
    ax.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
    ax.set(title=title, ylabel=down, xlabel=across, xticks=[], yticks=[])


def all_units(ax: Any, matrix: Tensor, title: str) -> None:
    """A similarity of all units with all, with lines between the models."""
    heat(ax, matrix, title, "units of both models", "units of both models")
    for line in (ax.axhline, ax.axvline):
        line(UNITS - 0.5, color="black", linewidth=0.8)


def pairs(ax: Any, indices: Tensor, title: str, blocks: int = 1) -> None:
    """Units of model 0 on the left, of model 1 on the right, a line for each pair."""
    size = len(indices) // blocks
    for i, j in enumerate(indices.tolist()):
        ax.plot([0, 1], [-i - i // size, -j - j // size], "o-", color=f"C{i // size if blocks > 1 else i % 10}")
    for side, x in enumerate((0, 1)):
        ax.text(x, 0.7, f"model {side}", ha="center", fontsize=9)
    ax.set(title=title, ylim=(None, 1.4))
    ax.axis("off")


def grid(ax: Any, labels: Tensor, title: str) -> None:
    """Labels as coloured numbers, a row a model."""
    ax.imshow(labels, cmap=COLOURS, vmin=0, vmax=19, aspect="auto")
    for m, i in ((m, i) for m in range(labels.shape[0]) for i in range(labels.shape[1])):
        ax.text(i, m, int(labels[m, i]), ha="center", va="center", fontsize=9)
    ax.set_yticks(range(labels.shape[0]), [f"model {m}" for m in range(labels.shape[0])])
    ax.set(title=title, xlabel="units", xticks=[])


def rule1(axes: Any) -> None:
    heat(axes[0], features()[0][:8].T, "activations of model 0", "units", "samples", 2)
    heat(axes[1], features()[1][:8].T, "activations of model 1", "units", "samples", 2)
    all_units(axes[2], similarity(), "correlation")


def in_order(b: Tensor) -> Tensor:
    """Model 1's layer with its inputs in model 0's order, as the space of the inputs knows it."""
    a, _ = weights()
    cross = torch.corrcoef(torch.cat([a.T, b[ORDER.argsort()].T]))[:6, 6:]
    return b[:, mf.assign(cross).indices]


def rule2(axes: Any) -> None:
    a, b = weights()
    heat(axes[0], a, "weights of model 0", "units", "inputs", 2)
    heat(axes[1], b, "weights of model 1", "units", "inputs, in its own order", 2)
    heat(axes[2], in_order(b), "weights of model 1", "units", "inputs, in model 0's order", 2)


def rule3(axes: Any) -> None:
    a, b = weights()
    found = [mf.weight_similarity([[a, in_order(b)]], scope="cross")[0], similarity("cross")]
    for ax, matrix, title in zip(
        axes, (*found, (found[0] + found[1]) / 2), ("by weights", "by activations", "balance 0.5"), strict=True
    ):
        heat(ax, matrix, title, "units of model 0", "units of model 1")


def rule4(axes: Any) -> None:
    cross = similarity("cross")
    found = mf.assign(cross).indices
    heat(axes[0], cross, "similarity", "units of model 0", "units of model 1")
    pairs(axes[1], found, "greatest sum")
    heat(axes[2], cross[:, found], "reordered", "units of model 0", "units of model 1")


def rule5(axes: Any) -> None:
    found = mf.zip_units(similarity(), width=UNITS)
    all_units(axes[0], similarity(), "similarity")
    grid(axes[1], found.labels, "labels: whose merged unit")
    order = found.labels.flatten().argsort(stable=True)
    heat(axes[2], similarity()[order][:, order], "sorted by label", "units", "units")


def rule6(axes: Any) -> None:
    cross = similarity("cross")
    found = mf.assign_blocks(cross, blocks=4)
    heat(axes[0], cross, "similarity", "units of model 0", "units of model 1")
    tiles = cross.reshape(4, 2, 4, 2).transpose(1, 2).flatten(0, 1)  # a pair of blocks each
    heat(axes[1], mf.assign(tiles).value.reshape(4, 4), "score of two blocks", "blocks of model 0", "blocks of model 1")
    pairs(axes[2], found.indices, "blocks move whole", blocks=4)


def rule7(axes: Any) -> None:
    found = mf.zip_units(similarity(), width=UNITS, blocks=4)
    all_units(axes[0], similarity(), "similarity")
    grid(axes[1], found.labels, "labels inside paired blocks")
    order = found.labels.flatten().argsort(stable=True)
    heat(axes[2], similarity()[order][:, order], "sorted by label", "units", "units")


def rule8(axes: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in (("fc1", (40, 12)), ("fc2", (40, 40)), ("fc3", (40, 40)), ("head", (5, 40))):
        state[f"{name}.weight"] = torch.randn(shape, generator=generator)
        state[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
    spec = mf.spec_for(state)
    other = spec.permute(state, spec.random_permutation(1))
    other = {name: x + 0.5 * torch.randn(x.shape, generator=generator) for name, x in other.items()}
    history = mf.match([state, other], spec, balance=1.0, progress=False).history
    axes[0].plot(range(1, len(history) + 1), history, "o-")
    axes[0].set(title="mean similarity", xlabel="sweeps", ylabel="L", xticks=range(1, len(history) + 1))
    for ax, seed in zip(axes[1:], (0, 1), strict=True):
        order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
        ax.text(0.5, 0.5, "\n".join(f"{k + 1}. fc{int(s) + 1}" for k, s in enumerate(order)), ha="center", va="center")
        ax.set_title(f"visits, seed {seed}")
        ax.axis("off")


def rule9(axes: Any) -> None:
    labels = mf.zip_units(similarity(), width=UNITS).labels
    indicator = torch.nn.functional.one_hot(labels.flatten(), UNITS).float()
    heat(axes[0], indicator, "U: which merged unit", "units of both models", "merged units")
    heat(axes[1], indicator / indicator.sum(0), "M: share in its mean", "units of both models", "merged units")
    x = torch.cat(list(weights()))
    heat(axes[2], (indicator.T @ x) / indicator.sum(0)[:, None], "merged layer", "merged units", "inputs", 2)


RULES: tuple[Callable[[Any], None], ...] = (rule1, rule2, rule3, rule4, rule5, rule6, rule7, rule8, rule9)


def draw(folder: Path) -> list[Path]:
    """Draw all pictures into the folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"axes.titlesize": 11, "axes.labelsize": 9})
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for k, rule in enumerate(RULES, 1):
        figure, axes = pyplot.subplots(1, 3, figsize=(7.5, 2.7))
        rule(axes)
        figure.tight_layout()
        made.append(folder / f"rule{k}.png")
        figure.savefig(made[-1], dpi=110, metadata={"Software": None})
        pyplot.close(figure)
    return made


if __name__ == "__main__":
    for path in draw(ROOT / "docs" / "images" / "rules"):
        print(path.relative_to(ROOT))
