"""mudsc-fast merge --refit: a whole checkpoint that loads and is nearer to its parents; and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mudsc_fast as mf
from mudsc_fast.checkpoints import TensorInfo
from mudsc_fast.cli import main
from mudsc_fast.cli.refitting import Refit

transformers = pytest.importorskip("transformers")
import language_models  # noqa: E402 (needs transformers)


def _lines(path: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    path.write_text("\n".join(" ".join(f"w{k}" for k in rng.integers(2, 48, 14)) for _ in range(count)))
    return path


@pytest.fixture(scope="module", params=["Llama", "Qwen3"])
def folders(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two separately made models with a tokenizer, and lines of text; Qwen3's embedding is its last layer too."""
    folder = tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate("ab"):
        model = language_models.network(request.param, seed)
        language_models.save(model, model.state_dict(), folder / name)
    _lines(folder / "lines.txt", 96)
    return folder


def _logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(2, 48, (16, 14), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


def test_a_refitted_merge_is_nearer_to_its_parents(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = [str(folders / name) for name in "ab"]
    wanted = (_logits(folders / "a") + _logits(folders / "b")) / 2
    text = ["--text", str(folders / "lines.txt")]
    assert main(["merge", *pair, "-o", str(folders / "plain"), "-q"]) == 0
    (folders / "file").mkdir()
    call = ["merge", *pair, "--refit", *text, "--spill", str(folders / "file"), "--batch-size", "32"]
    transformers.utils.logging.enable_progress_bar()  # the run before was quiet
    assert main([*call, "-o", str(folders / "out")]) == 0
    said = capsys.readouterr().err
    assert "refit: 3 networks of" in said
    assert "layers on 3 batches" in said
    assert "Loading weights" not in said, "bars of transformers are for a terminal"
    assert list((folders / "file").iterdir()) == []
    errors = [float((_logits(folders / name) - wanted).square().mean()) for name in ("plain", "out")]
    # A last layer that is the embedding too is left as it is, and with it much of the error.
    assert errors[1] < (0.95 if folders.name.startswith("Qwen3") else 0.7) * errors[0]
    before, after = (load_file(folders / name / "model.safetensors") for name in ("plain", "out"))
    assert {n: x.shape for n, x in before.items()} == {n: x.shape for n, x in after.items()}
    embedding = "model.embed_tokens.weight"
    assert torch.equal(before[embedding], after[embedding])
    # In memory, with another dtype: the same up to rounding.
    assert main([*call[:6], "--batch-size", "32", "--dtype", "bfloat16", "-q", "-o", str(folders / "half")]) == 0
    for name, tensor in load_file(folders / "half" / "model.safetensors").items():
        assert torch.equal(tensor, after[name].to(torch.bfloat16))


def test_a_network_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "refitfactory.py").write_text(
        "import networks\ndef build():\n    return networks.MLP(inputs=12, widths=(20, 16), num_outputs=5)\n"
    )
    nets = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        nets.append(networks.MLP(inputs=12, widths=(20, 16), num_outputs=5).eval())
        save_file(nets[-1].state_dict(), f"{name}.safetensors")
    rows = np.random.default_rng(0).normal(size=(200, 12))
    np.save("x.npy", rows)
    call = ["merge", "a.safetensors", "b.safetensors", "-o", "m.safetensors", "--refit", "--inputs", "x.npy", "-q"]
    options = ["--model", "refitfactory:build", "--ridge", "0.1", "--save-plan", "plan.safetensors"]
    assert main([*call, *options]) == 0
    plan = mf.MergePlan.load("plan.safetensors")
    net = mf.installed(nets[0], plan.merge([n.state_dict() for n in nets]))
    mf.refit(net, nets, torch.from_numpy(rows).float().split(16), plan, ridge=0.1)
    for name, tensor in load_file("m.safetensors").items():
        torch.testing.assert_close(tensor, net.state_dict()[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--refit"], "give one of --text FILE"),
        (["--refit", "--text", "x", "--inputs", "y"], "give one of --text FILE"),
        (["--text", "x"], "--text is for --refit"),
        (["--batch-size", "3"], "--batch-size is for --refit"),
        (["--refit", "--text", "x", "--method", "average"], "needs a match"),
        (["--refit", "--text", "x", "--weights", "1,2"], "--weights: --refit solves"),
        (["--refit", "--text", "none.txt"], "--text: no such file"),
        (["--refit", "--text", "lines.txt", "--spill", "none"], "--spill: the folder none does not exist"),
        (["--refit", "--text", "lines.txt", "--spill", ""], "give . if the current one is meant"),
        (["--refit", "--text", "lines.txt", "--max-memory", "1MB"], "at least"),
        (["--refit", "--text", "lines.txt"], "without config.json"),
        (["--refit", "--text", "lines.txt", "--dry-run"], "without config.json"),
        (["--refit", "--inputs", "lines.txt", "--model", "nothere:build"], "cannot import 'nothere'"),
        (["--refit", "--text", "lines.txt", "--model", "os:getcwd"], "needs a Hugging Face folder"),
        (["--refit", "--inputs", "lines.txt", "--max-length", "3"], "--max-length is for --text"),
        (["--refit", "--inputs", "lines.txt", "--plan", "wide.safetensors"], "--plan: its merged widths are others"),
    ],
)
def test_bad_refits(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _lines(tmp_path / "lines.txt", 3)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        save_file(networks.MLP(inputs=12, widths=(20, 16), num_outputs=5).state_dict(), f"{name}.safetensors")
    if "--plan" in options:
        pair = ["merge", "a.safetensors", "b.safetensors", "-o", "wide", "--method", "zip", "--width", "1.5"]
        assert main([*pair, "--save-plan", "wide.safetensors", "-q"]) == 0
    elif "average" not in options:
        options = [*options, "--save-plan", "plan.safetensors"]
    assert main(["merge", "a.safetensors", "b.safetensors", "-o", "m.safetensors", *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "m.safetensors").exists()
    assert not (tmp_path / "plan.safetensors").exists()  # refused before anything was matched


def test_what_is_recorded_of_a_refit(tmp_path: Path) -> None:
    given = dict.fromkeys(Refit.__dataclass_fields__) | {
        "refit": True,
        "ridge": 0.0,
        "images": tmp_path,
        "spill": tmp_path,
    }
    refit = Refit.taken(given)
    assert refit.described() == {"ridge": 0.0, "images": tmp_path.name}  # whoever reads it needs no folders of ours
    (tmp_path / "b").mkdir()
    for name in ("b/y.png", "x.png"):
        (tmp_path / name).write_bytes(b"")
    assert refit.files == [tmp_path / "b/y.png", tmp_path / "x.png"]


def test_only_layers_have_matrices(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither embeddings of positions nor experts in one tensor are layers' weights."""
    shapes = {"pos_embed": (1, 197, 768), "mlp.experts.gate_up_proj": (8, 512, 512), "fc.weight": (10, 100)}
    layout = {name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()}
    refit = Refit.taken(dict.fromkeys(Refit.__dataclass_fields__) | {"refit": True})
    with pytest.raises(ValueError, match=r"max_memory: .*for the matrices of fc.weight"):
        refit.check_memory(layout, 2, 1)


def test_a_run_goes_on_only_with_the_same_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resumefactory.py").write_text(
        "import networks\ndef build():\n    return networks.MLP(inputs=12, widths=(20, 16), num_outputs=5)\n"
    )
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        save_file(networks.MLP(inputs=12, widths=(20, 16), num_outputs=5).state_dict(), f"{name}.safetensors")
    np.save("x.npy", np.random.default_rng(0).normal(size=(100, 12)))
    call = [
        "merge",
        "a.safetensors",
        "b.safetensors",
        "-o",
        "m.safetensors",
        "--refit",
        "--inputs",
        "x.npy",
        "--resume",
    ]
    call += ["--model", "resumefactory:build"]
    with monkeypatch.context() as patch:
        patch.setattr("mudsc_fast.repairs.refit", _stopped)
        assert main(call) != 0
    assert not (tmp_path / "m.safetensors").exists()
    np.save("x.npy", np.random.default_rng(1).normal(size=(120, 12)))
    capsys.readouterr()
    assert main(call) == 2
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "m.safetensors").exists()


def _stopped(*given: Any, **options: Any) -> int:
    raise ValueError("stopped")


def test_a_limit_and_a_record_go_with_it(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = [str(folders / name) for name in "ab"]
    call = ["merge", *pair, "--refit", "--text", str(folders / "lines.txt"), "--record", str(folders / "run")]
    assert main([*call, "--no-verify", "--max-memory", "60GB", "-o", str(folders / "within")]) == 0
    assert json.loads((folders / "run" / "run.json").read_text())
    capsys.readouterr()
