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

from mudsc_fast import law
from mudsc_fast.calibration import calibrate
from mudsc_fast.matching import match
from mudsc_fast.spec import PermutationSpec

pytest.importorskip("transformers")
EXACT, SINGLE = 1e-10, 1e-5
IN_SINGLE = re.compile("Llama|Mistral|Qwen|Gemma|OLMo|Phi|Mixtral|Mamba|T5|Cohere|DeepSeek|GPT-OSS")


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
    changes = spec.verify_each(*trace_models.widened(name, model, inputs), seed=2)
    worst = max(changes, key=changes.__getitem__)
    assert changes[worst] < (SINGLE if IN_SINGLE.search(name) else EXACT), (worst, changes[worst])


@pytest.mark.parametrize("name", ["Llama (GQA)", "Mixtral", "GPT-2", "T5", "DenseNet", "LSTM"])
def test_a_permuted_copy_is_matched_and_merged(name: str) -> None:
    """Traced specs serve the whole pipeline: a model and its permuted copy merge into the same function."""
    torch.manual_seed(0)
    model, inputs = trace_models.ALL[name]()
    trace_models.randomised(model)
    spec = PermutationSpec.trace(model, (), inputs)
    state = {key: t.detach().clone() for key, t in model.state_dict().items()}
    copy = spec.permute(state, spec.random_permutation(5))
    with torch.no_grad():
        before = [t.clone() for t in law.floats(law.primary(model(**inputs)))]
    for method in ("align", "zip"):
        merged = match([state, copy], spec, method=method, balance=1.0, progress=False, seed=1).merge([state, copy])
        if method == "align":
            assert all(torch.allclose(merged[key].float(), state[key].float(), atol=1e-5) for key in state)
        with torch.no_grad():
            after = torch.func.functional_call(model, merged, (), inputs, tie_weights=False)
        for a, b in zip(before, law.floats(law.primary(after)), strict=True):
            assert torch.allclose(a, b, atol=1e-3 * float(a.abs().max())), method


@pytest.mark.parametrize("name", ["Llama (GQA)", "Qwen2", "Qwen3", "Phi-3"])
def test_what_is_seen_of_a_space_does_not_depend_on_the_order_of_others(name: str) -> None:
    """Grouped queries: values and query heads are tapped where the other of the two is not among their samples."""
    torch.manual_seed(0)
    model, inputs = trace_models.ALL[name]()
    trace_models.randomised(model)
    spec = PermutationSpec.trace(model, (), inputs)
    state = {key: t.detach().clone() for key, t in model.state_dict().items()}
    order = spec.random_permutation(5)
    twin, _ = trace_models.ALL[name]()
    twin.load_state_dict(spec.permute(state, order))
    stats = calibrate([model, twin], [inputs], spec)
    for space in spec:
        if space.taps:
            cross = stats[space.name].correlation_blocks("cross")[0]
            assert float((cross[order[space.name], torch.arange(space.width)] - 1).abs().max()) < 1e-4, space.name
    for method in ("align", "zip"):
        states = [state, twin.state_dict()]
        merged = match(states, spec, stats, method, progress=False).merge(states)
        assert all(torch.allclose(merged[key].float(), state[key].float(), atol=1e-5) for key in state), method
