"""python -m fashion_mnist cost: processor seconds of a refit, and of a balance search beside one match."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor

import mudsc_fast as mf
from fashion_mnist.data import DEBIAN, load
from fashion_mnist.evaluate import CACHE, study_pair
from fashion_mnist.methods import Pair
from fashion_mnist.parents import NETWORKS


def seconds(work: Callable[[], object], times: int) -> float:
    """Processor seconds, all threads together: the least of some runs."""
    found = []
    for _ in range(times):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return min(found)


@click.command("cost")
@click.option("--data", type=click.Path(path_type=Path), default=DEBIAN, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=CACHE, show_default=True)
@click.option("--network", "networks", multiple=True, type=click.Choice(list(NETWORKS)), help="Default: all.")
@click.option("--images", default=1024, show_default=True)
@click.option("--times", default=1, show_default=True, help="The least of this many runs counts.")
def main(data: Path, cache: Path, networks: tuple[str, ...], images: int, times: int) -> None:
    """Time the steps on seed 0's parents, on as many threads as torch is given."""
    fashion, path = load(data), cache / "cost.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for network in networks or tuple(NETWORKS):
        pair, _ = study_pair(network, "halves", 0, False, fashion, cache, images)
        plan = pair.plan("zip", 0.5)

        def refit(pair: Pair = pair, plan: mf.MergePlan = plan) -> None:
            pair.refitted(plan, "unit")

        def match(pair: Pair = pair) -> None:
            pair.plan("zip", 0.5)

        def merge(pair: Pair = pair, plan: mf.MergePlan = plan) -> None:
            plan.merge(pair.states)

        def search(pair: Pair = pair) -> None:
            # The matches alone: merging and judging five networks costs what it costs without a search.
            states, nothing = pair.states, dict[str, Tensor]()
            mf.search_balance(states, pair.spec, pair.stats, lambda _: 0.0, finish=lambda _: nothing, progress=False)

        found[network] = {
            "refit": seconds(refit, times),
            "match": seconds(match, max(times, 3)),
            "merge": seconds(merge, max(times, 3)),
            "search": seconds(search, max(times, 3)),
            "threads": torch.get_num_threads(),
            "images": images,
        }
        click.echo(f"{network}: {found[network]}")
        path.write_text(json.dumps(found, indent=1))
