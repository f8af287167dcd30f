"""Error against cost on the model in the package, as the README beside this has it: made of bench/results/front.jsonl.

python bench/fronts.py           the table
python bench/fronts.py --check   is it what that README has?
python bench/fronts.py --write   put it there
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import readme

RESULTS = Path(__file__).parent / "results" / "front.jsonl"
PAGE = Path(__file__).parent / "README.md"


def table() -> str:
    """By cost, and with what no other way is both cheaper and closer than in bold."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: (row["cost"], row["distance"]))
    lines = ["| way | cost | distance | 95% |", "| --- | --- | --- | --- |"]
    closest = float("inf")
    for row in rows:
        way = f"**{row['way']}**" if row["distance"] < closest else row["way"]
        closest = min(closest, row["distance"])
        lines.append(f"| {way} | {row['cost']:.2f} | {row['distance']:.4f} | {row['distance, 95%']:.4f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    return readme.main("fronts.py", __doc__, {PAGE: table()})


if __name__ == "__main__":
    sys.exit(main())
