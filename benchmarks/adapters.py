"""Each adapter beside the algorithm of its tool, restated plainly, on the same inputs: time and memory.

python -m benchmarks.adapters --out benchmarks/results/adapters-cpu.json

Every measurement is a process of its own, so that its peak of memory is its own; the two contenders of a row take
turns. The results of both are compared before anything counts. mergekit is the real one, if it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 3

# {row: {contender: a function that makes the inputs and gives the function to measure, whose result is hashed}}
Rows = dict[str, dict[str, Callable[[Path], Callable[[], Any]]]]


def _covariance(width: int, samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(width, samples, generator=generator)
    both = [
        shared[torch.randperm(width, generator=generator)] + torch.randn(width, samples, generator=generator)
        for _ in "ab"
    ]
    return torch.cov(torch.cat(both), correction=0)


def _correlation(covariance: Tensor) -> Tensor:
    deviation = covariance.diagonal().sqrt()
    return covariance / torch.outer(deviation, deviation).clamp(min=1e-7)


# ---- ZipIt ----


def _zipit_ours(folder: Path) -> Callable[[], Any]:
    from mudsc_fast.adapters import zipit

    metric = {"covariance": _covariance(384, 3000)}
    return lambda: zipit.match_tensors_zipit(metric, 0.5, 0.5, 1.0)[1].argmax(1)


def _zipit_theirs(folder: Path) -> Callable[[], Any]:
    from .peers import official_zip

    covariance = _covariance(384, 3000)
    return lambda: official_zip(_correlation(covariance), 384).flatten()


def _permute_ours(folder: Path) -> Callable[[], Any]:
    from mudsc_fast.adapters import zipit

    metric = {"covariance": _covariance(1536, 3000)}
    return lambda: zipit.match_tensors_permute(metric, 0.5)[1].argmax(1)


def _permute_theirs(folder: Path) -> Callable[[], Any]:
    from scipy.optimize import linear_sum_assignment

    covariance = _covariance(1536, 3000)

    def run() -> Tensor:
        similarity = _correlation(covariance)[:1536, 1536:].numpy()
        _, columns = linear_sum_assignment(similarity, maximize=True)
        second = torch.eye(1536)[torch.from_numpy(columns)].T
        unmerge = torch.cat([torch.eye(1536), second])
        merge = unmerge / (unmerge.sum(0, keepdim=True) + 1e-5)
        return unmerge.argmax(1) + 0 * int(merge[0, 0] > 2)

    return run


# ---- git-re-basin ----

_WIDTH = 1024
_AXES: dict[str, tuple[str | None, ...]] = {
    "layer0.weight": ("P_0", None),
    "layer1.weight": ("P_1", "P_0"),
    "layer2.weight": ("P_2", "P_1"),
    "layer3.weight": (None, "P_2"),
}


def _layers(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"layer0.weight": (_WIDTH, 784), "layer3.weight": (10, _WIDTH)}
    return {name: torch.randn(sizes.get(name, (_WIDTH, _WIDTH)), generator=generator) for name in _AXES}


def _rebasin_ours(folder: Path) -> Callable[[], Any]:
    from mudsc_fast.adapters import rebasin

    ps = rebasin.permutation_spec_from_axes_to_perm(_AXES)
    a, b = _layers(0), _layers(1)

    def run() -> Tensor:
        torch.manual_seed(0)
        return torch.cat(list(rebasin.weight_matching(ps, a, b, max_iter=20).values()))

    return run


def _rebasin_theirs(folder: Path) -> Callable[[], Any]:
    from scipy.optimize import linear_sum_assignment

    a, b = _layers(0), _layers(1)
    uses = {f"P_{k}": [(f"layer{k}.weight", 0), (f"layer{k + 1}.weight", 1)] for k in range(3)}

    def run() -> Tensor:
        torch.manual_seed(0)
        perm = {p: torch.arange(_WIDTH) for p in uses}
        for _ in range(20):
            gained = False
            for k in torch.randperm(3):
                p = f"P_{int(k)}"
                products = torch.zeros(_WIDTH, _WIDTH)
                for name, axis in uses[p]:
                    w_b = b[name]
                    for other, q in enumerate(_AXES[name]):
                        if q is not None and other != axis:
                            w_b = torch.index_select(w_b, other, perm[q])
                    products += a[name].movedim(axis, 0).flatten(1) @ w_b.movedim(axis, 0).flatten(1).T
                found = torch.from_numpy(linear_sum_assignment(products.numpy(), maximize=True)[1])
                rows = torch.arange(_WIDTH)
                gained = gained or bool(products[rows, found].sum() > products[rows, perm[p]].sum() + 1e-12)
                perm[p] = found
            if not gained:
                break
        return torch.cat(list(perm.values()))

    return run


# ---- experts ----


def _experts() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    up, gate = (torch.randn(64, 512, 256, generator=generator) for _ in range(2))
    return up, torch.randn(64, 256, 512, generator=generator), gate


def _experts_ours(folder: Path) -> Callable[[], Any]:
    from mudsc_fast.adapters import experts

    up, down, gate = _experts()
    return lambda: experts.permutations(up, down, gate)


def _experts_theirs(folder: Path) -> Callable[[], Any]:
    from scipy.optimize import linear_sum_assignment

    up, down, gate = _experts()

    def run() -> Tensor:
        units = torch.cat([up, down.transpose(1, 2), gate], 2)
        found = [
            torch.from_numpy(linear_sum_assignment(torch.cdist(units[0], own).square().numpy())[1]) for own in units
        ]
        return torch.stack(found)

    return run


# ---- the official MuDSC module ----


def _networks() -> list[torch.nn.Module]:
    """Two networks, the second the first in another order with noise: what decides is then far above rounding."""
    import networks

    import mudsc_fast as mf

    torch.manual_seed(0)
    first, second = (networks.MLP(inputs=64, widths=(192, 192, 192)) for _ in range(2))
    spec = mf.spec_for(first)
    moved = spec.permute(first.state_dict(), spec.random_permutation(1))
    second.load_state_dict({name: x + 0.01 * torch.randn(x.shape) for name, x in moved.items()})
    return [first, second]


_PERM = {
    k: [
        [0, f"fc{k + 1}.weight"],
        [0, f"fc{k + 1}.bias"],
        [1, f"{'head' if k == 2 else f'fc{k + 2}'}.weight", {"in": None}],
    ]
    for k in range(3)
}
_SWEEPS = 8


def _mudsc_ours(folder: Path) -> Callable[[], Any]:
    from mudsc_fast.adapters import mudsc

    nets = _networks()
    loader = [(x, None) for x in torch.randn(2000, 64, generator=torch.Generator().manual_seed(3)).split(500)]

    def run() -> Tensor:
        fusion = mudsc.WeightFusion(fix_sims=True, iter=_SWEEPS, verbose=False)
        fusion.transform(nets, _PERM, act_loader=loader, in_weight_space=True)
        return torch.cat([unmerge.argmax(1) for _, unmerge in fusion.perm_mats.values()])

    return run


def _mudsc_theirs(folder: Path) -> Callable[[], Any]:
    import mudsc_fast as mf

    from .official import OfficialMatch
    from .peers import official_covariance

    nets = _networks()
    states = [net.state_dict() for net in nets]
    spec = mf.spec_for(nets[0])
    inputs = torch.randn(2000, 64, generator=torch.Generator().manual_seed(3))

    def run() -> Tensor:
        activations = {}
        hidden = [inputs, inputs]
        with torch.no_grad():
            for k, space in enumerate(spec.spaces):
                hidden = [torch.relu(net.get_submodule(f"fc{k + 1}")(x)) for net, x in zip(nets, hidden, strict=True)]
                product = official_covariance(hidden, 1)() / len(inputs)
                mean = torch.cat([x.mean(0) for x in hidden])
                covariance = product - torch.outer(mean, mean)
                activations[space.name] = _correlation(covariance)
        labels = OfficialMatch(states, spec, activations, "zip", 0.5).run(_SWEEPS)
        return torch.cat([labels[space.name].flatten() for space in spec.spaces])

    return run


# ---- mergekit ----


def _language_models(folder: Path) -> None:
    import transformers

    if (folder / "b").exists():
        return
    config = transformers.LlamaConfig(
        vocab_size=16000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=10, num_attention_heads=16,
        num_key_value_heads=8, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder / "a")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))
    from mudsc_fast import PermutationSpec

    spec = PermutationSpec.trace(model, (), {"input_ids": torch.zeros(2, 8, dtype=torch.long)})
    model.load_state_dict(spec.permute(model.state_dict(), spec.random_permutation(1)))
    model.save_pretrained(folder / "b")


def _mergekit(folder: Path, ours: bool) -> Callable[[], Any]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from mudsc_fast.adapters import mergekit

    config = MergeConfiguration.model_validate(
        {
            "merge_method": "linear",
            "dtype": "bfloat16",
            "models": [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in "ab"],
        }
    )
    out = tempfile.mkdtemp(dir=folder)
    run: Callable[..., Any] = mergekit.run_merge if ours else run_merge
    return lambda: run(config, out, MergeOptions(quiet=True)) and None


ROWS: Rows = {
    "zipit: match_tensors_zipit, 384 units": {"ours": _zipit_ours, "theirs": _zipit_theirs},
    "zipit: match_tensors_permute, 1536 units": {"ours": _permute_ours, "theirs": _permute_theirs},
    "rebasin: weight_matching, 3 x 1024 units": {"ours": _rebasin_ours, "theirs": _rebasin_theirs},
    "experts: 64 experts of 512 units": {"ours": _experts_ours, "theirs": _experts_theirs},
    "mudsc: WeightFusion, 3 x 192 units": {"ours": _mudsc_ours, "theirs": _mudsc_theirs},
    "mergekit: two Llamas of 157 million": {
        "ours": lambda folder: _mergekit(folder, True),
        "theirs": lambda folder: _mergekit(folder, False),
    },
}


# ---- measuring ----


def _resident(field: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the most since the last reset."""
    rows = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith(f"{field}:"))


def measure(row: str, contender: str, folder: Path) -> dict[str, Any]:
    """Time and peak memory of one contender, in this process."""
    run = ROWS[row][contender](folder)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _resident("VmRSS")
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    digest = "" if result is None else hashlib.sha256(result.to(torch.int64).numpy().tobytes()).hexdigest()
    peak = _resident("VmHWM")
    return {"seconds": seconds, "extra_mib": (peak - before) / 2**20, "peak_mib": peak / 2**20, "digest": digest}


def _rounds(row: str, folder: Path, rounds: int) -> Iterator[dict[str, dict[str, Any]]]:
    for _ in range(rounds):
        found = {}
        for contender in ROWS[row]:
            command = [sys.executable, "-m", "benchmarks.adapters", "--one", row, contender, "--folder", str(folder)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{row}, {contender}: {done.stderr[-2000:]}")
            found[contender] = json.loads(done.stdout.splitlines()[-1])
        if len({each["digest"] for each in found.values()}) > 1:
            raise RuntimeError(f"{row}: the results differ")
        yield found


def summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds; a ratio is the median of each round's own."""
    result: dict[str, Any] = {}
    for contender in rounds[0]:
        for key in ("seconds", "extra_mib", "peak_mib"):
            result[f"{contender}_{key}"] = statistics.median(each[contender][key] for each in rounds)
    for name, key in (("speedup", "seconds"), ("memory", "peak_mib")):
        result[name] = statistics.median(each["theirs"][key] / each["ours"][key] for each in rounds)
    return result


def table(results: dict[str, Any]) -> str:
    """The Markdown table of docs/adapters.md."""
    lines = [
        "| on the same inputs | mudsc_fast | the tool's algorithm | times as fast | memory above the inputs, MiB |",
        "|---|---|---|---|---|",
    ]
    for row, found in results["rows"].items():
        lines.append(
            f"| {row} | {found['ours_seconds']:.3g} s | {found['theirs_seconds']:.3g} s | {found['speedup']:.2g} | "
            f"{found['ours_extra_mib']:.0f}, there {found['theirs_extra_mib']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", default="", help="only rows whose name begins like this; others stay in --out")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--one", nargs=2, metavar=("ROW", "CONTENDER"))
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "examples"))
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(measure(*options.one, options.folder)))
        return
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        for row in (row for row in ROWS if row.startswith(options.rows)):
            folder = Path(name)
            if row.startswith("mergekit"):
                _language_models(folder)
            rows[row] = summary(list(_rounds(row, folder, options.rounds)))
            print(f"{row:<42} {rows[row]['ours_seconds']:.3f} s, {rows[row]['speedup']:.1f}x as fast", flush=True)
    if options.out is not None:
        about = {
            "command": "python -m benchmarks.adapters",
            "machine": f"{platform.machine()}, 1 thread",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "rounds": options.rounds,
        }
        if options.rows and options.out.exists():  # measured in parts
            earlier = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
            rows = {name: {**earlier, **rows}[name] for name in ROWS if name in rows or name in earlier}
        options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
