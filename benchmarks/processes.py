"""Matching on several processes: measured on this machine, and what the measured steps give on more of them.

    python -m benchmarks.processes --json benchmarks/results/processes.json

A small Llama and its permuted, noisy copy are matched by 1, 2 and 4 processes of one thread each on gloo, with the
residual stream visited by one process and (split) by all. The labels have to be those of one process. Every visit of a
space is timed in the run of one; which visits may run side by side, and which process does which, is what
`mudsc_fast.distributed` says, so the time on N processes follows from these.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast.distributed import hubs, levels, owners
from mudsc_fast.rematch import Match, Matcher

NODES = (1, 2, 4, 8, 16, 32, 64)
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
DEEPER = (32, 80)  # layers to which the measured visits are extrapolated
SEED = 0


def network(layers: int) -> tuple[mf.PermutationSpec, list[dict[str, Tensor]]]:
    """The spec of a small Llama, its random weights, and those of a permuted copy with 5 % noise."""
    import transformers

    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=layers, vocab_size=2048)
    model = transformers.LlamaForCausalLM(config)
    spec = mf.spec_for(model)
    state = {name: x.detach() for name, x in model.state_dict().items()}
    copy = spec.permute(state, spec.random_permutation(1))
    return spec, [state, {name: x + 0.05 * x.std() * torch.randn_like(x) for name, x in copy.items()}]


def matched(
    spec: mf.PermutationSpec, states: Sequence[Mapping[str, Tensor]], group: Any, split: bool = False
) -> tuple[float, mf.MergePlan]:
    """Seconds of a match by weights, and its plan."""
    start = time.perf_counter()
    options: dict[str, Any] = {"balance": 1.0, "seed": SEED, "progress": False, "group": group, "split_hubs": split}
    plan = mf.match(list(states), spec, method="align", **options)
    return time.perf_counter() - start, plan


def one_rank(rank: int, ranks: int, port: int, given: Any, split: bool, answer: Any) -> None:
    """A process of a run: matches with the others and hands back its time."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    dist.barrier()
    seconds, plan = matched(*given, True, split)
    dist.destroy_process_group()
    answer.put((rank, seconds, {name: labels.tolist() for name, labels in plan.labels.items()} if rank == 0 else None))


def run(ranks: int, given: Any, split: bool = False) -> tuple[float, dict[str, list[list[int]]]]:
    """Seconds of the slowest of several processes, and the labels."""
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=one_rank, args=(rank, ranks, port, given, split, answer)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = [answer.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    return max(seconds for _, seconds, _ in found), next(labels for _, _, labels in found if labels is not None)


class Timed:
    """Seconds of every visit of a match, in order, by the names of its spaces; and all labels that were made."""

    def __init__(self) -> None:
        self.visits: list[tuple[tuple[str, ...], float]] = []
        self._rematch = Matcher.rematch

    def __enter__(self) -> Timed:
        def timed(matcher: Matcher, tie: Any, *args: Any, **kwargs: Any) -> list[Match]:
            start = time.perf_counter()
            found = self._rematch(matcher, tie, *args, **kwargs)
            self.visits.append((tuple(space.name for space in tie), time.perf_counter() - start))
            return found

        Matcher.rematch = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Matcher.rematch = self._rematch  # type: ignore[method-assign]


def ties_of(spec: mf.PermutationSpec) -> tuple[dict[str, tuple[str, ...]], dict[Any, set[Any]], dict[Any, float]]:
    """Each space's tie, which ties read each other, and what `match` takes for their costs."""
    tie = {s.name: tuple(o.name for o in spec if o is s or (s.tie is not None and o.tie == s.tie)) for s in spec}
    near: dict[Any, set[Any]] = {t: set() for t in tie.values()}
    for space in spec:
        for other in spec.neighbours(space.name):
            near[tie[space.name]].add(tie[other])
            near[tie[other]].add(tie[space.name])
    costs = {t: float(sum(spec[n].width ** 2 * len(spec[n].axes) for n in t)) for t in near}
    return tie, near, costs


def predicted(
    spec: mf.PermutationSpec, seconds: Mapping[Any, float], sizes: Sequence[int], sweeps: int, split: bool = False
) -> list[float]:
    """Seconds of the sweeps on each number of processes, each visit taking `seconds` of its tie.

    split: the visits of hubs are divided by the number of processes, which leaves out their assignment and the network.
    """
    tie, near, costs = ties_of(spec)
    apart = hubs(near)
    generator = torch.Generator().manual_seed(SEED)
    orders = [torch.randperm(len(spec), generator=generator).tolist() for _ in range(sweeps)]
    spaces = list(spec)
    result = []
    for size in sizes:
        of = owners(costs, near, size)
        total = 0.0
        for order in orders:
            seen: set[Any] = set()
            visits = []
            for k in order:  # a tie is visited once for each of its spaces, but matched anew only once a sweep
                name = tie[spaces[k].name]
                if name not in seen:
                    visits.append(name)
                    seen.add(name)
            for level in levels(visits, near):
                load = [0.0] * size
                for k in level:
                    if split and visits[k] in apart:
                        total += seconds[visits[k]] / size
                        continue
                    load[of[visits[k]]] += seconds[visits[k]]
                total += max(load)
        result.append(total)
    return result


def deeper(
    spec: mf.PermutationSpec, seconds: Mapping[Any, float], layers: int
) -> tuple[mf.PermutationSpec, dict[Any, float]]:
    """The network with more layers: the measured ones again, and a residual stream that takes longer by as much."""
    import transformers

    with torch.device("meta"):
        config = transformers.LlamaConfig(**SIZES, num_hidden_layers=layers, vocab_size=2048)
        longer = mf.spec_for(transformers.LlamaForCausalLM(config))
    tie, _, _ = ties_of(longer)
    measured = max(int(n.split(".")[1]) for t in seconds for n in t if n.startswith("layers.")) + 1
    result = {}
    for names in set(tie.values()):
        if names[0].startswith("layers."):
            number = int(names[0].split(".")[1])
            like = tuple(n.replace(f"layers.{number}.", f"layers.{number % measured}.", 1) for n in names)
            result[names] = seconds[like]
        else:
            result[names] = seconds[names] * layers / measured
    return longer, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec, states = network(options.layers)
    # Everything forked inherits the weights; nothing has started a thread yet.
    single, labels = run(1, (spec, states))
    measured: dict[str, Any] = {"1": {"seconds": single}}
    for ranks in options.ranks:
        for split in (False, True):
            seconds, found = run(ranks, (spec, states), split)
            if found != labels:
                raise SystemExit(f"{ranks} processes gave other labels than one")
            measured[f"{ranks}{' split' if split else ''}"] = {"seconds": seconds, "speedup": single / seconds}
    with Timed() as timed:
        _, plan = matched(spec, states, None)
    hidden = spec.random_permutation(1)
    right = all(torch.equal(plan.labels[name][1], order) for name, order in hidden.items())
    _, near, _ = ties_of(spec)
    each = {names: [s for n, s in timed.visits if n == names] for names in near}
    mean = {names: sum(s) / len(s) for names, s in each.items()}
    sweeps = max(len(s) for s in each.values())
    hub = max(near, key=lambda names: len(near[names]))
    bytes_of = {"/".join(names): sum(2 * spec[n].width * 8 for n in names) for names in near}
    figures: dict[str, Any] = {
        "about": {
            "command": f"python -m benchmarks.processes --layers {options.layers}",
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "mudsc_fast": mf.__version__,
        },
        "network": {**SIZES, "layers": options.layers, "spaces": len(spec), "planted_recovered": right},
        "measured": measured,
        "visits": {
            "/".join(n): {"seconds": mean[n], "visits": len(each[n]), "bytes": bytes_of["/".join(n)]} for n in near
        },
        "share_of_hub": mean[hub] / sum(mean.values()),
        "predicted": {},
    }
    for layers in (options.layers, *DEEPER):
        longer, seconds = (spec, mean) if layers == options.layers else deeper(spec, mean, layers)
        for split in (False, True):
            row = predicted(longer, seconds, NODES, sweeps, split)
            figures["predicted"][f"{layers}{' split' if split else ''}"] = dict(zip(map(str, NODES), row, strict=True))
    print(f"{len(spec)} spaces, {sweeps} sweeps; the planted permutation {'was' if right else 'WAS NOT'} found")
    for ranks, row in measured.items():
        print(f"{ranks} processes: {row['seconds']:.2f} s, {single / row['seconds']:.2f} times as fast as one")
    print(f"{'/'.join(hub)} takes {figures['share_of_hub']:.0%} of a sweep's visits and runs alone")
    for layers, row in figures["predicted"].items():
        print(f"predicted speed-up, {layers} layers: " + ", ".join(f"{n}: {row['1'] / s:.1f}" for n, s in row.items()))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
