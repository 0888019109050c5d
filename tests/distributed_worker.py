"""Runs of several processes for the tests: imports once, then forks the processes of each run."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from networks import MLP
from safetensors.torch import save_file
from torch import Tensor, nn

import mudsc_fast as mf
from mudsc_fast import cli, elastic, stats_files
from mudsc_fast.checkpoints import CheckpointWriter
from mudsc_fast.checkpoints.writing import layout_of
from mudsc_fast.distributed import World, world_of
from mudsc_fast.rematch import Matcher


class Block(nn.Module):
    """A residual block with two heads."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).movedim(-3, 0)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(seen.transpose(1, 2).flatten(2))
        return x + self.fc2(torch.relu(self.fc1(x)))


class Net(nn.Module):
    """A small transformer: one residual stream that everything reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.blocks = nn.Sequential(*(Block(16, 24) for _ in range(4)))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.embed(x)))
        return out


def pair(make: type[nn.Module], **options: object) -> list[nn.Module]:
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(make(**options).eval())
    return models


def the_spec(folder: Path) -> mf.PermutationSpec:
    """Traced once by the test: tracing imports much."""
    return mf.PermutationSpec.from_json((folder.parent / "spec.json").read_text())


def merge(folder: Path, world: World | None) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 7, 6, generator=generator) for _ in range(5)]
    models = pair(Net)
    spec = the_spec(folder)
    states = [model.state_dict() for model in models]
    group = None if world is None else world.group or True
    stats = mf.calibrate(models, batches, spec, group=group)
    plans = {
        "align": mf.match(states, spec, stats, "align", group=group),
        "zip": mf.match(states, spec, stats, "zip", group=group),
        "weights": mf.match(states, spec, None, "align", balance=1.0, group=group),
        "split": mf.match(states, spec, None, "align", balance=1.0, group=group, split_hubs=True),
        "split-zip": mf.match(states, spec, stats, "zip", group=group, split_hubs=True),
    }
    nets = pair(MLP, inputs=12, widths=(16, 16), num_outputs=4)
    rows = [torch.randn(32, 12, generator=generator)]  # fewer batches than processes
    seen = mf.calibrate(nets, rows, mf.spec_for(nets[0]), group=group)
    plans["mlp"] = mf.match([n.state_dict() for n in nets], mf.spec_for(nets[0]), seen, "zip", group=group)
    writer = CheckpointWriter(folder / "out", layout_of(states[0]), max_shard_size=3000, world=world)
    with writer:
        for name, tensor in plans["weights"].merge_tensors(states, only=writer.own):
            writer.write(name, tensor)
    if world is None or world.rank == 0:
        for name, plan in plans.items():
            plan.save(folder / f"{name}.safetensors")
        (folder / "ranks.txt").write_text(str(dist.get_world_size()))


def broken(what: str, folder: Path, world: World) -> None:
    """Rank 1 dies, or fails, in the middle of matching or of writing."""
    how, _, when = what.partition("-")
    models = pair(Net)
    states = [model.state_dict() for model in models]
    spec = the_spec(folder)
    odd = world.rank == 1
    if when == "matching" and odd:
        Matcher.rematch = lambda *_, **__: os._exit(9)  # type: ignore[method-assign]
    bad = {name: torch.full_like(x, torch.nan) for name, x in states[1].items()}
    if when == "match" and odd:
        states[1] = bad
    plan = mf.match(states, spec, None, "align", balance=1.0, group=True, split_hubs=how == "fail")
    if when == "write" and odd:
        states[1] = bad
    writer = CheckpointWriter(folder / "out", layout_of(states[0]), max_shard_size=3000, world=world)
    with writer:
        for number, (name, tensor) in enumerate(plan.merge_tensors(states, only=writer.own)):
            if how == "die" and odd and number == 2:
                os._exit(9)
            writer.write(name, tensor)


def command_line(folder: Path) -> None:
    """The command, as torchrun would start it."""
    spec = str(folder.parent / "spec.json")
    given = [str(folder.parent / f"{name}.safetensors") for name in "ab"]
    stats, out = str(folder / "stats.safetensors"), str(folder / "out")
    calibrate = ["calibrate", *given, "--model", "distributed_worker:Net", "--spec", spec, "--batch-size", "3"]
    merge = ["merge", *given, "--spec", spec, "--stats", stats, "--save-plan", str(folder / "plan.safetensors")]
    for arguments in (
        [*calibrate, "--inputs", str(folder.parent / "inputs.npy"), "-o", stats],
        [*merge, "--max-shard-size", "3KB", "-o", out],
    ):
        call(arguments)


def chosen_widths(folder: Path) -> None:
    """The command with --width-budget, on the statistics of the run before; rank 1 would choose other widths."""
    choose = elastic.elastic_widths

    def narrower(states: Any, spec: mf.PermutationSpec, *given: Any, **options: Any) -> dict[str, int]:
        return {n: max(spec[n].blocks, w - spec[n].blocks) for n, w in choose(states, spec, *given, **options).items()}

    if os.environ["RANK"] == "1":
        elastic.elastic_widths = narrower
    given = [str(folder.parent / f"{name}.safetensors") for name in "ab"]
    stats, plan = folder.parent / "cli:1" / "stats.safetensors", folder / "plan.safetensors"
    merge = ["merge", *given, "--spec", str(folder.parent / "spec.json"), "--stats", str(stats), "--method", "zip"]
    call([*merge, "--width-budget", "0.8", "--save-plan", str(plan), "--no-verify", "-o", str(folder / "out")])


def resumable(what: str, folder: Path) -> None:
    """Commands with --resume: whole, cut off where rank 1 dies, or gone on with; statistics in two passes."""
    spec = str(folder.parent / "spec.json")
    given = [str(folder.parent / f"{name}.safetensors") for name in "ab"]
    stats, out = str(folder / "stats.safetensors"), str(folder / "out")
    done = {"visits": 0, "tensors": 0}
    rematch, write = Matcher.rematch, CheckpointWriter.write

    def counted_rematch(self: Matcher, *given: Any) -> Any:
        if what == "cut-matching" and os.environ["RANK"] == "1" and done["visits"] == 5:
            os._exit(9)
        done["visits"] += 1
        return rematch(self, *given)

    def counted_write(self: CheckpointWriter, name: str, tensor: Tensor) -> None:
        if what == "cut-writing" and os.environ["RANK"] == "1" and done["tensors"] == 8:
            os._exit(9)
        done["tensors"] += 1
        write(self, name, tensor)

    Matcher.rematch = counted_rematch  # type: ignore[method-assign]
    CheckpointWriter.write = counted_write  # type: ignore[method-assign]
    if what != "go-on":
        stats_files.groups_of = lambda spec, *_: [[s.name for s in spec.spaces][k::2] for k in (0, 1)]  # type: ignore[assignment]
        calibrate = ["calibrate", *given, "--model", "distributed_worker:Net", "--spec", spec, "--batch-size", "3"]
        inputs = str(folder.parent / "inputs.npy")
        call([*calibrate, "--inputs", inputs, "-o", stats, "--max-memory", "20GB"])
    done["visits"] = done["tensors"] = 0
    merge = ["merge", *given, "--spec", spec, "--stats", stats, "--split-hubs", "--resume"]
    call([*merge, "--max-shard-size", "1KB", "-o", out])
    sys.stdout.write(f"visits {done['visits']} tensors {done['tensors']}\n")
    sys.stdout.flush()


def call(arguments: list[str]) -> None:
    code = cli.main(arguments)
    if code:
        raise RuntimeError(f"{arguments[0]} gave {code}")


def rank_main(what: str, folder: Path) -> None:
    if what == "cli":
        command_line(folder)
        return
    if what == "widths":
        chosen_widths(folder)
        return
    if what == "whole" or what.startswith(("cut", "go-on")):
        resumable(what, folder)
        return
    dist.init_process_group("gloo")
    world = world_of(True)
    if what == "merge":
        merge(folder, world)
    elif world is not None:
        broken(what, folder, world)
    dist.destroy_process_group()


def forked(rank: int, what: str, folder: Path) -> int:
    """The id of a new process that is this rank; what it says goes to a file beside the folder."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        said = os.open(f"{folder}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ["RANK"] = str(rank)
        rank_main(what, folder)
        code = 0
    except BaseException:  # noqa: BLE001 (a forked child may not return to the loop of its parent)
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    """Arguments: a folder, then runs such as merge:2. Writes the exit codes of each run's processes as JSON."""
    torch.set_num_threads(1)
    root, codes = Path(sys.argv[1]), {}
    for name, model in zip("ab", pair(Net), strict=True):
        save_file(model.state_dict(), root / f"{name}.safetensors")
    np.save(root / "inputs.npy", torch.randn(20, 7, 6).numpy())
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for run in sys.argv[2:]:
        what, _, ranks = run.partition(":")
        folder = root / run
        folder.mkdir()
        began = time.monotonic()
        found = []
        for part in (what, "go-on") if what.startswith("cut") else (what,):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                os.environ |= {"MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": ranks}
            children = [forked(rank, part, folder) for rank in range(int(ranks))]
            found += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        codes[run] = {"codes": found, "seconds": time.monotonic() - began}
    (root / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
