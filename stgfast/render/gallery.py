"""A static page about an output folder: each clip with how it was made and its result.

The page is `gallery.html` with the clips as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stgfast.pages import halves, safe
from stgfast.queue.placing import sync
from stgfast.queue.state import DONE
from stgfast.queue.store import Row

NAME = "index.html"
SHOWN = ("width", "height", "num_frames", "steps", "solver", "image")


def write_gallery(out: Path, rows: Iterable[Row], aside: Path, *, note: str = "") -> Path:
    """Write the page about these jobs atomically. Rows are written as they come, whatever their number.

    `note` is about the run, for the reader.
    """
    before, after = halves("stgfast.render", "gallery.html")
    if note:
        before = before.replace("</header>", f'<p class="small">{escape(note)}</p></header>', 1)
    with aside.open("w", encoding="utf-8") as page:
        page.write(before)
        for number, row in enumerate(rows):
            page.write(",\n" if number else "\n")
            page.write(safe(json.dumps({**described(row), "frames": _frames(out, row)}, ensure_ascii=False)))
        page.write(after)
    sync(aside)
    os.replace(aside, out / NAME)
    return out / NAME


def described(row: Row) -> dict[str, Any]:
    """The data of a job for a page."""
    job = row.job
    settings: dict[str, Any] = {name: getattr(job, name) for name in SHOWN if getattr(job, name) not in (None, "")}
    settings |= {name: value for name, value in job.pipeline.items() if isinstance(value, str | int | float | bool)}
    if job.loras:
        settings["loras"] = ", ".join(f"{Path(lora.path).stem} {lora.weight:g}" for lora in job.loras)
    guidance = job.guidance
    if guidance is not None and guidance.reuses:
        settings["approximate"] = str(guidance).removeprefix(f"{guidance.exact}; ")
    return {
        "name": row.file,
        "status": row.status,
        "model": row.model,
        "line": row.line,
        "attempts": row.attempts,
        "prompt": job.prompt,
        "negative": job.negative_prompt or "",
        "seed": job.seed,
        "settings": settings,
        "guidance": _guidance(guidance) if guidance is not None else [],
        "as_data": guidance.to_dict() if guidance is not None else {},
        "seconds": {stage: round(seconds, 2) for stage, seconds in row.seconds.items()},
        "error": row.error or (f"strange: {row.remark}" if row.remark else ""),
    }


def _frames(out: Path, row: Row) -> list[str]:
    """The addresses of a clip's pictures, or of its file."""
    path = out / row.file
    if row.status != DONE or path.suffix == ".npz":  # no browser shows it
        return []
    if path.is_dir():
        return [quote(f"{row.file}/{frame.name}") for frame in sorted(path.glob("*.png"))]
    return [quote(row.file)]


def _guidance(guidance: Any) -> list[dict[str, Any]]:
    """Each perturbation by its layers, kind and scale, for the grid of layers and scales."""
    return [
        {
            "layers": ", ".join(map(str, part.layers)),
            "kind": f"{part.kind} {part.axis}".strip(),
            "scale": part.scale if isinstance(part.scale, float) else "by schedule",
        }
        for part in guidance.perturbations
    ]
