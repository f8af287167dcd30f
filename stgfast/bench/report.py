"""Results as one static page.

The page is `report.html` with the rows as JSON, which its script draws. Of rows that answer the same question on the
same device, the last one is shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stgfast.errors import wrong
from stgfast.pages import halves, safe

# The fields that distinguish questions of each kind.
QUESTION = (
    *("bench", "device", "model", "size", "whole", "steps", "axis", "guidance"),
    *("case", "MB of a branch", "size of a head", "tokens", "grid", "jobs", "dtype"),
)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    """The rows of all files in a folder; raises if there are none."""
    files = sorted(folder.glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines() if line.strip()]
    if not rows:
        raise wrong("--report", str(folder), "a folder with results, files of lines of JSON that end in .jsonl")
    return latest(rows)


def latest(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    last: dict[str, dict[str, Any]] = {}
    for row in rows:
        question = json.dumps([row.get(name) for name in QUESTION])
        last.pop(question, None)
        last[question] = dict(row)
    return list(last.values())


def page(rows: Iterable[Mapping[str, Any]]) -> str:
    before, after = halves("stgfast.bench", "report.html")
    data = ",\n".join(json.dumps(row) for row in rows)
    return f"{before}{safe(data)}{after}"


def table(rows: Iterable[Mapping[str, Any]], size: str, names: Mapping[str, str]) -> str:
    """A table for a README: the time of each variant over the accelerated step, and the prediction for the paper's
    scheme.
    """
    of = {row["model"]: row for row in rows if row["bench"] == "steps" and row["size"] == size and not row["whole"]}
    there = [model for model in names if model in of]
    lines = [["", *(names[model] for model in there)], ["---"] * (len(there) + 1)]
    shown = {
        "the paper's scheme": ("over", "paper"),
        "the paper's own code": ("over", "reference"),
        "as the blocks predict": ("predicted", "paper"),
        "CFG alone": ("over", "stock"),
    }
    for line, (figure, variant) in shown.items():
        values = [of[model][figure].get(variant) for model in there]
        if any(values):
            lines.append([line, *("" if value is None else f"{value:.2f}" for value in values)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
