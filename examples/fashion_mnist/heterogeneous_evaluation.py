"""Four different tasks on one merged encoder, each with its own head."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import mudsc_fast as mf
from fashion_mnist.data import Fashion
from fashion_mnist.heterogeneous import TASKS, TaskNetwork, path_of, pose, score
from fashion_mnist.parents import load
from mudsc_fast.plan import MergePlan

HEAD = ("head.weight", "head.bias")


def trained(task: str, seed: int, folder: Path) -> nn.Module:
    """The trained network of a task; FileNotFoundError says how to train it."""
    path = path_of(task, seed, folder)
    if not path.exists():
        raise FileNotFoundError(f"{path}: not trained yet: python -m fashion_mnist train")
    model = TaskNetwork(TASKS[task])
    model.load_state_dict(load(path)[0])
    return model.eval().requires_grad_(False)


def merged_networks(models: list[nn.Module], calibration: list[Tensor]) -> dict[str, Callable[[], list[nn.Module]]]:
    """{method: makes one network a task, all with the same encoder}."""
    states = [model.state_dict() for model in models]
    spec = mf.PermutationSpec.trace(models[0], (calibration[0][:4],))
    shared = mf.shared_spec(spec, states)
    encoders = [{k: v for k, v in state.items() if k not in HEAD} for state in states]
    stats = mf.calibrate(models, calibration, shared)

    def matched(balance: float) -> MergePlan:
        return mf.match(encoders, shared, stats, "zip", balance=balance, progress=False)

    def averaged() -> list[nn.Module]:
        mean = {k: torch.stack([e[k] for e in encoders]).mean(0) for k in encoders[0]}
        return [mf.installed(m, {**s, **mean}) for m, s in zip(models, states, strict=True)]

    def zipped(balance: float) -> list[nn.Module]:
        net = mf.merge_partially(models, matched(balance), spec)
        return [_Output(net, m) for m in range(len(models))]

    def random_units() -> MergePlan:
        """A selection by noise: as many units of every parent, whatever they do."""
        generator = torch.Generator().manual_seed(0)
        noise = {space.name: mf.Covariance(space.width, len(models)) for space in shared.spaces}
        for space in shared.spaces:
            size = torch.rand(len(models), space.width, generator=generator) + 0.5
            draws = torch.randn(len(models), 6 * space.width, space.width, generator=generator) * size[:, None]
            noise[space.name].update(list(draws))
        return mf.match(None, shared, noise, "select", balance=0.0, progress=False)

    def refitted(plan: MergePlan) -> list[nn.Module]:
        trunk = mf.installed(models[0], {**states[0], **plan.merge(encoders)})
        mf.refit(trunk, models, calibration, plan, part="inner")
        state = {k: v for k, v in trunk.state_dict().items() if k not in HEAD}
        space = shared.spaces[-1].name
        nets = []
        for m, (model, own) in enumerate(zip(models, states, strict=True)):
            head = mf.regroup(own["head.weight"], plan.labels[space][m], 1, plan.widths[space])
            net = mf.installed(model, {**own, **state, "head.weight": head})
            # The head is solved for what it gave in its own parent.
            mf.refit(net, [model], calibration, plan, part="last")
            nets.append(net)
        return nets

    def one_body(which: int) -> list[nn.Module]:
        """One parent's encoder as it is, and every head solved on it for what it gave in its own parent."""
        plan, nets = matched(0.5), []
        for model, own in zip(models, states, strict=True):
            nets.append(mf.installed(model, {**own, **encoders[which]}))
            mf.refit(nets[-1], [model], calibration, plan, part="last")
        return nets

    controls = {
        f"control: body of {task}, heads solved": lambda which=which: one_body(which)  # type: ignore[misc]
        for which, task in enumerate(TASKS)
    }
    return {
        "average": averaged,
        "activation zip (ZipIt)": lambda: zipped(0.0),
        "weight zip": lambda: zipped(1.0),
        "MuDSC zip, balance 0.5": lambda: zipped(0.5),
        "MuDSC zip + refit": lambda: refitted(matched(0.5)),
        **controls,
        "control: random units + refit": lambda: refitted(random_units()),
    }


class _Output(nn.Module):
    def __init__(self, net: nn.Module, which: int) -> None:
        super().__init__()
        self.net, self.which = net, which

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)[self.which]
        return result


@torch.no_grad()
def evaluate(seed: int, data: Fashion, folder: Path, images: int, every: int) -> Path:
    """Measure the methods that one seed's file lacks on its four parents."""
    path = folder / "results" / f"mlp-heterogeneous-{seed}.json"
    rows: dict[str, dict[str, float]] = json.loads(path.read_text())["rows"] if path.exists() else {}
    models = [trained(task, seed, folder) for task in TASKS]
    # Half of the images turned, as the rotation task sees them.
    batches = data.calibration(images, seed)
    generator = torch.Generator().manual_seed(seed)
    calibration = [x if k % 2 else pose("rotation", x, x, generator)[0] for k, x in enumerate(batches)]
    test = data.test.images[::every], data.test.labels[::every]
    posed = {task: pose(task, *test, torch.Generator().manual_seed(1)) for task in TASKS}

    def row(nets: list[nn.Module]) -> dict[str, float]:
        return {t: score(t, net.eval()(posed[t][0]), posed[t][1]) for t, net in zip(TASKS, nets, strict=True)}

    if "parents" not in rows:
        rows["parents"] = row(models)
    for name, make in merged_networks(models, calibration).items():
        if name not in rows:
            rows[name] = row(make())
    for found in rows.values():
        found["share"] = sum(found[t] / rows["parents"][t] for t in TASKS) / len(TASKS)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(json.dumps({"rows": rows}, indent=1))
    os.replace(temporary, path)
    return path
