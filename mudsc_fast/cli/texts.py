"""Calibration inputs made from plain text and from image files, as the checkpoint's own folder prepares them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mudsc_fast.cli import huggingface

if TYPE_CHECKING:
    from mudsc_fast.checkpoints import Checkpoint

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


class TextBatches:
    """Batches of token ids from the lines of a text file, without padding.

    path: UTF-8, one text a line; empty lines are left out. size: lines a batch. checkpoint: a Hugging Face folder with
    the tokenizer. longest: tokens of a line that are used.

    Lines are batched by length and cut to the shortest of their batch, so that no statistics come from padding. Raises
    ValueError for a checkpoint without a tokenizer and a file without text.
    """

    def __init__(self, path: Path, size: int, checkpoint: Checkpoint, longest: int) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"--text: no such file: {path}")
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError as error:
            raise ValueError(f"--text {path}: expected UTF-8 text ({error})") from error
        lines = [line for line in lines if line]
        if not lines:
            raise ValueError(f"--text {path}: expected at least one line of text, got none")
        tokenizer = _from_folder(checkpoint, "AutoTokenizer", "--text")
        ids = [tokenizer(line, truncation=True, max_length=longest)["input_ids"] for line in lines]
        self._lines = sorted((line for line in ids if line), key=len)
        self._size = size
        self.rows = len(self._lines)

    def __len__(self) -> int:
        return -(-self.rows // self._size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for first in range(0, self.rows, self._size):
            part = self._lines[first : first + self._size]
            yield {"input_ids": torch.tensor([line[: len(part[0])] for line in part])}


class ImageBatches:
    """Batches of pixels from the image files of a folder and its subfolders, in the order of their names.

    size: images a batch. checkpoint: a Hugging Face folder; its config.json says the size and the channels, its
    preprocessor_config.json the mean and deviation of the pixels, if it is there (else 0.5 and 0.5).
    dtype: of the pixels. Raises ValueError without Pillow, without images, and for files that are none.
    """

    def __init__(self, path: Path, size: int, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        if not path.is_dir():
            raise FileNotFoundError(f"--images: no such folder: {path}")
        self._files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _IMAGES)
        if not self._files:
            raise ValueError(f"--images {path}: expected {', '.join(_IMAGES)} files, found none")
        self._open = _opener()
        config = huggingface.read_config(checkpoint)
        prepared = (checkpoint.folder or Path()) / "preprocessor_config.json"
        said = json.loads(prepared.read_text(encoding="utf-8")) if prepared.is_file() else {}
        self._side = _side(said.get("crop_size") or said.get("size") or config.get("image_size"))
        self._channels = int(config.get("num_channels", 3))
        mean, deviation = said.get("image_mean", 0.5), said.get("image_std", 0.5)
        self._mean, self._deviation = (
            torch.as_tensor(x, dtype=torch.float32).reshape(-1, 1, 1) for x in (mean, deviation)
        )
        self._size, self._dtype = size, dtype
        self.rows = len(self._files)

    def __len__(self) -> int:
        return -(-self.rows // self._size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for first in range(0, self.rows, self._size):
            yield {"pixel_values": torch.stack([self._pixels(p) for p in self._files[first : first + self._size]])}

    def _pixels(self, path: Path) -> Tensor:
        import numpy as np

        try:
            with self._open(path) as image:
                mode = "L" if self._channels == 1 else "RGB"
                array = np.asarray(image.convert(mode).resize((self._side[1], self._side[0])), dtype=np.float32) / 255
        except OSError as error:
            raise ValueError(f"--images: {path} is no readable image ({error})") from error
        pixels = torch.from_numpy(array.copy())
        pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        return ((pixels - self._mean) / self._deviation).to(self._dtype)


def _opener() -> Any:
    try:
        return importlib.import_module("PIL.Image").open
    except ImportError as error:
        raise ValueError("--images: Pillow reads image files: pip install pillow") from error


def _side(said: Any) -> tuple[int, int]:
    """(height, width) of what configs call a size; 224 where they are silent."""
    if isinstance(said, dict):
        edge: Any = said.get("shortest_edge", 224)
        return int(said.get("height", edge)), int(said.get("width", edge))
    if isinstance(said, list | tuple):
        return int(said[0]), int(said[1])
    return (int(said), int(said)) if said else (224, 224)


def _from_folder(checkpoint: Checkpoint, loader: str, option: str) -> Any:
    if not huggingface.has_config(checkpoint):
        raise ValueError(f"{option}: needs a Hugging Face folder, {checkpoint.path} is none; give --inputs")
    try:
        transformers: Any = importlib.import_module("transformers")
        return getattr(transformers, loader).from_pretrained(str(checkpoint.folder), local_files_only=True)
    except ImportError as error:
        raise ValueError(f"{option}: needs transformers: pip install 'mudsc-fast[hf]' ({error})") from error
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{option}: {checkpoint.path} has no tokenizer that can be loaded ({reason})") from error
