"""python -m fashion_mnist cost: seconds of a refit, and of a balance search beside one match."""

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


def seconds(work: Callable[[], object], times: int) -> dict[str, float]:
    """The least of some runs: seconds by the clock, and processor seconds of all threads together."""
    clock, processor = [], []
    for _ in range(times):
        begin, used = time.perf_counter(), time.process_time()
        work()
        clock.append(time.perf_counter() - begin)
        processor.append(time.process_time() - used)
    return {"clock": min(clock), "processor": min(processor)}


def costs(pair: Pair, times: int) -> dict[str, dict[str, float]]:
    """{step: its seconds}; a search is of the default five balances, its candidates merged but not evaluated."""
    plan = pair.plan("zip", 0.5)
    nothing: dict[str, Tensor] = {}

    def search(finish: Callable[[mf.MergePlan], dict[str, Tensor]] | None) -> object:
        states, few = pair.states, pair.stats
        return mf.search_balance(states, pair.spec, few, lambda _: 0.0, finish=finish, progress=False)

    short = max(times, 5)
    return {
        "refit": seconds(lambda: pair.refitted(plan, "unit"), times),
        "match": seconds(lambda: pair.plan("zip", 0.5), short),
        "merge": seconds(lambda: plan.merge(pair.states), short),
        "search": seconds(lambda: search(None), short),
        "search, matches alone": seconds(lambda: search(lambda _: nothing), short),
    }


@click.command("cost")
@click.option("--data", type=click.Path(path_type=Path), default=DEBIAN, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=CACHE, show_default=True)
@click.option("--network", "networks", multiple=True, type=click.Choice(list(NETWORKS)), help="Default: all.")
@click.option("--images", default=1024, show_default=True)
@click.option("--times", default=1, show_default=True, help="The least of this many runs counts.")
@click.option("--threads", default=2, show_default=True)
def main(data: Path, cache: Path, networks: tuple[str, ...], images: int, times: int, threads: int) -> None:
    """Time the steps on seed 0's parents."""
    fashion, path = load(data), cache / "cost.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    torch.set_num_threads(threads)
    for network in networks or tuple(NETWORKS):
        pair, _ = study_pair(network, "halves", 0, False, fashion, cache, images)
        found[network] = {**costs(pair, times), "threads": threads, "images": images}
        click.echo(f"{network}: {found[network]}")
        path.write_text(json.dumps(found, indent=1))
