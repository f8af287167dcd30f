"""The cost of the blur of queries, compared with the attention after it: whether fusing the two would be worth it.

Both run in turns in one process, on one row. The blur is checked against its specification first. Use
`--device cuda` on a GPU.

    python bench/blur.py [--device cuda] [--save FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from stgfast.bench.measure import in_turns, medians, result, saved
from stgfast.kernels import blur, reference

# frames, height and width in tokens; heads and size of a head
CASES = {
    "cpu": [((4, 16, 16), 12, 64), ((6, 20, 26), 12, 64), ((8, 30, 32), 12, 64)],
    "cuda": [((11, 30, 53), 24, 128), ((28, 30, 53), 24, 128)],
}
SIGMA = 4.0


def compare(grid: tuple[int, int, int], heads: int, size: int, device: str, rounds: int) -> dict[str, Any]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    frames, height, width = grid
    tokens = frames * height * width
    x = torch.randn(1, tokens, heads * size, device=device, dtype=dtype)
    q = x.unflatten(2, (heads, size)).transpose(1, 2)
    right = reference.blur(x.float(), grid, SIGMA)
    error = float((blur(x, grid, SIGMA).float() - right).abs().max() / right.abs().max())
    if not error <= 4 * torch.finfo(dtype).eps:
        raise SystemExit(f"the blur of {grid} disagrees with its specification by {error:.2g}; nothing timed")
    calls = {
        "blur": lambda: blur(x, grid, SIGMA),
        "specification": lambda: reference.blur(x, grid, SIGMA),
        "attention": lambda: F.scaled_dot_product_attention(q, q, q),
    }
    in_turns(calls, 1, device)
    seconds = medians(in_turns(calls, rounds, device))
    figures = {
        "rounds": rounds,
        "grid": grid,
        "heads": heads,
        "size of a head": size,
        "blur / attention": round(seconds["blur"] / seconds["attention"], 4),
        "specification / blur": round(seconds["specification"] / seconds["blur"], 2),
    }
    return result("blur", device, **figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(CASES), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", type=Path, help="a file to add the results to, one line of JSON each")
    options = parser.parse_args()
    for grid, heads, size in CASES[options.device]:
        print(saved(compare(grid, heads, size, options.device, options.rounds), options.save))
    return 0


if __name__ == "__main__":
    sys.exit(main())
