"""Configuration files in place of flags: the same runs, the examples, the schema, and errors with line numbers."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import click
import language_models as lm
import networks
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mudsc_fast.cli import app, main
from mudsc_fast.configuration.commands import json_schema, parameters_of, schema_of

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "configs"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        model = networks.MLP(inputs=12, widths=(20, 16), num_outputs=5)
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    return tmp_path


def write(folder: Path, text: str) -> str:
    (folder / "run.yml").write_text(text)
    return "run.yml"


# ---- the same as flags ----

BOTH: list[tuple[str, str]] = [
    ("merge a.safetensors b.safetensors -o OUT", "checkpoints: [a.safetensors, b.safetensors]\noutput: OUT\n"),
    (
        "merge a.safetensors b.safetensors c.safetensors -o OUT --method zip --width 1.25 --seed 3 --dtype float16 -q",
        "command: merge\ncheckpoints: [a.safetensors, b.safetensors, c.safetensors]\noutput: OUT\nmethod: zip\n"
        "width: 1.25\nseed: 3\ndtype: float16\nquiet: true\n",
    ),
    (
        "merge a.safetensors b.safetensors -o OUT --weights 1,0.5 --balance 1",
        "checkpoints: [a.safetensors, b.safetensors]\noutput: OUT\nweights: [1, 0.5]\nbalance: 1\nforce: false\n",
    ),
    ("align a.safetensors c.safetensors -o OUT", "checkpoints: [a.safetensors, c.safetensors]\noutput: OUT\n"),
]


@pytest.mark.parametrize(("flags", "text"), BOTH, ids=[flags for flags, _ in BOTH])
def test_a_file_is_the_same_as_its_flags(flags: str, text: str, folder: Path) -> None:
    words = shlex.split(flags)
    assert main([word.replace("OUT", "flags.safetensors") for word in words]) == 0
    write(folder, text.replace("OUT", "file.safetensors"))
    assert main([words[0], "--config", "run.yml"]) == 0
    expected, found = load_file("flags.safetensors"), load_file("file.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in expected.items())


def test_flags_go_before_the_file(folder: Path) -> None:
    write(folder, "command: merge\ncheckpoints: [a.safetensors, b.safetensors]\noutput: x.safetensors\nseed: 3\n")
    assert main(["run", "run.yml", "-o", "y.safetensors", "--method=average"]) == 0
    assert not Path("x.safetensors").exists()
    average = load_file("y.safetensors")["fc1.bias"]
    expected = (load_file("a.safetensors")["fc1.bias"] + load_file("b.safetensors")["fc1.bias"]) / 2
    torch.testing.assert_close(average, expected)
    assert main(["merge", "--config=run.yml", "a.safetensors", "c.safetensors", "-o", "z.safetensors"]) == 0
    assert main(["merge", "a.safetensors", "c.safetensors", "-o", "w.safetensors", "--seed", "3"]) == 0
    assert torch.equal(load_file("z.safetensors")["fc1.bias"], load_file("w.safetensors")["fc1.bias"])


def test_print_config_shows_the_whole_and_runs_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["merge", "a.safetensors", "b.safetensors", "-o", "x.safetensors", "--weights", "1,2", "--balance", "1"]
    assert main([*given, "--print-config"]) == 0
    text = capsys.readouterr().out
    shown = yaml.safe_load(text)
    assert set(shown) == {"command", *parameters_of(app.merge)}
    assert shown["balance"] == 1.0
    assert shown["method"] == "align"
    assert shown["max_shard_size"] == "5GB"
    assert not Path("x.safetensors").exists()
    assert main(given) == 0
    write(folder, text.replace("x.safetensors", "y.safetensors"))
    assert main(["run", "run.yml"]) == 0
    expected = load_file("x.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file("y.safetensors").items())
    capsys.readouterr()
    assert main(["merge", "--config", "run.yml", "--print-config", "--seed", "9"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 9


# ---- the examples ----


def _family(kind: str, folder: Path, **changes: Any) -> None:
    model = lm.network(kind, 0, **changes)
    for seed, name in enumerate(("base", "tuned", "other")):
        lm.save(model, lm.tuned(model, seed), folder / name)


def _networks(build: Any, folder: Path) -> None:
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        save_file(networks.randomise_norms(build(), seed).state_dict(), folder / f"{name}.safetensors")


def _for_resnets(folder: Path) -> None:
    _networks(lambda: networks.ResNet(blocks=(1, 1), width=8, num_outputs=5), folder)


def _for_vits(folder: Path) -> None:
    _networks(lambda: networks.ViT(image=8, width=24, depth=1, num_heads=3, num_outputs=5), folder)


def _for_llama(folder: Path) -> None:
    _family("Llama", folder)


def _for_moe(folder: Path) -> None:
    _family("GptOss", folder, num_local_experts=4, num_experts_per_tok=2)


PREPARE = {"resnets": _for_resnets, "vits": _for_vits, "llama": _for_llama, "moe": _for_moe, "mergekit": _for_llama}
MERGED = {"resnets": "merged.safetensors", "vits": "merged.safetensors"}


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.yml")))
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ("llama", "moe", "mergekit"):
        pytest.importorskip("transformers")
    if name == "mergekit" and importlib.util.find_spec("mergekit") is None:
        pytest.skip("mergekit is not installed: pip install 'mudsc-fast[mergekit]'")
    monkeypatch.chdir(tmp_path)
    PREPARE[name](tmp_path)
    shutil.copy(EXAMPLES / f"{name}.yml", tmp_path)
    command = ["mergekit", f"{name}.yml", "merged"] if name == "mergekit" else ["run", f"{name}.yml"]
    assert main(command) == 0
    merged = load_file(tmp_path / MERGED.get(name, "merged/model.safetensors"))
    assert merged
    assert all(bool(torch.isfinite(tensor).all()) for tensor in merged.values())
    if name == "vits":
        assert merged["head.weight"].dtype == torch.float16
        assert (tmp_path / "plan.safetensors").exists()
    if name in ("llama", "moe", "mergekit"):
        assert (tmp_path / "merged/tokenizer.json").exists()


# ---- the schema ----


def test_schema_covers_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"merge", "align", "calibrate", "spec", "check"} <= set(schema["$defs"])
    for name, definition in schema["$defs"].items():
        command = app.cli.commands[name]
        assert set(definition["properties"]) == {"command", *parameters_of(command)}
        assert definition["additionalProperties"] is False
        for key, about in definition["properties"].items():
            assert key == "command" or about["description"]
    assert main(["schema", "merge"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert [entry["$ref"] for entry in one["oneOf"]] == ["#/$defs/merge"]
    assert main(["schema", "mudsc"]) == 0
    assert "balance" in json.loads(capsys.readouterr().out)["properties"]["mudsc"]["properties"]
    assert main(["schema", "nothing"]) == 2
    assert json_schema([app.merge])["$defs"].keys() == {"merge"}


def test_every_command_has_the_options_that_all_have() -> None:
    for name, command in app.cli.commands.items():
        options = {option for p in command.params for option in p.opts}
        assert "--log-format" in options, name
        assert isinstance(command, click.Command)
        if "--config" in options:
            keys = {field.alias for field in schema_of(command).model_fields.values()}
            assert keys == {"command", *parameters_of(command)}


# ---- what is refused ----

START = "checkpoints: [a.safetensors, b.safetensors]\noutput: x.safetensors\n"
BAD: list[tuple[str, str]] = [
    (START + "metod: zip\n", "run.yml:3: metod: unknown key; did you mean 'method'?"),
    (START + "zzzzz: 1\n", "valid keys: command, checkpoints, output, method"),
    (START + "method: zipp\n", "run.yml:3: method: Input should be 'align', 'zip'"),
    (START + "balance: 1.5\n", "run.yml:3: balance: Input should be less than or equal to 1, got 1.5"),
    (START + "seed: many\n", "run.yml:3: seed: Input should be a valid integer"),
    (START + "force: 7\n", "run.yml:3: force: Input should be a valid boolean"),
    ("output: [x]\n" + START.splitlines()[0], "run.yml:1: output: Input should be a valid string"),
    (START + "weights: {a: 1}\n", "run.yml:3: weights: Input should be a valid string"),
    ("command: align\n" + START, "run.yml:1: command: Input should be 'merge', got 'align'"),
    (START + "seed: 1\nseed: 2\n", "run.yml:4: the key 'seed' stands twice"),
    (START + "  seed: 1\n", "run.yml:3: not YAML"),
    ("- a\n", "run.yml: expected keys and values at the top level, got list"),
    (START + "width: 1.5\n", "--width is set at run.yml:3"),
    (START + "balance: 0.5\n", "--balance is set at run.yml:3"),
    (START + "method: average\nplan: p.safetensors\n", "--plan is set at run.yml:4"),
    (START.replace("b.safe", "nowhere.safe"), "nowhere.safetensors: no such file"),
]


@pytest.mark.parametrize(("text", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_files(text: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, text)
    assert main(["merge", "--config", "run.yml"]) == 2
    assert said in capsys.readouterr().err
    assert not Path("x.safetensors").exists()


def test_mistakes_are_told_in_the_order_of_their_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, START + "metod: zip\nseed: many\nwieghts: [1]\n")
    assert main(["merge", "--config", "run.yml"]) == 2
    said = capsys.readouterr().err
    assert said.index("run.yml:3: metod") < said.index("run.yml:4: seed") < said.index("run.yml:5: wieghts")


def test_a_configuration_of_mergekits_is_sent_to_its_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, "merge_method: linear\nmodels: []\n")
    assert main(["run", "run.yml"]) == 2
    assert "'mudsc-fast mergekit run.yml OUT' runs it" in capsys.readouterr().err


def test_files_that_are_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run.yml").write_bytes(b"\xff\xfe\x00a")
    for words, said in (
        (["merge", "--config", "no.yml"], "no such file: no.yml"),
        (["merge", "--config", "run.yml"], "not a text file"),
        (["merge", "--config"], "requires an argument"),
        (["run", "no.yml"], "no such file: no.yml"),
        (["run"], "Missing argument"),
        (["run", "--", "-x"], "expected a file"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err
    write(folder, "output: x\n")
    assert main(["run", "run.yml"]) == 2
    assert "needs it, such as 'command: merge'" in capsys.readouterr().err
    write(folder, "command: mrege\n")
    assert main(["run", "run.yml"]) == 2
