"""Generated tables in READMEs: each is between two marks, the first of which names its script."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
END = "<!-- up to here -->\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def main(script: str, about: str, made: Mapping[Path, str]) -> int:
    """Print, check or write tables, depending on the arguments."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    begin, code = f"<!-- made by bench/{script} -->\n", 0
    for file, table in made.items():
        if not asked.check and not asked.write:
            print(table, end="")
            continue
        before, _, rest = file.read_text(encoding="utf-8").partition(begin)
        there, _, after = rest.partition(END)
        if asked.write:
            file.write_text(f"{before}{begin}{table}{END}{after}", encoding="utf-8")
        elif there != table:
            print(f"a table in {file.name} is not what it is made of: python bench/{script} --write")
            code = 1
    return code
