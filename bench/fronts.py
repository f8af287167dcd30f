"""Error and cost on the model in the package: tables of two READMEs and a plot, made from bench/results/front.jsonl.

python bench/fronts.py           the tables
python bench/fronts.py --check   do the READMEs and the plot have these values?
python bench/fronts.py --write   write them there
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import readme

RESULTS = Path(__file__).parent / "results" / "front.jsonl"
JUDGED = RESULTS.with_name("judged.json")
PLOT = RESULTS.with_suffix(".svg")
PAGE = Path(__file__).parent / "README.md"
BASE = "Euler, 48 steps"
ACROSS = "block-rows, in parts of 48 exact Euler steps"
Row = Mapping[str, Any]
# What is drawn alike: colours on a light ground and on a dark one.
KINDS = {
    "Euler": ("#8a897f", "#a3a198"),
    "UniPC": ("#2456c9", "#7aa2ff"),
    "DPM++": ("#2e7d4f", "#74c796"),
    "reuse": ("#b8237a", "#ff8fcb"),
    "caches": ("#b3531e", "#f0a06a"),
    "blocks": ("#6a2fc9", "#b79bff"),
}
W, H, LEFT, RIGHT, TOP, BOTTOM = 760, 430, 56, 14, 12, 62
WIDEST = 1.05  # of the costs that are drawn
LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2)


def rows_of(path: Path = RESULTS) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: (row["cost"], row["distance"]))


def best_of(rows: Sequence[Row]) -> list[Row]:
    """The ways for which no other way is both cheaper and closer."""
    found: list[Row] = []
    for row in rows:
        if not found or row["distance"] < found[-1]["distance"]:
            found.append(row)
    return found


def kind_of(row: Row) -> str:
    if row["peer"]:
        return "caches"
    return "blocks" if row.get("blocks", 1) != 1 else "reuse" if row["order"] is not None else row["solver"]


def brief(row: Row) -> str:
    """The name of a way, with the number of named steps instead of the steps."""
    named = next((row.get(name) for name in ("reuse", "blocks") if isinstance(row.get(name), list)), [])
    steps = ", ".join(map(str, named))
    return row["way"].replace(f" but in steps {steps}", f", {len(named)} of them whole") if named else row["way"]


def table(rows: Sequence[Row]) -> str:
    """By cost. Ways for which no other way is both cheaper and closer are bold."""
    best = {row["way"] for row in best_of(rows)}
    lines = ["| way | cost | seconds | distance | 95% |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        way = f"**{row['way']}**" if row["way"] in best else row["way"]
        lines.append(f"| {way} | {figures(row)} | {row['distance, 95%']:.4f} |")
    return "\n".join(lines) + "\n"


def short(rows: Sequence[Row]) -> str:
    """The cheapest way of each kind that is as close as the usual one, or the closest there is."""
    (base,) = (row for row in rows if row["way"] == BASE)
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        peer = row["peer"].partition(",")[0] if row["peer"] else ""
        name = f"{row['solver']}, {peer or kind_of(row)}"
        kinds.setdefault(name, []).append(row)
    chosen = [
        next((row for row in kind if row["distance"] <= base["distance"]), min(kind, key=lambda row: row["distance"]))
        for kind in kinds.values()
    ]
    chosen.sort(key=lambda row: (row["distance"] > base["distance"], row["cost"]))
    lines = ["| as close as 48 exact Euler steps | cost | seconds | distance |", "| --- | --- | --- | --- |"]
    for number, row in enumerate(chosen):
        if row["distance"] > base["distance"] and (not number or chosen[number - 1]["distance"] <= base["distance"]):
            lines.append("| *not as close at any cost that was tried:* | | | |")
        lines.append(f"| {brief(row)} | {figures(row)} |")
    return "\n".join(lines) + "\n"


NUMBERS = {  # of the judge: by what they are multiplied, and their digits
    "right": ("all right, %", 100, 1),
    "Fréchet": ("Fréchet distance", 1, 3),
    "diversity": ("diversity", 1, 4),
    "speed": ("speed, pixels", 1, 3),
    "jerk": ("jerk, pixels", 1, 4),
    "flicker": ("flicker, 1/1000", 1000, 2),
    "saturation": ("saturation", 1, 4),
}


def judged(found: Mapping[str, Any]) -> str:
    """The judged difference between the clips of a recipe and exact ones."""
    clips, than = found["clips"], found["than"]
    head = f"The difference of {clips} clips by a recipe from the same clips by {than} steps and all branches:"
    rows = []
    for recipe, numbers in found["found"].items():
        cells = [recipe]
        for name, (_, times, digits) in NUMBERS.items():
            value, half = (times * numbers[name][part] for part in ("value", "half"))
            cells.append(f"{value:+.{digits}f} ± {half:.{digits}f}")
        rows.append(cells)
    return f"{head}\n\n{readme.table(['by', *(name for name, _, _ in NUMBERS.values())], rows)}"


def figures(row: Row) -> str:
    return f"{row['cost']:.2f} | {row['seconds']:.2f} | {row['distance']:.4f}"


def plot(rows: Sequence[Row]) -> str:
    """Distance on a logarithmic y axis, cost on the x axis."""
    shown = [row for row in rows if row["cost"] <= WIDEST]
    low, high = (edge(row["distance"] for row in shown) for edge in (min, max))
    bottom, top = math.log(low / 1.12), math.log(high * 1.12)

    def x(cost: float) -> float:
        return round(LEFT + (W - LEFT - RIGHT) * cost / WIDEST, 1)

    def y(distance: float) -> float:
        return round(H - BOTTOM - (H - BOTTOM - TOP) * (math.log(distance) - bottom) / (top - bottom), 1)

    def drawn() -> Iterator[str]:
        yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" font-family="sans-serif" font-size="12">'
        yield f"<style>{STYLE}</style>"
        yield f'<rect class="ground" width="{W}" height="{H}"/>'
        for level in LEVELS:
            if low / 1.12 <= level <= high * 1.12:
                yield f'<line class="line" x1="{LEFT}" x2="{W - RIGHT}" y1="{y(level)}" y2="{y(level)}"/>'
                yield f'<text x="{LEFT - 6}" y="{y(level) + 4}" text-anchor="end">{level:g}</text>'
        for cost in (0.2, 0.4, 0.6, 0.8, 1.0):
            yield f'<text x="{x(cost)}" y="{H - BOTTOM + 18}" text-anchor="middle">{cost:g}</text>'
        yield f'<text x="{W - RIGHT}" y="{H - BOTTOM + 34}" text-anchor="end">{ACROSS}</text>'
        yield f'<text x="{LEFT}" y="{TOP + 2}">distance from the converged clip</text>'
        for kind in ("Euler", "UniPC", "DPM++"):
            points = " ".join(f"{x(row['cost'])},{y(row['distance'])}" for row in shown if kind_of(row) == kind)
            yield f'<polyline class="{named(kind)}" points="{points}"/>'
        for row in sorted(shown, key=lambda row: [*KINDS].index(kind_of(row))):
            title = f"<title>{escape(row['way'])}: {row['cost']:.2f}, {row['distance']:.4f}</title>"
            place = f'cx="{x(row["cost"])}" cy="{y(row["distance"])}"'
            yield f'<circle class="{named(kind_of(row))}" {place} r="3.5">{title}</circle>'
        for number, (kind, said) in enumerate(SAID.items()):
            across = LEFT + (0, 70, 145, 255, 415, 580)[number]
            yield f'<circle class="{named(kind)}" cx="{across}" cy="{H - 14}" r="4"/>'
            yield f'<text x="{across + 9}" y="{H - 10}">{said}</text>'
        yield "</svg>"

    return "\n".join(drawn()) + "\n"


SAID = {
    "Euler": "Euler",
    "UniPC": "UniPC",
    "DPM++": "DPM-Solver++",
    "reuse": "differences extrapolated",
    "caches": "caches of other libraries",
    "blocks": "blocks extrapolated",
}


def named(kind: str) -> str:
    return kind.replace("+", "p").lower()


def _style(number: int, ground: str, line: str, ink: str) -> str:
    kinds = "".join(
        f".{named(kind)}{{fill:{colours[number]};stroke:{colours[number]}}}" for kind, colours in KINDS.items()
    )
    return f".ground{{fill:{ground}}}.line{{stroke:{line}}}text{{fill:{ink}}}{kinds}polyline[points]{{fill:none}}"


STYLE = (
    f"{_style(0, '#ffffff', '#deded8', '#3c3c38')}"
    f"@media(prefers-color-scheme:dark){{{_style(1, '#161615', '#3a3935', '#c8c6be')}}}"
)


def main() -> int:
    rows = rows_of()
    if sys.argv[1:] == ["--write"]:
        PLOT.write_text(plot(rows), encoding="utf-8")
    elif sys.argv[1:] == ["--check"] and PLOT.read_text(encoding="utf-8") != plot(rows):
        print(f"{PLOT} is another plot; python bench/fronts.py --write")
        return 1
    found = json.loads(JUDGED.read_text(encoding="utf-8"))
    return readme.main("fronts.py", __doc__, {readme.README: short(rows), PAGE: f"{table(rows)}\n{judged(found)}"})


if __name__ == "__main__":
    sys.exit(main())
