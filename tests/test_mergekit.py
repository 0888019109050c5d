"""mergekit on matched models: with the real mergekit, on copies in another unit order."""

from __future__ import annotations

import copy
import importlib.metadata
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import language_models as lm
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from mudsc_fast.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("mergekit", reason="mergekit is not installed: pip install 'mudsc-fast[mergekit]'")

State = dict[str, Tensor]
Folders = dict[str, Path]

# Regrouping moves bits and adds none: what mergekit computes is the same to the last bit.
ROUNDING = 0.0

HALF = {"weight": 0.5}
SPARSE = {"weight": 0.5, "density": 0.6}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"models": ("base", "b", "c"), "each": HALF},
    "slerp": {"models": ("base", "b"), "base": True, "parameters": {"t": 0.4}},
    "karcher": {"models": ("base", "b", "c")},
    "ties": {"models": ("b", "c"), "base": True, "each": SPARSE},
    "dare_ties": {"models": ("b", "c"), "base": True, "each": SPARSE},
    "della": {"models": ("b", "c"), "base": True, "each": {**SPARSE, "epsilon": 0.1}},
    "task_arithmetic": {"models": ("b", "c"), "base": True, "each": {"weight": 0.4}},
    "model_stock": {"models": ("b", "c"), "base": True},
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Folders]:
    made: dict[str, Folders] = {}

    def family(kind: str) -> Folders:
        if kind not in made:
            made[kind] = lm.family(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return family


@pytest.fixture
def llama(families: Callable[[str], Folders]) -> Folders:
    return families("Llama")


def config(method: str, folders: Folders, prefix: str = "", **more: Any) -> dict[str, Any]:
    """A configuration of the method; prefix "p": with the copies in another unit order."""
    told = METHODS[method]
    where = {"base": folders["base"], **{name: folders[prefix + name] for name in "bc"}}
    each = {"parameters": told["each"]} if "each" in told else {}
    made: dict[str, Any] = {
        "merge_method": method,
        "dtype": "float32",
        "models": [{"model": str(where[name]), **each} for name in told["models"]],
    }
    if told.get("base"):
        made["base_model"] = str(folders["base"])
    if "parameters" in told:
        made["parameters"] = told["parameters"]
    return {**made, **more}


def mergekits_own(made: dict[str, Any], out: Path) -> State:
    """What mergekit alone makes of it."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    try:
        run_merge(MergeConfiguration.model_validate(made), str(out), MergeOptions(random_seed=3, quiet=True))
    finally:
        LoaderCache.loaders.clear()
    return load_file(out / "model.safetensors")


def ours(made: dict[str, Any], folder: Path, *more: str, code: int = 0) -> State:
    """What ``mudsc-fast mergekit`` makes of it."""
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(made, sort_keys=False))
    assert main(["mergekit", str(path), str(folder / "out"), "--random-seed", "3", "--quiet", *more]) == code
    return load_file(folder / "out/model.safetensors") if code == 0 else {}


def apart(a: State, b: State) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    assert set(a) == set(b)
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max()) for n in a)


@pytest.mark.parametrize("kind", lm.KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_merges_as_if_no_unit_had_moved(
    kind: str,
    method: str,
    families: Callable[[str], Folders],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    folders = families(kind)
    expected = mergekits_own(config(method, folders), tmp_path / "expected")
    unaligned = apart(mergekits_own(config(method, folders, "p"), tmp_path / "unaligned"), expected)
    aligned = apart(ours(config(method, folders, "p"), tmp_path), expected)
    record_property("unaligned error", unaligned)
    record_property("aligned error", aligned)
    assert aligned <= ROUNDING
    assert unaligned > 0.1


@pytest.mark.parametrize("kind", lm.EXPERTS)
@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_experts_that_are_stored_one_by_one(
    kind: str,
    method: str,
    families: Callable[[str], Folders],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    folders = families(kind)
    on_disk = load_file(folders["pb"] / "model.safetensors")
    one = [name for name in on_disk if ".experts.3." in name]
    assert len(one) == 2 * 3  # two layers, three tensors an expert
    moved = load_file(folders["b"] / "model.safetensors")
    gates = [name for name in on_disk if name.endswith(".gate.weight")]
    # The permuted copy's experts themselves are in another order, not only the units inside them.
    assert any(not _same_rows(on_disk[name], moved[name]) for name in gates)
    expected = mergekits_own(config(method, folders), tmp_path / "expected")
    unaligned = apart(mergekits_own(config(method, folders, "p"), tmp_path / "unaligned"), expected)
    aligned = apart(ours(config(method, folders, "p"), tmp_path), expected)
    record_property("unaligned error", unaligned)
    assert aligned <= ROUNDING
    assert unaligned > 0.1
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        found, wanted = (
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)(tokens).logits
            for name in ("out", "expected")
        )
    assert torch.equal(found, wanted)


def _same_rows(a: Tensor, b: Tensor) -> bool:
    """Whether the rows come in one order, whatever the order of their columns."""
    return torch.allclose(a.sort(dim=1).values, b.sort(dim=1).values, atol=1e-6)


def test_output_loads_and_computes_what_the_models_do(llama: Folders, tmp_path: Path) -> None:
    ours(config("linear", llama, "p"), tmp_path)
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
        base = transformers.AutoModelForCausalLM.from_pretrained(llama["base"])(tokens).logits
    # the copies differ from the base by noise of 0.02 on weights of 0.3
    assert torch.corrcoef(torch.stack([merged.flatten(), base.flatten()]))[0, 1] > 0.9
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "mergekit_config.yml", "README.md"} <= names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yml", "out"]


def test_bfloat16_is_as_exact(llama: Folders, tmp_path: Path) -> None:
    folders = {}
    for name, source in llama.items():
        folders[name] = tmp_path / name
        shutil.copytree(source, folders[name])
        path = folders[name] / "model.safetensors"
        save_file({n: t.bfloat16() for n, t in load_file(path).items()}, path, {"format": "pt"})
    expected = mergekits_own(config("ties", folders, dtype="bfloat16"), tmp_path / "expected")
    assert apart(ours(config("ties", folders, "p", dtype="bfloat16"), tmp_path), expected) <= ROUNDING


def _slices(a: Path, b: Path) -> dict[str, Any]:
    sources = [{"model": str(m), "layer_range": [0, 2]} for m in (a, b)]
    by_filter = [{"filter": "self_attn", "value": [0, 0.7]}, {"filter": "mlp", "value": [1, 0.2]}, {"value": 0.5}]
    return {
        "merge_method": "slerp",
        "dtype": "float32",
        "base_model": str(a),
        "slices": [{"sources": sources}],
        "parameters": {"t": by_filter},
    }


def test_slices_and_parameters_by_filter(llama: Folders, tmp_path: Path) -> None:
    expected = mergekits_own(_slices(llama["base"], llama["b"]), tmp_path / "expected")
    assert apart(ours(_slices(llama["base"], llama["pb"]), tmp_path), expected) <= ROUNDING


def _stack(a: Path, b: Path) -> dict[str, Any]:
    sources = [[{"model": str(m), "layer_range": [0, 2]}] for m in (a, b)]
    return {"merge_method": "passthrough", "dtype": "float32", "slices": [{"sources": s} for s in sources]}


def test_passthrough_is_left_alone_unless_asked(llama: Folders, tmp_path: Path) -> None:
    made = _stack(llama["base"], llama["pb"])
    untouched = mergekits_own(made, tmp_path / "untouched")
    assert apart(ours(made, tmp_path), untouched) == 0
    expected = mergekits_own(_stack(llama["base"], llama["b"]), tmp_path / "expected")
    asked = ours({**made, "mudsc": {"passthrough": True}}, tmp_path, "--force")
    assert len(asked) == 2 * 2 * 9 + 3
    assert apart(asked, expected) <= ROUNDING


def test_a_base_of_pickles_and_a_checkpoint_in_shards(llama: Folders, tmp_path: Path) -> None:
    made = config("linear", llama, "p")
    expected = ours(made, tmp_path)
    shutil.copytree(llama["base"], tmp_path / "base")
    torch.save(load_file(tmp_path / "base/model.safetensors"), tmp_path / "base/pytorch_model.bin")
    (tmp_path / "base/model.safetensors").unlink()
    model = transformers.AutoModelForCausalLM.from_pretrained(llama["pb"])
    model.save_pretrained(tmp_path / "pb", max_shard_size="20KB")
    assert len(list((tmp_path / "pb").glob("*.safetensors"))) > 2
    shutil.copy(llama["pb"] / "tokenizer.json", tmp_path / "pb")
    made["models"][0]["model"] = str(tmp_path / "base")
    made["models"][1]["model"] = str(tmp_path / "pb")
    assert apart(ours(made, tmp_path, "--force"), expected) == 0


def test_one_model_keeps_both_names_of_a_tied_tensor(families: Callable[[str], Folders], tmp_path: Path) -> None:
    folders = families("Qwen3")
    expected = ours(config("linear", folders, "p"), tmp_path)
    shutil.copytree(folders["pb"], tmp_path / "pb")
    state = load_file(tmp_path / "pb/model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "pb/model.safetensors", {"format": "pt"})
    found = ours(config("linear", {**folders, "pb": tmp_path / "pb"}, "p"), tmp_path, "--force")
    assert {name: apart({name: found[name]}, {name: expected[name]}) for name in expected} == dict.fromkeys(expected, 0)


def test_chosen_spaces_and_models_left_alone(llama: Folders, tmp_path: Path) -> None:
    made = config("linear", llama, "p")
    plain = mergekits_own(made, tmp_path / "plain")
    whole = ours(made, tmp_path)
    left = ours({**made, "mudsc": {"leave": [str(llama["pb"]), str(llama["pc"])]}}, tmp_path, "--force")
    assert apart(left, plain) == 0
    some = ours({**made, "mudsc": {"spaces": ["*.mlp"]}}, tmp_path, "--force")
    norm, up = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(some[norm], plain[norm])
    assert not torch.equal(some[norm], whole[norm])
    assert not torch.equal(some[up], plain[up])


def test_calibration_text(llama: Folders, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"w{(7 * k) % 48}" for k in range(500)))
    section = {"calibration": str(tmp_path / "text.txt"), "balance": 0.3, "chunks": 10, "chunk_tokens": 20, "seed": 4}
    expected = mergekits_own(config("linear", llama), tmp_path / "expected")
    assert apart(ours({**config("linear", llama, "p"), "mudsc": section}, tmp_path), expected) <= ROUNDING


def test_another_vocabulary_is_left_to_mergekit(llama: Folders, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama["b"])
    model.resize_token_embeddings(60, mean_resizing=False)
    spec = lm.spec_of(model)
    lm.save(model, model.state_dict(), tmp_path / "b", tokens=60, shift=5)
    moved = spec.permute(model.state_dict(), spec.random_permutation(7))
    lm.save(model, moved, tmp_path / "pb", tokens=60, shift=5)
    made = config("linear", {**llama, "b": tmp_path / "b"}, tokenizer_source="base", base_model=str(llama["base"]))
    made["models"] = made["models"][:2]
    expected = mergekits_own(made, tmp_path / "expected")
    made["models"][1]["model"] = str(tmp_path / "pb")
    assert apart(ours(made, tmp_path), expected) <= ROUNDING


def test_dry_run_writes_nothing(llama: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours(config("linear", llama, "p"), tmp_path)
    shutil.rmtree(tmp_path / "out")
    path = tmp_path / "config.yml"
    assert main(["mergekit", str(path), str(tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"would match {llama['pb']} to {llama['base']}: 9 spaces, the widest of 40 units" in shown
    assert "would then run mergekit's linear" in shown
    path.write_text(yaml.safe_dump(_stack(llama["base"], llama["pb"])))
    assert main(["mergekit", str(path), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "with nothing matched" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yml"]


# ---- what is refused ----


def _refused(made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    capsys.readouterr()
    ours(made, tmp_path, *more, code=2)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 32, "head_dim": 8}, "its hidden_size is 32, not 24"),
        ({"intermediate_size": 44}, "its intermediate_size is 44, not 40"),
        ({"num_hidden_layers": 1}, "its num_hidden_layers is 1, not 2"),
    ],
)
def test_another_width_is_named_before_work_starts(
    changes: dict[str, int],
    said: str,
    llama: Folders,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = lm.network("Llama", 5, **changes)
    lm.save(model, model.state_dict(), tmp_path / "odd")
    monkeypatch.setattr("mudsc_fast.checkpoints.Checkpoint.__getitem__", lambda *_: pytest.fail("a tensor was read"))
    message = _refused(config("linear", {**llama, "pc": tmp_path / "odd"}, "p"), tmp_path, capsys)
    assert f"model {tmp_path / 'odd'} cannot be matched" in message
    assert said in message
    assert "leave" in message


def test_another_architecture_is_named_and_mergekits_own_refusal_is_shown(
    llama: Folders, families: Callable[[str], Folders], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = families("Qwen3")["b"]
    made = config("linear", {**llama, "pc": other}, "p")
    message = _refused(made, tmp_path, capsys)
    assert f"model {other} cannot be matched" in message
    assert "Qwen3ForCausalLM (qwen3), not LlamaForCausalLM (llama)" in message
    left = {**made, "mudsc": {"leave": [str(other)]}}
    assert "mergekit: Must specify --allow-crimes" in _refused(left, tmp_path, capsys)


def test_another_tokenizer_is_named(llama: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(llama["pb"], tmp_path / "shifted")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama["pb"])
    lm.save(model, model.state_dict(), tmp_path / "shifted", shift=3)
    message = _refused(config("linear", {**llama, "pb": tmp_path / "shifted"}, "p"), tmp_path, capsys)
    assert "shifted cannot be matched" in message
    assert "tokenizer_source" in message


def _changed(made: dict[str, Any], **changes: Any) -> dict[str, Any]:
    made = copy.deepcopy(made)
    made.update(changes)
    return {key: value for key, value in made.items() if value is not None}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"merge_method": "no_such_method"}, "mergekit: "),
    ({"merge_metod": "linear"}, "config.yml:11: merge_metod: unknown key; did you mean 'merge_method'?"),
    ({"models": [{"model": "./a", "paramters": {}}]}, "models[0].paramters: unknown key; did you mean 'parameters'?"),
    ({"models": None}, "Exactly one of 'models', 'slices', or 'modules' must be present"),
    ({"tokenizer_source": "base", "tokenizer": {"source": "base"}}, "Cannot specify both tokenizer_source"),
    ({"mudsc": {"balanse": 0.5}}, "config.yml:12: mudsc.balanse: unknown key; did you mean 'balance'?"),
    ({"mudsc": {"zzz": 0.5}}, "valid keys: balance, calibration, chunks"),
    ({"mudsc": {"balance": 2}}, "config.yml:12: mudsc.balance: Input should be less than or equal to 1, got 2"),
    ({"mudsc": {"balance": 0.5}}, "needs calibration"),
    ({"mudsc": {"balance": 1, "calibration": "x.txt"}}, "weights alone"),
    ({"mudsc": {"calibration": "nowhere.txt"}}, "no such file: nowhere.txt"),
    ({"mudsc": {"spaces": ["*.mlq"]}}, "'*.mlq' fits none of the spaces residual"),
    ({"mudsc": {"leave": ["nobody"]}}, "'nobody' is none of the models"),
    ({"mudsc": [1]}, "mudsc: expected keys and values, got list"),
    ({"base_model": "/no/such/model"}, "model /no/such/model: cannot be opened"),
]


@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_configurations(
    changes: dict[str, Any], said: str, llama: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = _refused(_changed(config("linear", llama, "p"), **changes), tmp_path, capsys)
    assert said in message
    assert "Traceback" not in message


def test_a_key_that_mergekit_ignores_is_noted(
    llama: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"about": "mine", **config("linear", llama, "p", mudsc={"spaces": ["*.mlp"]})}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(made, sort_keys=False))
    assert main(["mergekit", str(tmp_path / "config.yml"), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "config.yml:1: about: unknown key; valid keys: mo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "config.yml:1: not YAML"),
        ("- 1\n", "config.yml: expected keys and values at the top level, got list"),
        ("", "config.yml: expected keys and values at the top level, got nothing"),
        ("merge_method: ties\nmerge_method: linear\n", "config.yml:2: the key 'merge_method' stands twice"),
    ],
)
def test_text_that_is_no_configuration(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yml").write_text(text)
    assert main(["mergekit", str(tmp_path / "config.yml"), str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err


def test_interrupted_leaves_nothing(llama: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit.io.tasks import LoaderCache

    def interrupted(config: Any, out: str, **_: Any) -> None:
        Path(out).mkdir()
        (Path(out) / "half.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr("mergekit.merge.run_merge", interrupted)
    before = dict(LoaderCache.loaders)  # mergekit's own, of merges before this one
    ours(config("linear", llama, "p"), tmp_path, code=130)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yml"]
    assert dict(LoaderCache.loaders) == before


def test_outputs_in_the_way(llama: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = config("linear", llama, "p")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("kept")
    ours(made, tmp_path, code=2)
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out/mine").read_text() == "kept"
    path = tmp_path / "config.yml"
    before = load_file(llama["base"] / "model.safetensors")
    assert main(["mergekit", str(path), str(llama["base"]), "--force"]) == 2
    assert "is an input" in capsys.readouterr().err
    assert apart(load_file(llama["base"] / "model.safetensors"), before) == 0
    assert main(["mergekit", str(path), str(tmp_path / "no/out")]) == 2
    assert main(["mergekit", str(tmp_path / "no.yml"), str(tmp_path / "out")]) == 2


@pytest.mark.parametrize(
    ("found", "said"), [(None, "mergekit is not installed"), ("0.1.4", "mergekit 0.1.4 is"), ("0.2", "mergekit 0.2 is")]
)
def test_missing_or_other_mergekit(
    found: str | None,
    said: str,
    llama: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    message = _refused(config("linear", llama, "p"), tmp_path, capsys)
    assert said in message
    assert "pip install 'mudsc-fast[mergekit]'" in message


def test_mergekits_options_are_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mergekit", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--lazy-unpickle", "--out-shard-size", "--trust-remote-code", "--force", "mudsc:"):
        assert option in shown
