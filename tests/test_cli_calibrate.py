"""mudsc-fast calibrate: networks from a factory or a config.json, inputs from files, and what is wrong with them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mudsc_fast as mf
from mudsc_fast.cli import main

FACTORY = """
import networks
def build():
    return networks.MLP(inputs=12, widths=(20, 16), num_outputs=5)
def wide():
    return networks.MLP(inputs=12, widths=(21, 16), num_outputs=5)
def nothing():
    return None
def needy(x):
    return None
class holder:
    build = build
value = 3
"""
CALL = ("calibrate", "a.safetensors", "b.safetensors", "-o", "s.safetensors")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("mlpfactory", None)
    (tmp_path / "mlpfactory.py").write_text(FACTORY)
    (tmp_path / "brokenfactory.py").write_text("import no_such_module")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        save_file(networks.MLP(inputs=12, widths=(20, 16), num_outputs=5).state_dict(), f"{name}.safetensors")
    np.save("x.npy", np.random.default_rng(0).normal(size=(30, 12)))
    return tmp_path


def models() -> list[torch.nn.Module]:
    result = []
    for name in "ab":
        model = networks.MLP(inputs=12, widths=(20, 16), num_outputs=5)
        model.load_state_dict(load_file(f"{name}.safetensors"))
        result.append(model)
    return result


def assert_same(stats: mf.ActivationStats, expected: mf.ActivationStats) -> None:
    assert set(stats) == set(expected)
    for name in expected:
        assert stats[name].count == expected[name].count
        assert torch.equal(stats[name].correlation(), expected[name].correlation())


@pytest.mark.parametrize("factory", ["mlpfactory:build", "mlpfactory:holder.build"])
def test_equals_the_python_call(here: Path, capsys: pytest.CaptureFixture[str], factory: str) -> None:
    options = ("--model", factory, "--inputs", "x.npy", "--batch-size", "7", "--scope", "cross")
    assert main([*CALL, *options]) == 0
    assert "calibrated 2 checkpoints on 30 rows: 2 of 2 spaces in s.safetensors" in capsys.readouterr().err
    batches = torch.from_numpy(np.load("x.npy")).float().split(7)
    nets = models()
    expected = mf.calibrate(nets, batches, mf.spec_for(nets[0]), scope="cross")
    assert_same(mf.ActivationStats.load("s.safetensors"), expected)


@pytest.mark.parametrize("name", ["x", "images"])
def test_inputs_from_safetensors(here: Path, name: str) -> None:
    rows = torch.from_numpy(np.load("x.npy"))
    save_file({name: rows}, "x.safetensors")
    assert main([*CALL, "--model", "mlpfactory:build", "--inputs", "x.safetensors", "-q"]) == 0
    nets = models()
    expected = mf.calibrate(nets, [rows.float()], mf.spec_for(nets[0]))
    assert_same(mf.ActivationStats.load("s.safetensors"), expected)


def test_statistics_of_a_spec_from_a_file(here: Path) -> None:
    nets = models()
    spec = mf.PermutationSpec(mf.spec_for(nets[0]).spaces[:1])
    Path("spec.json").write_text(spec.to_json())
    assert main([*CALL, "--model", "mlpfactory:build", "--inputs", "x.npy", "--spec", "spec.json", "-q"]) == 0
    assert list(mf.ActivationStats.load("s.safetensors")) == [spec.spaces[0].name]


BAD = {
    "no model": (("--inputs", "x.npy"), "give a function that does with --model MODULE:FACTORY"),
    "no colon": (("--model", "mlpfactory", "--inputs", "x.npy"), "expected MODULE:FACTORY"),
    "no module": (("--model", "absent_factory:build", "--inputs", "x.npy"), "cannot import 'absent_factory'"),
    "broken module": (("--model", "brokenfactory:build", "--inputs", "x.npy"), "no_such_module"),
    "no function": (("--model", "mlpfactory:absent", "--inputs", "x.npy"), "has no 'absent'"),
    "not callable": (("--model", "mlpfactory:value", "--inputs", "x.npy"), "is no function"),
    "no module made": (("--model", "mlpfactory:nothing", "--inputs", "x.npy"), "to return a torch.nn.Module, got None"),
    "arguments": (("--model", "mlpfactory:needy", "--inputs", "x.npy"), "needy"),
    "another network": (("--model", "mlpfactory:wide", "--inputs", "x.npy"), "a.safetensors does not fit it"),
    "missing inputs": (("--model", "mlpfactory:build", "--inputs", "no.npy"), "no such file: no.npy"),
    "text": (("--model", "mlpfactory:build", "--inputs", "mlpfactory.py"), "expected a .npy or .safetensors file"),
    "damaged": (("--model", "mlpfactory:build", "--inputs", "cut.npy"), "cut.npy: not a readable .npy"),
    "objects": (("--model", "mlpfactory:build", "--inputs", "objects.npy"), "objects.npy: not a readable .npy"),
    "strings": (("--model", "mlpfactory:build", "--inputs", "strings.npy"), "expected numbers"),
    "no rows": (("--model", "mlpfactory:build", "--inputs", "empty.npy"), "one number of rows >= 1"),
    "scalar": (("--model", "mlpfactory:build", "--inputs", "scalar.npy"), "one number of rows >= 1"),
    "ragged": (("--model", "mlpfactory:build", "--inputs", "ragged.safetensors"), "one number of rows >= 1"),
    "unknown arguments": (("--model", "mlpfactory:build", "--inputs", "two.safetensors"), "the model takes x, not y"),
    "batch size": (("--model", "mlpfactory:build", "--inputs", "x.npy", "--batch-size", "0"), "0 is not in the range"),
    "output is an input": (
        ("--model", "mlpfactory:build", "--inputs", "x.npy", "-o", "x.npy", "--force"),
        "x.npy is an input",
    ),
    "output exists": (("--model", "mlpfactory:build", "--inputs", "x.npy", "-o", "old"), "old exists already"),
    "output is a folder": (("--model", "mlpfactory:build", "--inputs", "x.npy", "-o", "."), "expected a file"),
    "output nowhere": (("--model", "mlpfactory:build", "--inputs", "x.npy", "-o", "no/s"), "does not exist"),
}


@pytest.mark.parametrize(("flag", "kind"), [("--inputs", "file"), ("--text", "file"), ("--images", "folder")])
def test_what_is_missing_is_told_before_models_are_made(
    flag: str, kind: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mudsc_fast.cli.models.build_model", lambda *_: pytest.fail("a model was made"))
    assert main([*CALL, flag, "nowhere.npy"]) == 2
    assert f"{flag}: no such {kind}: nowhere.npy" in capsys.readouterr().err


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_exit_2(here: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    Path("cut.npy").write_bytes(Path("x.npy").read_bytes()[:40])
    Path("old").write_text("keep")
    np.save("objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save("strings.npy", np.array(["a"]))
    np.save("empty.npy", np.zeros((0, 12)))
    np.save("scalar.npy", np.zeros(()))
    save_file({"x": torch.ones(3, 12), "y": torch.ones(2, 12)}, "ragged.safetensors")
    save_file({"x": torch.ones(3, 12), "y": torch.ones(3, 12)}, "two.safetensors")
    args, message = BAD[case]
    assert main([*CALL, *args]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not Path("s.safetensors").exists()
    assert Path("old").read_text() == "keep"


@pytest.mark.parametrize("limit", [(), ("--max-memory", "8GB")])
def test_inputs_that_the_network_cannot_take_are_named(
    here: Path, capsys: pytest.CaptureFixture[str], limit: tuple[str, ...]
) -> None:
    np.save("narrow.npy", np.zeros((30, 7)))
    assert main([*CALL, "--model", "mlpfactory:build", "--inputs", "narrow.npy", *limit]) == 1
    assert "--inputs narrow.npy: with a batch of shape (30, 7): mat1 and mat2" in capsys.readouterr().err
    assert not Path("s.safetensors").exists()


@pytest.mark.parametrize("limit", [(), ("--max-memory", "8GB")])
def test_statistics_know_their_checkpoints(
    here: Path, capsys: pytest.CaptureFixture[str], limit: tuple[str, ...]
) -> None:
    assert main([*CALL, "--model", "mlpfactory:build", "--inputs", "x.npy", "-q", *limit]) == 0
    merge = ("merge", "--stats", "s.safetensors", "-o", "m.safetensors")
    assert main([*merge, "b.safetensors", "a.safetensors"]) == 2
    assert "in another order; give them as a.safetensors b.safetensors" in capsys.readouterr().err
    assert not Path("m.safetensors").exists()
    assert main([*merge, "a.safetensors", "b.safetensors"]) == 0
    assert "note" not in capsys.readouterr().err
    torch.manual_seed(5)
    save_file(networks.MLP(inputs=12, widths=(20, 16), num_outputs=5).state_dict(), "c.safetensors")
    assert main([*merge, "a.safetensors", "c.safetensors", "--force"]) == 0
    assert "note: --stats s.safetensors was made from other checkpoints" in capsys.readouterr().err
    # Those that Python saved do not say where they come from.
    mf.ActivationStats.load("s.safetensors").save("plain.safetensors")
    assert main(["merge", "b.safetensors", "a.safetensors", "--stats", "plain.safetensors", "-o", "p.safetensors"]) == 0
    assert "note" not in capsys.readouterr().err


# --- Hugging Face folders --------------------------------------------------------------------------------------------


def test_hugging_face_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    nets = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        nets.append(transformers.ViTForImageClassification(config).eval())
        nets[-1].save_pretrained(name)
    images = torch.randn(6, 3, 8, 8)
    save_file({"pixel_values": images}, "x.safetensors")
    assert main(["calibrate", "a", "b", "--inputs", "x.safetensors", "-o", "s.safetensors", "-q"]) == 0
    stats = mf.ActivationStats.load("s.safetensors")
    assert_same(stats, mf.calibrate(nets, [{"pixel_values": images}], mf.spec_for(nets[0])))
    assert main(["merge", "a", "b", "-o", "m", "--stats", "s.safetensors", "-q"]) == 0
    states = [net.state_dict() for net in nets]
    merged = transformers.ViTForImageClassification.from_pretrained("m").eval().state_dict()
    for name, tensor in mf.match(states, mf.spec_for(nets[0]), stats).merge(states).items():
        assert torch.equal(merged[name], tensor), name
    assert sorted(p.name for p in Path("m").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert main(["align", "a", "b", "-o", "b2", "-q"]) == 0
    aligned = transformers.ViTForImageClassification.from_pretrained("b2").eval()
    assert not torch.equal(aligned.classifier.weight, nets[1].classifier.weight)
    with torch.no_grad():
        assert torch.allclose(aligned(images).logits, nets[1](images).logits, rtol=1e-5, atol=1e-5)


def test_a_folder_without_transformers_goes_by_names_and_config(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        (here / name).mkdir()
        torch.manual_seed(ord(name))
        net = networks.ViT(image=8, width=12, depth=1, num_heads=3, hidden=8)
        save_file(net.state_dict(), here / name / "model.safetensors")
        (here / name / "config.json").write_text(json.dumps({"num_attention_heads": 3}))
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["merge", "a", "b", "-o", "m", "-q"]) == 0
    states = [load_file(f"{name}/model.safetensors") for name in "ab"]
    expected = mf.match(states, mf.spec_for(states[0], heads=3), balance=1.0).merge(states)
    found = load_file("m/model.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{broken", "expected the JSON of a model's configuration"),
        ("[]", "expected the JSON of a model's configuration"),
        (json.dumps({"architectures": ["EvilModel"]}), "has no model 'EvilModel'"),
        (json.dumps({"architectures": ["logging"]}), "has no model 'logging'"),
    ],
)
def test_bad_configs(here: Path, capsys: pytest.CaptureFixture[str], config: str, message: str) -> None:
    pytest.importorskip("transformers")
    for name in "ab":
        (here / name).mkdir()
        (here / f"{name}.safetensors").rename(here / name / "model.safetensors")
        (here / name / "config.json").write_text(config)
    assert main(["calibrate", "a", "b", "--inputs", "x.npy", "-o", "s.safetensors"]) == 2
    assert message in capsys.readouterr().err


def test_transformers_missing(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        (here / name).mkdir()
        (here / f"{name}.safetensors").rename(here / name / "model.safetensors")
        (here / name / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["calibrate", "a", "b", "--inputs", "x.npy", "-o", "s.safetensors"]) == 2
    assert "pip install 'mudsc-fast[hf]'" in capsys.readouterr().err
    for name in "ab":  # tensors of no family, so that the network would have to be traced
        save_file({"layer.weight": torch.ones(3, 3, 3), "odd": torch.ones(2)}, here / name / "model.safetensors")
    assert main(["merge", "a", "b", "-o", "m"]) == 2
    assert "traced without transformers: pip install 'mudsc-fast[hf]'" in capsys.readouterr().err


def test_heads_can_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(networks.ViT(width=12, depth=1, num_heads=3, hidden=8).state_dict(), "a.safetensors")
    assert main(["spec", "a.safetensors"]) == 2
    assert "number of heads" in capsys.readouterr().err
    assert main(["spec", "a.safetensors", "--heads", "3", "--json"]) == 0
    spec = mf.PermutationSpec.from_json(capsys.readouterr().out)
    assert 3 in {space.blocks for space in spec.spaces}
