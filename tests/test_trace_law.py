"""The law for traced architectures: permuting all spaces found leaves the function unchanged, and they are not trivial.

Tolerances: 1e-10 where a model computes in float64; 1e-5 where it goes through float32 inside (RMSNorm of the Llama
family and of T5, Mamba's states).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
import trace_models

from mudsc_fast.spec import PermutationSpec

pytest.importorskip("transformers")
EXACT, SINGLE = 1e-10, 1e-5
IN_SINGLE = re.compile("Llama|Mistral|Qwen|Gemma|OLMo|Phi|Mixtral|Mamba|T5")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", trace_models.ALL)
def test_law(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = trace_models.ALL[name]()
    spec = PermutationSpec.trace(trace_models.randomised(model), (), inputs)
    spec.check(model.state_dict(), [n for n, _ in model.named_modules()])
    assert trace_models.described(spec) == trace_models.expected()[name]
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    changes = spec.verify_each(model.double(), inputs, seed=2)
    worst = max(changes, key=changes.__getitem__)
    assert changes[worst] < (SINGLE if IN_SINGLE.search(name) else EXACT), (worst, changes[worst])
