"""The command line: arguments and printing."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

from stgfast.bench import command as bench
from stgfast.render import command
from stgfast.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="stgfast", description="Spatiotemporal Skip Guidance for diffusers pipelines")
    parser.add_argument("--version", action="version", version=f"stgfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="render a clip with CFG and with CFG + STG on a tiny random model")
    demo.add_argument("--seed", type=int, default=0)
    commands.add_parser("doctor", help="what is installed, what of it runs here, and what is chosen")
    command.add_render(commands.add_parser("render", help="render a file of jobs into a folder"))
    command.add_sweep(commands.add_parser("sweep", help="render one prompt at several layers and scales"))
    bench.add_bench(commands.add_parser("bench", help="what guidance costs, beside what would otherwise be run"))
    arguments = parser.parse_args(argv)
    if arguments.command == "demo":
        return run_demo(arguments.seed)
    if arguments.command == "bench":
        return bench.main(arguments)
    return run_doctor() if arguments.command == "doctor" else command.main(arguments)


def run_demo(seed: int) -> int:
    from stgfast.toy.demo import run

    warnings.filterwarnings("ignore", "In CPU autocast")  # diffusers' Mochi says so on every CPU
    demo = run(seed)
    print("A Mochi of 48 blocks, narrow, with random weights: it renders noise, and computes what the real one does.\n")
    print(demo.plan)
    print(f"\n{'':10} {'block-rows':>12} {'seconds':>9}   clip (frames, channels, height, width)")
    for clip in demo.clips:
        print(f"{clip.name:10} {clip.block_rows:12} {clip.seconds:9.2f}   {clip.shape[1:]}")
    print(f"\nThe two clips differ by {demo.change:.2g} (root mean square, pixels from 0 to 1).")
    return 0


def run_doctor() -> int:
    from stgfast.doctor import report

    print(report())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
