"""The table of CPU measurements in bench/README.md, made from the rows in bench/results/.

python bench/measured.py           the table
python bench/measured.py --check   does the README have these values?
python bench/measured.py --write   write it there
"""

from __future__ import annotations

import sys
from pathlib import Path

import readme

from stgfast.bench.report import rows_in, table

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "README.md"
SIZE = "small"
NAMES = {
    "mochi": "Mochi",
    "ltx-2b": "LTX 2B",
    "ltx-13b": "LTX 13B",
    "ltx-2": "LTX-2",
    "cogvideox-2b": "CogVideoX 2B",
    "cogvideox-5b": "CogVideoX 5B",
    "hunyuan-video": "HunyuanVideo",
    "wan-1.3b": "Wan 1.3B",
    "wan-14b": "Wan 14B",
    "svd": "SVD",
}


def main() -> int:
    return readme.main("measured.py", __doc__, {PAGE: table(rows_in(RESULTS), SIZE, NAMES)})


if __name__ == "__main__":
    sys.exit(main())
