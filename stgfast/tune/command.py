"""`stgfast tune`: its arguments and output.

Exit codes: 0 a recipe was found; 1 none meets the limits; 2 the arguments or the model are wrong; 130 interrupted, and
the same command continues.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, TextIO

from stgfast.render.command import add_model, defaults_of, prompts_of

FOUND, NONE, WRONG, INTERRUPTED = 0, 1, 2, 130


def add_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="prompts like those to be rendered, or a .txt file of them"
    )
    add_model(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the recipe and its page")
    aim = parser.add_mutually_exclusive_group()
    aim.add_argument(
        "--distance", type=float, metavar="D", help="find the cheapest recipe within this distance of converged clips"
    )
    aim.add_argument(
        "--cost", type=float, metavar="C", help="find the nearest recipe within this fraction of the usual block-rows"
    )
    parser.add_argument("--clips", type=int, default=8, help="number of clips by which a recipe is judged")
    parser.add_argument("--minutes", type=float, help="start no further clip after this time")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first clip")
    parser.add_argument("--quiet", action="store_true", help="hide the progress bar")


def run_tune(arguments: argparse.Namespace, stdout: TextIO | None = None, stderr: TextIO | None = None) -> int:
    from stgfast.errors import DeviceError, SettingsError, UnsupportedPipelineError
    from stgfast.queue.state import StoreError
    from stgfast.tune.run import PAGE, RECIPE, tune

    stdout, stderr = stdout or sys.stdout, stderr or sys.stderr
    progress = Progress(stderr, quiet=arguments.quiet)
    try:
        tuned = tune(
            arguments.model,
            prompts_for(arguments),
            arguments.out,
            distance=arguments.distance,
            cost=arguments.cost,
            clips=arguments.clips,
            minutes=arguments.minutes,
            seed=arguments.seed,
            defaults=defaults_of(arguments.defaults),
            dtype=arguments.dtype,
            device=arguments.device,
            offload=arguments.offload,
            trust=arguments.trust,
            listener=progress.show,
        )
    except (SettingsError, UnsupportedPipelineError, StoreError, DeviceError) as error:
        progress.close()
        stderr.write(f"stgfast tune: {error}\n")
        return WRONG
    except KeyboardInterrupt:
        progress.close()
        stderr.write("interrupted; the same command continues from here\n")
        return INTERRUPTED
    progress.close()
    stdout.write(tuned.table())
    stdout.write(f"\ntarget: {tuned.aim}\n")
    if tuned.chosen is None:
        nearest = min(tuned.trials, key=lambda trial: trial.distance)
        stdout.write(
            f"no recipe meets it; the nearest is {nearest.recipe}, at {nearest.distance:.4f}. {arguments.out / PAGE}\n"
        )
        return NONE
    stdout.write(
        f"found, as an approximation: {tuned.chosen.recipe}\n{arguments.out / RECIPE}, {arguments.out / PAGE}\n"
    )
    return FOUND


def prompts_for(arguments: argparse.Namespace) -> list[str]:
    """The given prompts, or those of the model."""
    from stgfast import toy
    from stgfast.errors import SettingsError

    if arguments.prompts:
        return prompts_of(arguments.prompts)
    if arguments.model == "toy":
        return list(toy.PROMPTS)
    raise SettingsError("prompts: got none, expected some like those that are to be rendered, or a .txt file of them")


class Progress:
    """A progress bar of the clips to make. Its total falls when recipes are dropped."""

    def __init__(self, stderr: TextIO, *, quiet: bool):
        self.stderr, self.quiet = stderr, quiet
        self.bar: Any = None

    def show(self, event: dict[str, Any]) -> None:
        if self.quiet:
            return
        if event["event"] != "made":
            if self.bar is None:
                self.stderr.write(f"{event['event']}\n")
            return
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(unit="clip", file=self.stderr, dynamic_ncols=True)
        left = event["recipes"] - event["made"] + (event["of"] - event["clip"] - 1) * event["recipes"]
        self.bar.total = self.bar.n + 1 + left
        self.bar.update(1)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
