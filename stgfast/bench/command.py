"""`stgfast bench`: its arguments, what it shows, and what it tells the shell.

Exit codes: 0 all is measured, and where it was to be checked as predicted; 1 variants disagree, of which nothing is
timed, or a time is not as predicted; 2 the arguments are wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, TextIO

from stgfast.bench.models import MODELS, SIZES, SMALL, TINY
from stgfast.bench.variants import VARIANTS

DONE, WRONG_RESULT, WRONG = 0, 1, 2
USUAL = ("stock", "paper", "stgfast", "reuse")


def add_bench(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="do all variants agree, and are times as predicted? (tiny)")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="MODEL")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--size", choices=SIZES, help=f"{SMALL}, or {TINY} with --check, where left out")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backend", default="inductor", help="of torch.compile; with --check nothing is compiled")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=2, help="denoising steps of a clip")
    length.add_argument("--whole", action="store_true", help="as many as the pipeline makes by itself")
    parser.add_argument("--rounds", type=int, help="in which all variants take turns; 5 where left out")
    parser.add_argument("--save", type=Path, metavar="FILE", help="add the results to it, as lines of JSON")


def main(arguments: argparse.Namespace, stdout: TextIO | None = None, stderr: TextIO | None = None) -> int:
    import torch

    from stgfast.bench.measure import Disagreement, saved

    out, said = stdout or sys.stdout, stderr or sys.stderr
    if arguments.device == "cuda" and not torch.cuda.is_available():
        said.write("stgfast bench: --device: got cuda, expected a GPU that torch can use, or cpu\n")
        return WRONG
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    _quiet()
    code = DONE
    try:
        for row, right in _rows(arguments):
            out.write(saved(row, arguments.save) + "\n")
            out.flush()
            said.write(_summary(row, right) + "\n")
            code = code if right else WRONG_RESULT
    except Disagreement as error:
        said.write(f"stgfast bench: {error}\n")
        return WRONG_RESULT
    return code


def _rows(arguments: argparse.Namespace) -> Any:
    """Results one after another, each with whether it is as predicted, where that is asked."""
    from stgfast.bench.steps import WITHIN, measured, off_prediction

    steps = None if arguments.whole else arguments.steps
    given: dict[str, Any] = {"device": arguments.device, "steps": steps}
    for name in arguments.models:
        if arguments.check:
            row = measured(
                name,
                size=arguments.size or TINY,
                rounds=arguments.rounds or 9,
                variants=arguments.variants or VARIANTS,
                timed=("paper",),
                backend="eager",  # whose results are those of any other, and which compiles nothing
                **given,
            )
            yield row, abs(off_prediction(row)) <= WITHIN
        else:
            variants, rounds = arguments.variants or USUAL, arguments.rounds or 5
            given |= {"size": arguments.size or SMALL, "backend": arguments.backend}
            yield measured(name, rounds=rounds, variants=variants, **given), True


def _summary(row: dict[str, Any], right: bool) -> str:
    """What a person looks for."""
    times = ", ".join(f"{name} {value:.3f}" for name, value in row["over"].items() if name != "stgfast")
    text = f"{row['model']:14} stgfast {row['seconds']['stgfast']:.4g} s; over it: {times}"
    if "paper" in row["over"]:
        text += f" (predicted for paper: {row['predicted']['paper']:.3f}{'' if right else ', not within 5%'})"
    return text


def _quiet() -> None:
    """Of what does not matter to a measurement."""
    import warnings

    from diffusers.utils import logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "In CPU autocast")
    warnings.filterwarnings("ignore", "CPU Autocast only supports")
