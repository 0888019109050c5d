"""The base class of methods, and the method that the document starts from."""

from __future__ import annotations

from typing import Any, ClassVar


class BaseAlgorithm:
    _config_mapping: ClassVar[dict[str, str]] = {"_usage_": "_usage_"}

    def run(self, modelpool: Any) -> Any:
        raise NotImplementedError


class SimpleAverageAlgorithm(BaseAlgorithm):
    def run(self, modelpool: Any) -> Any:
        models = [modelpool.load_model(name) for name in modelpool.model_names]
        states = [model.state_dict() for model in models]
        models[0].load_state_dict({k: sum(state[k] for state in states) / len(states) for k in states[0]})
        return models[0]
