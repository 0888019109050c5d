"""``fusion_bench --config-dir FOLDER method=NAME modelpool=NAME merged_model_save_path=FOLDER`` without Hydra."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import yaml

OWN = {"method/simple_average": {"_target_": "fusion_bench.method.SimpleAverageAlgorithm"}}


def made(folder: Path, name: str) -> Any:
    """The object of a configuration file of the folder, or of one that the package brings."""
    path = folder / f"{name}.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else dict(OWN[name])
    module, _, target = config.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), target)(
        **{key: value for key, value in config.items() if not key.startswith("_")}
    )


def main(words: list[str]) -> None:
    given = dict(word.split("=", 1) for word in words if "=" in word)
    # As there: a folder of this name replaces the configurations of the package.
    if Path("config").is_dir():
        raise SystemExit("Cannot find primary config 'fabric_model_fusion'")
    folder = Path(words[words.index("--config-dir") + 1])
    method, pool = (made(folder, f"{kind}/{given[kind]}") for kind in ("method", "modelpool"))
    method.run(pool).save_pretrained(given["merged_model_save_path"])


main(sys.argv[1:])
