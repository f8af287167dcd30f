"""Build the reference of stgfast's public names from their docstrings: python docs/reference.py FOLDER"""

import sys
from pathlib import Path

import pdoc

import stgfast


def main() -> None:
    for name in stgfast.__all__:
        getattr(stgfast, name)  # names are imported on first use, and pdoc takes one that is not there for a module
    pdoc.render.configure(docformat="google", show_source=False, include_undocumented=False)
    pdoc.pdoc("stgfast", "!stgfast.", output_directory=Path(sys.argv[1]))


if __name__ == "__main__":
    main()
