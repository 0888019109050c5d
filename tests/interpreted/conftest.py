"""--half=0 or 1 runs every second test."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--half", type=int, default=None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    half = config.getoption("--half", default=None)
    if half is not None:
        items[:] = items[half::2]
