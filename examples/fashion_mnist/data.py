"""Fashion-MNIST from a folder with its four files, the two ways of halving its classes, and the fixed class vectors."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
SPLITS = {"halves": ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9)), "evenodd": ((0, 2, 4, 6, 8), (1, 3, 5, 7, 9))}
HELD_OUT = 2000  # the last training images: never trained on, never calibrated on; labelled choices are made on them
FEATURES = 64


@dataclass(frozen=True)
class Images:
    """Normalised images (n, 1, 28, 28) float32 and labels (n,) int64."""

    images: Tensor
    labels: Tensor

    def of(self, classes: tuple[int, ...]) -> Images:
        """Those of some classes, in order."""
        mine = torch.isin(self.labels, torch.tensor(classes))
        return Images(self.images[mine], self.labels[mine])


@dataclass(frozen=True)
class Fashion:
    """training: what parents are trained on and calibration images are drawn from; held_out: for choices with labels;
    test: for the table and nothing else."""

    training: Images
    held_out: Images
    test: Images

    def calibration(self, images: int, seed: int, batch: int = 256) -> list[Tensor]:
        """Batches of training images of all ten classes, drawn at random, without their labels."""
        order = torch.randperm(len(self.training.labels), generator=torch.Generator().manual_seed(1000 + seed))
        return list(self.training.images[order[:images]].split(batch))


def _idx(folder: Path, name: str) -> Tensor:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            break
    else:
        raise FileNotFoundError(
            f"{folder}: no {name}(.gz). Install Debian's package dataset-fashion-mnist, or put the four files of "
            "https://github.com/zalandoresearch/fashion-mnist into a folder and give it with --data"
        )
    sizes = [int.from_bytes(raw[4 + 4 * k : 8 + 4 * k], "big") for k in range(raw[3])]
    if raw[:3] != b"\0\0\x08" or len(raw) != 4 + 4 * len(sizes) + int(np.prod(sizes)):
        raise ValueError(f"{path}: not an idx file of bytes, or cut off")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes).copy())


def load(folder: Path = DEBIAN) -> Fashion:
    """The 60,000 training and 10,000 test images, normalised by the training images' mean and deviation."""
    x, y, x_test, y_test = (_idx(Path(folder), name) for name in FILES)
    mean, deviation = x.float().mean(), x.float().std()

    def images(pixels: Tensor, labels: Tensor) -> Images:
        return Images(((pixels.float() - mean) / deviation).unsqueeze(1), labels.long())

    return Fashion(images(x[:-HELD_OUT], y[:-HELD_OUT]), images(x[-HELD_OUT:], y[-HELD_OUT:]), images(x_test, y_test))


def class_vectors(seed: int = 7) -> Tensor:
    """Ten fixed orthonormal vectors (10, FEATURES): the stand-in for the text embeddings of CLIP."""
    square = torch.randn(FEATURES, 10, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(square)[0].T.contiguous()
