"""The effect of STG on the model in the package: tables of two READMEs, made from these files:

    python -m stgfast.evaluate.study reported --out DIR --save bench/results/toy.json
    python -m stgfast.evaluate.study best --out DIR --save bench/results/toy-best.json

python bench/studied.py           the tables
python bench/studied.py --check   do the READMEs have these values?
python bench/studied.py --write   write them there
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import readme

from stgfast import toy
from stgfast.evaluate.statistics import Estimate

RESULTS = Path(__file__).parent / "results" / "toy.json"
BEST = RESULTS.with_name("toy-best.json")
PAGE = toy.FOLDER.parent / "README.md"
# What is shown of a number: its name, by what it is multiplied, and its digits.
COLUMNS = {
    "right": ("all right, %", 100, 1),
    "shape": ("shape, %", 100, 1),
    "motion": ("motion, %", 100, 1),
    "Fréchet": ("Fréchet distance", 1, 3),
    "diversity": ("diversity", 1, 4),
    "speed": ("speed, pixels", 1, 2),
    "jerk": ("jerk, pixels", 1, 3),
    "flicker": ("flicker, 1/1000", 1000, 2),
}
SHORT = ("right", "Fréchet", "diversity", "speed", "flicker")
AT = "; guidance_scale "


def label(setting: Mapping[str, Any]) -> str:
    name, at, scale = setting["name"].partition(AT)
    if not at:
        return name
    cfg = f"CFG {float(scale):g}" if float(scale) > 1 else "no CFG"
    return cfg if name == "CFG alone" else f"{cfg}, {name}"


def cell(setting: Mapping[str, Any], name: str) -> str:
    """A number, with a sign if it differs from the same CFG alone outside of its interval."""
    _, times, digits = COLUMNS[name]
    found, than = setting["estimates"][name], setting["differences"].get(name)
    sign = Estimate(than["value"], than["half"]).sign if than and than["half"] is not None else ""
    return f"{times * found['value']:.{digits}f} ± {times * found['half']:.{digits}f}{sign}"


def table(settings: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    rows = ([label(setting), *(cell(setting, name) for name in columns)] for setting in settings)
    return readme.table(["", *(COLUMNS[name][0] for name in columns)], rows)


def main() -> int:
    reported, best = (json.loads(path.read_text(encoding="utf-8"))["settings"] for path in (RESULTS, BEST))
    made = {readme.README: table(best, SHORT), PAGE: table(reported, list(COLUMNS))}
    return readme.main("studied.py", __doc__, made)


if __name__ == "__main__":
    sys.exit(main())
