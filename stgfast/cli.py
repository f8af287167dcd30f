"""The command line: arguments and printing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from stgfast import extras
from stgfast.bench import command as bench
from stgfast.evaluate import command as evaluate
from stgfast.render import command as render
from stgfast.tune import command as tune
from stgfast.verify import command as verify
from stgfast.version import __version__

NEEDS = {
    "demo": "toy",
    "render": "render",
    "sweep": "render",
    "evaluate": "render",
    "tune": "render",
    "verify": "render",
}  # extras, by command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="stgfast", description="Spatiotemporal Skip Guidance for diffusers pipelines")
    parser.add_argument("--version", action="version", version=f"stgfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="render clips with CFG and with CFG + STG on the model in the package")
    demo.add_argument("--out", type=Path, default=Path("stgfast-demo"), metavar="DIR", help="where clips are put")
    demo.add_argument("--prompt", action="append", help="in place of those of the demo; may be given several times")
    demo.add_argument("--seed", type=int, default=0)
    commands.add_parser("doctor", help="what is installed, what of it runs here, and what is chosen")
    render.add_render(commands.add_parser("render", help="render a file of jobs into a folder"))
    render.add_sweep(commands.add_parser("sweep", help="render one prompt at several layers and scales"))
    evaluate.add_evaluate(commands.add_parser("evaluate", help="measure the clips of a folder"))
    tune.add_tune(commands.add_parser("tune", help="find the cheapest recipe for a model: solver, steps, reuse"))
    verify.add_verify(commands.add_parser("verify", help="compare accelerated guidance with the plain method"))
    bench.add_bench(commands.add_parser("bench", help="what guidance costs, beside what would otherwise be run"))
    arguments = parser.parse_args(argv)
    try:
        if arguments.command in NEEDS:
            extras.require(NEEDS[arguments.command])
    except extras.MissingError as error:
        print(f"stgfast {arguments.command}: {error}", file=sys.stderr)
        return 2
    return RUN[arguments.command](arguments)


def run_demo(arguments: argparse.Namespace) -> int:
    from stgfast import toy
    from stgfast.demo import ROUNDS, run

    demo = run(arguments.out, arguments.prompt or toy.PROMPTS, arguments.seed)
    print("A small text-to-video model: 12 blocks, trained on drawn clips of shapes that move and turn.\n")
    print(demo.plan)
    print(f"\n{len(demo.sides[0].clips)} clips      block-rows   seconds, fastest of {ROUNDS}")
    for side in demo.sides:
        print(f"{side.name:10} {side.block_rows:12} {side.seconds:9.2f}")
    print("\nCFG left, CFG + STG right; all of them in the last:")
    for path in demo.files:
        print(f"  {path}")
    return 0


def run_doctor(arguments: argparse.Namespace) -> int:
    from stgfast.doctor import report

    print(report())
    return 0


RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "bench": bench.main,
    "demo": run_demo,
    "doctor": run_doctor,
    "evaluate": evaluate.run,
    "render": render.main,
    "sweep": render.main,
    "tune": tune.run,
    "verify": verify.run,
}


if __name__ == "__main__":
    raise SystemExit(main())
