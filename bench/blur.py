"""What does the blur of queries cost, beside the attention that it precedes? Says whether fusing the two could pay.

Both in one process, in turns, on one row; the blur first agrees with its specification. `--device cuda` on a GPU.

    python bench/blur.py [--device cuda] [--save FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import stgfast
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
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:  # the first warms up
                taken[name].append(time.perf_counter() - begin)
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    return {
        "bench": "blur",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "stgfast": stgfast.__version__,
        "grid": grid,
        "heads": heads,
        "size of a head": size,
        "blur / attention": round(seconds["blur"] / seconds["attention"], 4),
        "specification / blur": round(seconds["specification"] / seconds["blur"], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(CASES), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", type=Path, help="a file to add the results to, one line of JSON each")
    options = parser.parse_args()
    for grid, heads, size in CASES[options.device]:
        row = json.dumps(compare(grid, heads, size, options.device, options.rounds))
        print(row)
        if options.save:
            with options.save.open("a") as file:
                file.write(row + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
