"""The small files beside the weights of a Hugging Face folder, without which it does not load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

# Tokenizers and processors come in many parts. Weights, optimizer state, training arguments and code are left behind.
_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "normalizer.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*preprocessor_config.json",
    "processor_config.json",
)

# transformers wrote "torch_dtype" up to version 4 and writes "dtype" since.
_DTYPE_KEYS = ("torch_dtype", "dtype")


def companion_files(folder: Path) -> list[Path]:
    """The configuration and tokenizer files of a folder, by name."""
    return sorted({path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()})


def copy_companions(source: Path, target: Path, dtype: torch.dtype | None = None) -> list[Path]:
    """Copy them to ``target``; with ``dtype``, config.json says that dtype if it said one. Returns the copies."""
    copies = []
    for path in companion_files(source):
        copy = target / path.name
        if path.name == "config.json" and dtype is not None:
            copy.write_text(_with_dtype(path.read_text(encoding="utf-8"), dtype), encoding="utf-8")
        else:
            shutil.copyfile(path, copy)
        copies.append(copy)
    return copies


def _with_dtype(config: str, dtype: torch.dtype) -> str:
    try:
        fields = json.loads(config)
    except ValueError:
        return config
    if not isinstance(fields, dict):
        return config
    fields.update({key: str(dtype).removeprefix("torch.") for key in _DTYPE_KEYS if key in fields})
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
