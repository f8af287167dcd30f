"""`stgfast demo`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("stgfast-demo"), metavar="DIR", help="where clips are put")
    parser.add_argument("--prompt", action="append", help="in place of those of the demo; may be given several times")
    parser.add_argument("--seed", type=int, default=0)


def run_demo(arguments: argparse.Namespace) -> int:
    from stgfast import toy
    from stgfast.demo import ROUNDS, run

    demo = run(arguments.out, arguments.prompt or toy.PROMPTS, arguments.seed)
    said = sys.stdout.write
    said("A small text-to-video model: 12 blocks, trained on drawn clips of shapes that move and turn.\n\n")
    said(f"{demo.plan}\n")
    said(f"\n{len(demo.sides[0].clips)} clips      block-rows   seconds, fastest of {ROUNDS}\n")
    for side in demo.sides:
        said(f"{side.name:10} {side.block_rows:12} {side.seconds:9.2f}\n")
    said("\nCFG left, CFG + STG right; all of them in the last:\n")
    for path in demo.files:
        said(f"  {path}\n")
    return 0
