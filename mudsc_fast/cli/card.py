"""The README of a merged folder: what was merged and how, in the form of a Hugging Face model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mudsc_fast.plan import MergePlan

_HOW = {
    "align": "Units of the models were matched one to one and every unit was averaged with its match.",
    "zip": "Similar units were merged, across the models and inside them, until the width was reached.",
    "average": "Tensors were averaged as they are, without matching units.",
}


def model_card(
    name: str, verb: str, sources: Sequence[Path], about: Mapping[str, str], version: str, plan: MergePlan | None
) -> str:
    """The text of README.md.

    name: of the output folder. verb: "merged" or "aligned". about: the options that decided the result, in order.
    """
    names = [source.resolve().name for source in sources]
    front = ["---", "library_name: transformers", "base_model:", *[f"- {json.dumps(n)}" for n in names]]
    front += ["tags:", "- merge", "- mudsc-fast", "---", ""]
    method = about.get("method", "align")
    if verb == "aligned":
        first, second = names
        text = [
            f"{second} in the unit order of {first}. It computes what {second} computes; its units stand where {first} "
            "has similar ones, so that the two can be merged position by position."
        ]
    else:
        text = [f"A merge of {', '.join(names)}, made without training. {_HOW.get(method, '')}"]
    lines = [f"# {name}", "", *text, "", f"Made with mudsc_fast {version}.", "", "## Options", ""]
    lines += ["| option | value |", "|---|---|", *[f"| {key} | {value} |" for key, value in about.items()], ""]
    if plan is not None and plan.values:
        mean = sum(plan.values.values()) / len(plan.values)
        worst = sorted(plan.values.items(), key=lambda item: (item[1], item[0]))[:5]
        lines += [
            "## Match",
            "",
            f"{len(plan.labels)} spaces of {sum(s.width for s in plan.spec.spaces)} units in all, mean similarity of "
            f"matched units {mean:.3f}. The spaces whose units are least alike:",
            "",
            "| space | width | similarity |",
            "|---|---|---|",
            *[f"| {space} | {plan.spec[space].width} | {value:.3f} |" for space, value in worst],
            "",
        ]
    return "\n".join([*front, *lines])
