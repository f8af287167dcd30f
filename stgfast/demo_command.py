"""`stgfast demo`: its arguments and output."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stgfast.errors import wrong


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("stgfast-demo"), metavar="DIR", help="folder for the clips")
    parser.add_argument("--prompt", action="append", help="use this prompt; may be given several times")
    parser.add_argument("--prompts", type=int, default=16, metavar="N", help="draw N prompts at random (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and noise (default: 0)")


def run_demo(arguments: argparse.Namespace) -> int:
    from stgfast.demo import prompts_of, run

    if arguments.prompts < 1:
        sys.stderr.write(f"stgfast demo: {wrong('prompts', arguments.prompts, 'a number, 1 or more')}\n")
        return 2
    prompts = arguments.prompt or prompts_of(arguments.seed, arguments.prompts)
    demo = run(arguments.out, prompts, arguments.seed)
    write = sys.stdout.write
    write("A small text-to-video model: 12 blocks, trained on drawn clips of shapes that move and turn.\n\n")
    write(f"{demo.plan}\n\nrecipe: {demo.recipe}\n")
    write(f"\n{len(prompts)} clips     block-rows   seconds   right, by the judge\n")
    for side in demo.sides:
        write(f"{side.name:10} {side.block_rows:10} {side.seconds:9.1f}   {side.right} of {len(prompts)}\n")
    plain, *_, recipe = demo.sides
    write(f"\nThe recipe takes {recipe.seconds / plain.seconds:.2f} times as long as CFG.\n")
    write("\nClips by all three, side by side; the last file shows all of it in one picture:\n")
    for path in demo.files:
        write(f"  {path}\n")
    return 0
