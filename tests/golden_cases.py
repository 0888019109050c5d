"""The recorded cases, as (name, inputs, expected), for every implementation of an op to run over.

Where the recorded output is known to be wrong by design (tests/data/goldens/README.md), the expectation here is the
corrected one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "data" / "goldens"

Case = tuple[str, dict[str, Any], dict[str, Any]]

MODELS = {"i_match2": 2, "ii_group2": 2, "iii_three_models": 3}
BUDGET_MODELS = {"c0": 2, "c1": 3}
MLP_SPACES = ("fc1", "fc2", "fc3")


@cache
def load(name: str) -> dict[str, np.ndarray]:
    """Read one recorded file."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def tensor(file: str, key: str) -> Tensor:
    """Read one recorded array, as a copy."""
    return torch.from_numpy(load(file)[key].copy())


def labels_of(unmerge: np.ndarray, models: int) -> Tensor | None:
    """Turn a recorded indicator (models*d, width) into labels (models, d); None where units were lost."""
    if not (unmerge.sum(axis=1) == 1).all():
        return None
    return torch.from_numpy(unmerge.argmax(axis=1).astype(np.int64)).reshape(models, -1)


def indices_of(labels: Tensor) -> Tensor:
    """Turn labels of an alignment into indices (models-1, d) of each model m >= 1."""
    return torch.argsort(labels[1:], dim=1)


def covariance_cases() -> Iterator[Case]:
    """Inputs: batches (one list of tensors a batch), dim, width. Expected: correlation, float64.

    "ragged" is left out: there the official code weighs batches by images, not by samples.
    """
    data = load("iv_covariance")
    for mode in ("plain", "mean", "nan", "dead", "flat"):
        batches = [[tensor("iv_covariance", f"{mode}_in_b{b}_m{m}") for m in range(2)] for b in range(3)]
        correlation = torch.from_numpy(data[f"{mode}_corr64"].copy())
        correlation.fill_diagonal_(1.0)
        yield mode, {"batches": batches, "dim": 1, "width": 24}, {"correlation": correlation}


def weight_cases() -> Iterator[Case]:
    """Inputs: matrices, one (d, K) a model. Expected: similarity, full, float32."""
    for case, models in (("c0", 2), ("c2", 3)):
        matrices = [tensor("v_weight_correlation", f"{case}_wv{m}") for m in range(models)]
        yield case, {"matrices": matrices}, {"similarity": tensor("v_weight_correlation", f"{case}_correlation")}


def regroup_cases() -> Iterator[Case]:
    """Inputs: tensor, labels, dim, size, scale. Expected: tensor, up to the official 1e-5 in its scale."""
    data = load("v_weight_correlation")
    for case, models in (("c0", 2), ("c2", 3)):
        matrix = data[f"{case}_pm"]
        labels = labels_of((matrix > 0).astype(np.uint8), models)
        if labels is None:
            raise ValueError(f"{case}: expected every unit to have a label")
        width = matrix.shape[1]
        scale = models / torch.bincount(labels.flatten(), minlength=width).double()
        for m in range(models):
            inputs = {
                "tensor": tensor("v_weight_correlation", f"{case}_permin{m}"),
                "labels": labels[m],
                "dim": 1,
                "size": width,
                "scale": scale,
            }
            yield f"{case}-m{m}", inputs, {"tensor": tensor("v_weight_correlation", f"{case}_permout{m}")}


def _keys(file: str, kind: str) -> list[str]:
    return sorted(key[: -len("_unmerge")] for key in load(file) if f"_{kind}" in key and key.endswith("_unmerge"))


def zip_cases() -> Iterator[Case]:
    """Inputs: similarity and the keyword arguments of zip_units. Expected: labels and value; labels None: an error."""
    for file, models in MODELS.items():
        for key in _keys(file, "zip") + _keys(file, "gzip"):
            parts = key.split("_")
            unmerge = load(file)[f"{key}_unmerge"]
            inputs = {
                "similarity": tensor(file, f"{parts[0]}_sims"),
                "models": models,
                "width": unmerge.shape[1],
                "attenuation": {"a5": 0.5, "a3": 0.3}[parts[-1]],
                "budget": 1.0,
                "blocks": next((int(part[1:]) for part in parts if part[0] == "g" and part != "gzip"), 1),
            }
            value = float(load(file)[f"{key}_value"])
            yield f"{file}-{key}", inputs, {"labels": labels_of(unmerge, models), "value": value}
    for key in _keys("viii_budget", "zip") + _keys("viii_budget", "gzip"):
        parts = key.split("_")
        models = BUDGET_MODELS[parts[0]]
        inputs = {
            "similarity": tensor("viii_budget", f"{parts[0]}_sims"),
            "models": models,
            "width": 24,
            "attenuation": 0.5,
            "budget": int(parts[-1][1:]) / 100,
            "blocks": 4 if "gzip" in parts else 1,
        }
        unmerge = load("viii_budget")[f"{key}_unmerge"]
        value = float(load("viii_budget")[f"{key}_value"])
        yield f"viii_budget-{key}", inputs, {"labels": labels_of(unmerge, models), "value": value}


def assign_cases() -> Iterator[Case]:
    """Inputs: similarity (models-1, d, d), blocks. Expected: indices (models-1, d) and the value over all of them."""
    for file, models in MODELS.items():
        for key in _keys(file, "perm") + _keys(file, "gperm"):
            parts = key.split("_")
            full = tensor(file, f"{parts[0]}_sims")
            d = full.shape[0] // models
            cross = torch.stack([full[:d, m * d : (m + 1) * d] for m in range(1, models)])
            labels = labels_of(load(file)[f"{key}_unmerge"], models)
            if labels is None:
                raise ValueError(f"{key}: expected every unit to have a label")
            blocks = int(parts[-1][1:]) if parts[-1][0] == "g" and parts[-1][1:].isdigit() else 1
            value = float(load(file)[f"{key}_value"])
            yield (
                f"{file}-{key}",
                {"similarity": cross, "blocks": blocks},
                {"indices": indices_of(labels), "value": value},
            )


def mlp_state_dicts() -> list[dict[str, Tensor]]:
    """Return the two trained MLPs 64-48-48-48-10 (Linear layers fc1, fc2, fc3, head; ReLU between)."""
    return [
        {key.split("/")[1]: tensor("vi_mlp", key) for key in load("vi_mlp") if key.startswith(f"m{m}/")}
        for m in range(2)
    ]


def mlp_batches() -> list[Tensor]:
    """Return the calibration inputs, (64, 64) each."""
    return list(tensor("vi_mlp", "calib_x").split(int(load("vi_mlp")["calib_batch"])))


def mlp_activation_correlation() -> dict[str, Tensor]:
    """Return the recorded activation correlation of each space, (96, 96); dead units with 1 on the diagonal."""
    result = {}
    for k, space in enumerate(MLP_SPACES):
        result[space] = tensor("vi_mlp", f"actsims/{k}").fill_diagonal_(1.0)
    return result


def mlp_cases() -> Iterator[Case]:
    """Inputs: method, balance, activations (whether they are given). Expected: labels, start, history, tensors.

    start: the labels after the activation start, where recorded, else None. labels and start: {space: (2, 48)}.
    Width 48, attenuation .5, budget 1, seed 0 throughout.
    """
    data = load("vi_mlp")
    for name, method, balance, activations in (
        ("align", "align", 0.5, True),
        ("zip", "zip", 0.5, True),
        ("align_act", "align", 0.0, True),
        ("zip_act", "zip", 0.0, True),
        ("align_w", "align", 1.0, False),
        ("zip_w", "zip", 1.0, False),
    ):
        labels = {space: labels_of(data[f"{name}_unmerge/{k}"], 2) for k, space in enumerate(MLP_SPACES)}
        start = None
        if f"{name}_actunmerge/0" in data:
            start = {space: labels_of(data[f"{name}_actunmerge/{k}"], 2) for k, space in enumerate(MLP_SPACES)}
        tensors = {key.split("/")[1]: tensor("vi_mlp", key) for key in data if key.startswith(f"{name}/")}
        expected = {"labels": labels, "start": start, "history": data[f"{name}_L"].tolist(), "tensors": tensors}
        yield name, {"method": method, "balance": balance, "activations": activations}, expected
