"""mergekit with matching: the models of a configuration are regrouped, as they are read, into the unit order of one.

``run_merge`` has the arguments of ``mergekit.merge.run_merge``. mergekit plans and merges as always; only the loaders
that it reads tensors from are replaced, for the time of the merge, by ones that regroup. Nothing aligned is written.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mudsc_fast.adapters.frugal import frugal_match
from mudsc_fast.adapters.pretrained import OnDisk, on_disk, restricted
from mudsc_fast.averaging import align_block, align_tensor
from mudsc_fast.calibration import ActivationStats, calibrate
from mudsc_fast.checkpoints import Checkpoint, StackedCheckpoint, open_checkpoint
from mudsc_fast.configuration.mergekit import MudscSection
from mudsc_fast.spec import PermutationSpec

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

# Tokenizers of one family may name a few reserved tokens differently; past this share they are different tokenizers.
_TOKENS_APART = 0.01

_WIDTH_KEYS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
    "num_local_experts", "num_experts", "moe_intermediate_size",
)  # fmt: skip


def need_mergekit() -> str:
    """The version of mergekit; ValueError, which names the extra, if it is missing or of another series."""
    from importlib.metadata import PackageNotFoundError, version

    extra = "pip install 'mudsc-fast[mergekit]' brings mergekit >=0.1.5,<0.2"
    try:
        found = version("mergekit")
    except PackageNotFoundError as error:
        raise ValueError(f"mergekit is not installed: {extra}") from error
    numbers = [int(part) for part in found.split(".")[:3] if part.isdigit()]
    if not [0, 1, 5] <= numbers < [0, 2]:
        raise ValueError(f"mergekit {found} is installed, and mudsc_fast needs >=0.1.5,<0.2: {extra}")
    return found


@dataclass(frozen=True)
class Matched:
    """A model's match with the reference: the spec by the model's own tensor names, its labels, their mean value.

    stacked: the checkpoint by the spec's names, where these are the network's and not those on disk.
    """

    model: ModelReference
    spec: PermutationSpec
    labels: dict[str, Tensor]
    value: float
    stacked: StackedCheckpoint | None = None


class AlignedLoader:
    """What mergekit's LazyTensorLoader offers, with every tensor regrouped as it is read."""

    def __init__(self, loader: Any, matched: Matched) -> None:
        self._loader = loader
        self._matched = matched

    @property
    def index(self) -> Any:
        return self._loader.index

    def get_tensor(
        self,
        key: str,
        device: str = "cpu",
        aliases: Sequence[str] | None = None,
        raise_on_missing: bool = True,
    ) -> Tensor | None:
        there = self.index.tensor_paths
        name = next((name for name in (key, *(aliases or ())) if name in there), key)
        if self._matched.stacked is not None and name in there:
            return _stored_part(self._matched, self._matched.stacked, name).to(device)
        tensor = self._loader.get_tensor(name, device=device, raise_on_missing=raise_on_missing)
        return None if tensor is None else align_tensor(self._matched.spec, self._matched.labels, name, tensor)

    def flush(self) -> None:
        self._loader.flush()


def _stored_part(matched: Matched, whole: StackedCheckpoint, name: str) -> Tensor:
    """One tensor on disk of a model whose network stacks several; experts that changed places are read there."""
    found = whole.block_of(name)
    if found is None:
        return whole.checkpoint[name]
    owner, block = found
    if not block.ranges:
        return whole.checkpoint[name]
    part = align_block(
        matched.spec,
        matched.labels,
        owner,
        whole.layout[owner].shape,
        block.ranges,
        lambda rows: whole.rows(owner, rows),
    )
    return part.reshape(whole.checkpoint.layout[name].shape).contiguous()


def models_of(config: MergeConfiguration) -> list[ModelReference]:
    """The models of a configuration in its order, the base model first; all others are matched to the first."""
    found = [config.base_model] if config.base_model else []
    outer: Any = [config, *(config.modules or {}).values()]
    for part in outer:
        for given in part.models or ():
            found.append(given.model)
        for piece in part.slices or ():
            found += [source.model for source in piece.sources]
            found += [piece.base_model] if piece.base_model else []
    return list(dict.fromkeys(found))


def run_merge(
    merge_config: MergeConfiguration,
    out_path: str,
    options: MergeOptions,
    config_source: str | None = None,
    mudsc: MudscSection | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Matched]:
    """``mergekit.merge.run_merge`` on models that are matched first; returns the matches.

    merge_config, out_path, options, config_source: mergekit's. mudsc: how to match; None: by weights alone.
    say: takes a line about each match.

    Raises ValueError with mergekit's own message for a merge that mergekit refuses, and, naming the model, for one that
    cannot be matched; both before any tensor is read.
    """
    merge: Any = importlib.import_module("mergekit.merge")
    section = mudsc or MudscSection.model_validate({})
    with matched_loaders(merge_config, options, section, say) as found:
        try:
            merge.run_merge(merge_config, out_path, options=options, config_source=config_source)
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"mergekit: {error}") from error
    return found


@contextmanager
def matched_loaders(
    config: MergeConfiguration,
    options: MergeOptions,
    section: MudscSection,
    say: Callable[[str], None] | None = None,
) -> Iterator[list[Matched]]:
    """Inside the block mergekit reads the configuration's models in the unit order of the first one."""
    tasks: Any = importlib.import_module("mergekit.io.tasks")
    cache = tasks.LoaderCache()
    cache.setup(options=options)
    before = dict(cache.loaders)
    try:
        prepared = prepare(config, options, section)
        found = [] if prepared is None else _match_all(prepared, options, section, say or _silent)
        for each in found:
            cache.loaders[each.model] = AlignedLoader(cache.get(each.model), each)
        yield found
    finally:
        cache.flush_all()
        cache.loaders.clear()
        cache.loaders.update(before)


def _silent(text: str) -> None:
    pass


def _untouched(config: MergeConfiguration, section: MudscSection) -> bool:
    return config.merge_method == "passthrough" and not section.passthrough


@dataclass(frozen=True)
class Prepared:
    """The models of a configuration, opened and found to correspond: the reference and those to be matched to it."""

    base: _Source
    others: list[_Source]
    network: OnDisk
    base_spec: PermutationSpec
    specs: list[PermutationSpec]  # of the others, by their own tensor names


def prepare(config: MergeConfiguration, options: MergeOptions, section: MudscSection) -> Prepared | None:
    """Everything that can be refused without reading a tensor; None if there is nothing to match.

    Raises ValueError as ``run_merge`` does.
    """
    models = models_of(config)
    unknown = [name for name in section.leave if name not in map(str, models)]
    if unknown:
        raise ValueError(f"mudsc.leave: {unknown[0]!r} is none of the models {', '.join(map(str, models))}")
    chosen = [model for model in models[1:] if str(model) not in section.leave]
    if not chosen or _untouched(config, section):
        _check_with_mergekit(config, options)
        return None
    base, *others = (_Source(model, options) for model in (models[0], *chosen))
    aligns_vocabulary = bool(config.tokenizer_source or config.tokenizer)
    for source in others:
        source.check_against(base, aligns_vocabulary)
    _check_with_mergekit(config, options)
    network = on_disk(base.config)
    base_spec = base.named(network)
    _chosen(base_spec, section.spaces)
    return Prepared(base, others, network, base_spec, [source.named(network) for source in others])


def _match_all(
    prepared: Prepared, options: MergeOptions, section: MudscSection, say: Callable[[str], None]
) -> list[Matched]:
    base, found = prepared.base, []
    for source, own in zip(prepared.others, prepared.specs, strict=True):
        spec = _chosen(restricted(prepared.base_spec, source.checkpoint), section.spaces)
        stats = None
        if section.calibration is not None and section.used_balance < 1:
            stats = _calibrated(base, source, spec, section, options)
        states = _comparable(base, source, prepared.network)
        plan = frugal_match(
            states,
            spec,
            stats,
            section.used_balance,
            section.seed,
            section.max_sweeps,
            progress=not options.quiet,
            device=options.device,
        )
        value = sum(plan.values.values()) / max(1, len(plan.values))
        say(f"matched {source.model} to {base.model}: {len(plan.labels)} spaces with a mean match of {value:.3f}")
        labels = {name: rows[1] for name, rows in plan.labels.items()}
        stacked = source.checkpoint if isinstance(source.checkpoint, StackedCheckpoint) else None
        found.append(Matched(source.model, own, labels, value, stacked))
    return found


def _check_with_mergekit(config: MergeConfiguration, options: MergeOptions) -> None:
    """Let mergekit plan the merge, so that what it refuses is refused before the models are matched."""
    merge: Any = importlib.import_module("mergekit.merge")
    config = config.model_copy(deep=True)
    try:
        architecture = merge.get_architecture_info(config, options)
        out_config = merge._model_out_config(config, architecture, trust_remote_code=options.trust_remote_code)
        planner = merge.MergePlanner(config, architecture, options=options, out_model_config=out_config)
        planner.plan_to_disk(out_path="")  # a list of tasks; nothing is run
    except Exception as error:
        raise ValueError(f"mergekit: {error}") from error


class _Source:
    """One model of the configuration, opened lazily."""

    def __init__(self, model: ModelReference, options: MergeOptions) -> None:
        self.model = model
        try:
            merged = model.merged(
                cache_dir=options.lora_merge_cache,
                trust_remote_code=options.trust_remote_code,
                lora_merge_dtype=options.lora_merge_dtype,
            )
            self.folder = Path(merged.local_path(cache_dir=options.transformers_cache))
            self.config: Any = merged.config(trust_remote_code=options.trust_remote_code)
        except Exception as error:
            hint = "" if Path(model.model.path).exists() else ": no folder here, and not to be had from the hub"
            if model.lora is not None and options.lora_merge_cache is None:
                hint = ": --lora-merge-cache FOLDER says where models go that their adapter was merged into"
            raise ValueError(f"model {model}: cannot be opened: {error}{hint}") from error
        self.checkpoint: Checkpoint | StackedCheckpoint
        # Of pickles only plain tensors are read (weights_only), which mergekit does without asking.
        self.checkpoint = open_checkpoint(self.folder, allow_torch_load=True)

    def check_against(self, base: _Source, aligns_vocabulary: bool) -> None:
        """ValueError, naming the model and what differs, if its units cannot correspond to those of the base."""
        cannot = f"model {self.model} cannot be matched to {base.model}"
        way_out = "remove it, or list it in 'mudsc: leave:' to merge it as it is"
        ours, theirs = self.config, base.config
        if ours.model_type != theirs.model_type or ours.architectures != theirs.architectures:
            raise ValueError(
                f"{cannot}: its architecture is {_architecture(ours)}, not {_architecture(theirs)}; {way_out}"
            )
        for key in _WIDTH_KEYS:
            if getattr(ours, key, None) != getattr(theirs, key, None):
                raise ValueError(
                    f"{cannot}: its {key} is {getattr(ours, key, None)}, not {getattr(theirs, key, None)}; {way_out}"
                )
        layout = base.checkpoint.layout
        for name, info in self.checkpoint.layout.items():
            # Rows of a vocabulary may be more or fewer; all else has to be alike.
            if name in layout and info.shape[1:] != layout[name].shape[1:]:
                raise ValueError(f"{cannot}: {name} has shape {info.shape}, not {layout[name].shape}; {way_out}")
        if not aligns_vocabulary and not base.same_tokens(self):
            raise ValueError(
                f"{cannot}: its tokenizer gives other tokens to the same rows of the embeddings. Let mergekit bring "
                f"them together with 'tokenizer: {{source: union}}' or 'tokenizer_source: base', or {way_out}"
            )

    def named(self, network: OnDisk) -> PermutationSpec:
        """The network's spec by this checkpoint's names; a checkpoint with other tensors is seen as the network's."""
        try:
            if isinstance(self.checkpoint, Checkpoint):
                self.checkpoint = network.seen_in(self.checkpoint)
            spec = network.spec_of(self.checkpoint)
            spec.check({name: info.shape for name, info in self.checkpoint.layout.items()})
        except ValueError as error:
            raise ValueError(f"model {self.model} cannot be matched: {error}") from error
        return spec

    def vocabulary_size(self, network: OnDisk) -> int:
        """Rows of the smallest vocabulary tensor; 0 without one."""
        layout = self.checkpoint.layout
        return min((info.shape[0] for name, info in layout.items() if network.is_vocabulary(name)), default=0)

    def same_tokens(self, other: _Source) -> bool:
        """Whether the tokenizers agree on the ids that both know, as far as their files tell."""
        ours, theirs = _vocabulary(self.folder), _vocabulary(other.folder)
        shared = ours.keys() & theirs.keys()
        return sum(ours[k] != theirs[k] for k in shared) <= _TOKENS_APART * len(shared)


def _architecture(config: Any) -> str:
    names = config.architectures or ["unknown"]
    return f"{names[0]} ({config.model_type})"


def _vocabulary(folder: Path) -> dict[int, str]:
    """{id: token} of a tokenizer.json, empty without one."""
    try:
        vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    if isinstance(vocabulary, dict):
        return {int(k): token for token, k in vocabulary.items()}
    return {k: str(entry[0]) for k, entry in enumerate(vocabulary)}  # unigram models hold [token, score]


class _SharedRows(Mapping[str, Tensor]):
    """A checkpoint whose vocabulary tensors have the rows of some tokens only, in their order."""

    def __init__(self, source: _Source, rows: Tensor, network: OnDisk) -> None:
        self._tensors = source.checkpoint
        self._rows = rows
        self._network = network

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return tensor[self._rows.to(tensor.device)] if self._network.is_vocabulary(name) else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _comparable(base: _Source, source: _Source, network: OnDisk) -> list[Mapping[str, Tensor]]:
    """Both checkpoints, such that equal rows of their vocabulary tensors stand for equal tokens."""
    sizes = [each.vocabulary_size(network) for each in (base, source)]
    if sizes[0] == sizes[1] and base.same_tokens(source):
        return [base.checkpoint, source.checkpoint]
    known = [
        {token: k for k, token in _vocabulary(each.folder).items() if k < size}
        for each, size in zip((base, source), sizes, strict=True)
    ]
    shared = [token for token in known[0] if token in known[1]]
    rows = [torch.tensor([ids[token] for token in shared], dtype=torch.int64) for ids in known]
    if not shared:
        rows = [torch.arange(min(sizes))] * 2
    return [_SharedRows(each, ids, network) for each, ids in zip((base, source), rows, strict=True)]


def _chosen(spec: PermutationSpec, patterns: Sequence[str] | None) -> PermutationSpec:
    """The spaces whose names fit a pattern, with those that are tied to them; ValueError for a pattern without any."""
    if patterns is None:
        return spec
    names = [space.name for space in spec.spaces]
    chosen: set[str] = set()
    for pattern in patterns:
        fitting = fnmatch.filter(names, pattern)
        if not fitting:
            raise ValueError(f"mudsc.spaces: {pattern!r} fits none of the spaces {', '.join(names[:12])}, ...")
        chosen.update(fitting)
    ties = {spec[name].tie for name in chosen} - {None}
    return PermutationSpec(tuple(s for s in spec.spaces if s.name in chosen or s.tie in ties))


def _calibrated(
    base: _Source, source: _Source, spec: PermutationSpec, section: MudscSection, options: MergeOptions
) -> ActivationStats:
    import transformers

    chunks = _chunks(base.folder, section)
    models = []
    for each in (base, source):
        found: Any = getattr(transformers, each.config.architectures[0])
        models.append(found.from_pretrained(each.folder, local_files_only=True))
    return calibrate(
        models, torch.split(chunks, 8), spec, scope="cross", device=options.device, progress=not options.quiet
    )


def _chunks(folder: Path, section: MudscSection) -> Tensor:
    """(chunks, tokens) int64: the calibration text in pieces of equal length."""
    import transformers

    path = Path(section.calibration or "")
    if not path.is_file():
        raise ValueError(f"mudsc.calibration: no such file: {path}")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8")).input_ids)
    length = min(section.chunk_tokens, len(ids))
    if length < 2:
        raise ValueError(f"mudsc.calibration: {path} gives {len(ids)} tokens, expected 2 or more")
    count = min(section.chunks, len(ids) // length)
    return ids[: count * length].reshape(count, length)
