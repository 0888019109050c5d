"""What a mergekit configuration may name besides folders: LoRA adapters on a model, and names of a hub; no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import language_models as lm
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from mudsc_fast.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("mergekit", reason="mergekit is not installed: pip install 'mudsc-fast[mergekit]'")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return lm.family("Llama", tmp_path_factory.mktemp("llama"))


def ours(folder: Path, models: list[str], *more: str, code: int = 0) -> dict[str, Tensor]:
    """The mean of the models in the first one's unit order."""
    made: dict[str, Any] = {"merge_method": "linear", "dtype": "float32"}
    made["models"] = [{"model": name, "parameters": {"weight": 0.5}} for name in models]
    (folder / "config.yml").write_text(yaml.safe_dump(made))
    assert main(["mergekit", str(folder / "config.yml"), str(folder / "out"), "--quiet", "--force", *more]) == code
    return load_file(folder / "out" / "model.safetensors") if code == 0 else {}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_adapter_on_a_model_is_merged_into_it_and_matched(
    llama: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama["pb"])
    given = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, given)
    adapted.save_pretrained(tmp_path / "lora")
    whole = lm.save(lm.network("Llama", 0), adapted.merge_and_unload().state_dict(), tmp_path / "whole")
    expected = ours(tmp_path, [str(llama["base"]), str(whole)])
    named = f"{llama['pb']}+{tmp_path / 'lora'}"
    found = ours(tmp_path, [str(llama["base"]), named], "--lora-merge-cache", str(tmp_path / "cache"))
    assert equal(found, expected)
    assert not equal(found, ours(tmp_path, [str(llama["base"]), str(llama["pb"])]))
    capsys.readouterr()
    ours(tmp_path, [str(llama["base"]), named], code=2)
    error = capsys.readouterr().err
    assert f"model {named}: cannot be opened" in error
    assert "--lora-merge-cache FOLDER" in error


def test_a_name_of_a_hub_is_read_from_where_it_was_loaded_to(
    llama: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ours(tmp_path, [str(llama["base"]), str(llama["pb"])])
    load = transformers.AutoConfig.from_pretrained

    def config(name: str, **more: Any) -> Any:
        return load(str(llama["pb"]) if name == "some/model" else name, **{**more, "revision": None})

    monkeypatch.setattr("mergekit.common.AutoConfig.from_pretrained", config)
    monkeypatch.setattr("mergekit.common.huggingface_hub.list_repo_files", lambda *_, **__: ["model.safetensors"])
    monkeypatch.setattr("mergekit.common.huggingface_hub.snapshot_download", lambda *_, **__: str(llama["pb"]))
    assert equal(ours(tmp_path, [str(llama["base"]), "some/model@main"]), expected)


def test_a_name_that_no_hub_has_is_named(
    llama: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("mergekit.common.huggingface_hub.list_repo_files", unreachable)
    ours(tmp_path, [str(llama["base"]), "some/model"], code=2)
    error = capsys.readouterr().err
    assert "model some/model: cannot be opened: Name or service not known: no folder here, and not to be had" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
