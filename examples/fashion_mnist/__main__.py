"""PYTHONPATH=examples python -m fashion_mnist train | evaluate | cost | landscape | elastic | table | plots"""

from __future__ import annotations

import click

from fashion_mnist.cost import main as cost
from fashion_mnist.elastic import main as elastic
from fashion_mnist.evaluate import main as evaluate
from fashion_mnist.landscapes import main as landscape
from fashion_mnist.plots import main as plots
from fashion_mnist.table import main as table
from fashion_mnist.train import main as train

commands = {
    "train": train,
    "evaluate": evaluate,
    "cost": cost,
    "landscape": landscape,
    "elastic": elastic,
    "table": table,
    "plots": plots,
}
main = click.Group("fashion_mnist", commands=commands)

if __name__ == "__main__":
    main()
