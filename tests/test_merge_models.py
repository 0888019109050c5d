"""The whole way in one call, against the single steps and the reference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pipeline_cases import ARCHITECTURES
from torch import Tensor, nn

import mudsc_fast as mf
from mudsc_fast.batches import placed

# float32 similarities and statistics against float64 ones.
TOLERANCE = 1e-5


@pytest.mark.parametrize("method", ["align", "zip"])
@pytest.mark.parametrize("name", ["mlp", "resnet", "groupnorm", "vit"])
def test_one_call_equals_the_reference(name: str, method: str) -> None:
    case = ARCHITECTURES[name]
    models, batches = case.models(2), case.batches()
    before = [copy.deepcopy(model.state_dict()) for model in models]
    merged = mf.merge_models(models, batches, method=method)
    expected = mf.reference.merge_models(models, batches, case.spec, method)
    assert list(merged) == list(before[0])
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[key], atol=TOLERANCE, rtol=TOLERANCE)
    for model, old in zip(models, before, strict=True):
        assert not model.training
        assert all(torch.equal(tensor, old[key]) for key, tensor in model.state_dict().items())
    network = case.build(0)
    network.load_state_dict(merged)


def test_options_reach_the_steps() -> None:
    case = ARCHITECTURES["mlp"]
    models, batches = case.models(3), case.batches()
    state_dicts = [model.state_dict() for model in models]
    stats = mf.calibrate(models, batches, case.spec)
    plan = mf.match(state_dicts, case.spec, stats, "zip", balance=0.3, width=0.5, budget=0.9, seed=4)
    expected = plan.merge(state_dicts, weights=[1, 2, 3])
    merged = mf.merge_models(
        models, batches, case.spec, "zip", weights=[1, 2, 3], balance=0.3, width=0.5, budget=0.9, seed=4
    )
    assert merged["fc1.weight"].shape == (5, 7)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in merged.items())


def test_a_generator_serves_both_passes() -> None:
    case = ARCHITECTURES["resnet"]
    models, batches = case.models(2), case.batches()
    once = mf.merge_models(models, (x for x in batches))
    twice = mf.merge_models(models, batches)
    assert all(torch.equal(tensor, twice[key]) for key, tensor in once.items())


def test_batch_norm_is_reset_at_other_widths_too() -> None:
    case = ARCHITECTURES["resnet"]
    models, batches = case.models(2), case.batches()
    merged = mf.merge_models(models, batches, width=0.6, balance=1.0)
    assert merged["bn1.running_mean"].shape == (3,)
    outputs = [torch.nn.functional.conv2d(x, merged["conv1.weight"], padding=1) for x in batches]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    torch.testing.assert_close(merged["bn1.running_mean"], mean, atol=1e-6, rtol=1e-5)
    assert int(merged["bn1.num_batches_tracked"]) == len(batches)
    assert models[0].bn1.running_mean.shape == (5,)


def test_without_a_reset_the_statistics_are_averaged() -> None:
    case = ARCHITECTURES["resnet"]
    models = case.models(2)
    state_dicts = [model.state_dict() for model in models]
    merged = mf.merge_models(models, None, reset_bn=False, method="align")
    expected = mf.match(state_dicts, case.spec, None, "align").merge(state_dicts)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in merged.items())
    with pytest.warns(UserWarning, match="batch-norm statistics are only averaged"):
        again = mf.merge_models(models, method="align")
    assert all(torch.equal(tensor, merged[key]) for key, tensor in again.items())


def test_a_model_and_its_permuted_copy_give_the_model_back() -> None:
    case = ARCHITECTURES["vit"]
    model = case.models(1)[0]
    for method in ("align", "zip"):
        merged = mf.merge_models([model, case.permuted(model, 2)], case.batches(), method=method)
        assert all(torch.equal(merged[key], tensor) for key, tensor in model.state_dict().items())


def test_training_models_stay_training_and_heads_are_accepted() -> None:
    case = ARCHITECTURES["resnet"]
    models = [model.train() for model in case.models(2)]
    heads = [torch.eye(4)] * 2
    merged = mf.merge_models(models, case.batches(), heads=heads)
    assert all(module.training for model in models for module in model.modules())
    again = mf.merge_models([model.eval() for model in models], case.batches())
    assert all(torch.equal(tensor, again[key]) for key, tensor in merged.items())


def test_a_hugging_face_model_with_keyword_batches() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=10, image_size=4, patch_size=2
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    spec = mf.spec_for(model)
    other = transformers.ViTForImageClassification(config).eval()
    other.load_state_dict(spec.permute(model.state_dict(), spec.random_permutation(1)))
    batches = [{"pixel_values": torch.randn(16, 3, 4, 4)} for _ in range(2)]
    merged = mf.merge_models([model, other], batches, method="align", weights=[1, 2])
    assert all(torch.equal(merged[key], tensor) for key, tensor in model.state_dict().items())


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twisted = nn.Bilinear(3, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.twisted(x, x)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"models": []}, ValueError, "models: expected two or more, got 0"),
        ({"models": ARCHITECTURES["resnet"].models(1)}, ValueError, "models: expected two or more, got 1"),
        ({"models": [{}, {}]}, TypeError, "models: expected torch modules, got dict for model 0"),
        ({"method": "finest"}, ValueError, "method: expected one of align, zip, select, best, got 'finest'"),
        ({"batches": None, "reset_bn": False, "balance": 0}, ValueError, "batches: balance 0 compares activations"),
        ({"batches": []}, ValueError, "batches: expected at least one batch"),
        ({"batches": torch.zeros(2, 2, 6, 6)}, TypeError, "put it in a list"),
        ({"models": [Unknown(), Unknown()], "batches": None}, ValueError, "no known architecture"),
        (
            {"models": [ARCHITECTURES["resnet"].models(1)[0], ARCHITECTURES["groupnorm"].models(1)[0]]},
            ValueError,
            "model",
        ),
        ({"unheard": 1}, TypeError, "unheard"),
        ({"balance": 2}, ValueError, "balance"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    case = ARCHITECTURES["resnet"]
    arguments = {"models": case.models(2), "batches": case.batches(), **change}
    with pytest.raises(error, match=message):
        mf.merge_models(**arguments)


def test_models_spread_over_devices_stay_where_they_are() -> None:
    spread = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="device: model 0 is spread over cpu, meta"):
        placed([spread], torch.device("cpu")).__enter__()
    with placed([spread, nn.Identity()], None) as homes:
        assert homes == [torch.device("cpu")] * 2
    with placed([nn.Identity()], torch.device("meta")) as homes:
        assert homes == [torch.device("meta")]


@pytest.mark.cuda
def test_cuda_equals_cpu() -> None:
    case = ARCHITECTURES["resnet"]
    models, batches = case.models(2), case.batches()
    expected = mf.merge_models(models, batches)
    merged = mf.merge_models(models, batches, device="cuda")
    for key, tensor in merged.items():
        assert tensor.device.type == "cpu"
        torch.testing.assert_close(tensor, expected[key], atol=1e-4, rtol=1e-4)
