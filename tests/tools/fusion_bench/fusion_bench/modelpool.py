"""A pool of causal language models by their folders."""

from __future__ import annotations

from typing import Any


class CausalLMPool:
    def __init__(self, models: dict[str, str], tokenizer: str) -> None:
        self.models = models
        self.model_names = [name for name in models if not name.startswith("_")]

    def load_model(self, name: str) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.models[name])
