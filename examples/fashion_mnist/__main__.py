"""PYTHONPATH=examples python -m fashion_mnist train | evaluate | table"""

from __future__ import annotations

import click

from fashion_mnist.cost import main as cost
from fashion_mnist.evaluate import main as evaluate
from fashion_mnist.table import main as table
from fashion_mnist.train import main as train

main = click.Group("fashion_mnist", commands={"cost": cost, "train": train, "evaluate": evaluate, "table": table})

if __name__ == "__main__":
    main()
