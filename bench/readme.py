"""Tables of the README that are made: each stands between two marks, the first of which says what makes it."""

from __future__ import annotations

import argparse
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
END = "<!-- up to here -->\n"


def main(script: str, about: str, made: str) -> int:
    """Prints a table, checks it or puts it in its place, as the arguments say."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    if not asked.check and not asked.write:
        print(made, end="")
        return 0
    text, begin = README.read_text(encoding="utf-8"), f"<!-- made by bench/{script} -->\n"
    before, _, rest = text.partition(begin)
    there, _, after = rest.partition(END)
    if asked.write:
        README.write_text(f"{before}{begin}{made}{END}{after}", encoding="utf-8")
    elif there != made:
        print(f"a table in README.md is not what it is made of: python bench/{script} --write")
        return 1
    return 0
