"""`stgfast bench`: its arguments, output and exit codes.

Exit codes: 0 everything is measured and, with --check, as predicted; 1 variants disagree and nothing was timed, or a
time is not as predicted; 2 the arguments are wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, TextIO

from stgfast.bench.models import MODELS, SIZES, SMALL, TINY
from stgfast.bench.variants import VARIANTS

DONE, WRONG_RESULT, WRONG = 0, 1, 2
# A check compiles nothing, and a CPU has few attention backends.
CHECKED = {
    device: [name for name in VARIANTS if name not in left_out]
    for device, left_out in (("cuda", ("graphs",)), ("cpu", ("graphs", "fastest", "auto")))
}
USUAL = ("stock", "paper", "stgfast", "reuse")
# Models whose blocks keep the shape of what they are given; those of a UNet do not.
DEEP = [name for name, model in MODELS.items() if model.part == "transformer"]
CHECKED_STEPS, CHECKED_ROUNDS = 6, 3
GROWN = "wan-1.3b"  # its pipeline takes clips of any length


def add_bench(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--check", action="store_true", help="check that variants agree and that times are as predicted within 5%%"
    )
    what.add_argument(
        "--growth", action="store_true", help="measure how the cost grows with tokens, prompts, branches and layer"
    )
    what.add_argument("--overhead", action="store_true", help="measure the cost of our own Python code")
    what.add_argument(
        "--ranks",
        action="store_true",
        help="a step by how many processes its branches are divided over: torchrun --nproc-per-node N -m stgfast.cli "
        "bench --ranks",
    )
    what.add_argument("--report", type=Path, metavar="DIR", help="make a page from the results in this folder")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="file for the page of --report")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--size", choices=SIZES, help=f"{SMALL}, or {TINY} with --check, where left out")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backend", default="inductor", help="mode of torch.compile; with --check nothing is compiled")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="DIR",
        help="path to a checkout of the authors' code, which is run, for Mochi and LTX-Video",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="steps of a clip (default: 3); all but the first are timed")
    length.add_argument("--whole", action="store_true", help="use the pipeline's own number of steps")
    parser.add_argument("--rounds", type=int, help="rounds in which all variants take turns (default: 5)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="append the results to this file, as lines of JSON")


def run_bench(arguments: argparse.Namespace, stdout: TextIO | None = None, stderr: TextIO | None = None) -> int:
    if arguments.report:
        return _report(arguments.report, arguments.out, stderr or sys.stderr)
    import torch

    from stgfast.bench.measure import Disagreement, keep_memory, saved
    from stgfast.bench.ranks import begin
    from stgfast.errors import SettingsError

    out, log = stdout or sys.stdout, stderr or sys.stderr
    if arguments.device == "cuda" and not torch.cuda.is_available():
        log.write("stgfast bench: --device: got cuda, expected a GPU that torch can use, or cpu\n")
        return WRONG
    if arguments.device == "cpu":
        torch.set_num_threads(1)
        keep_memory()
    torch.backends.cudnn.allow_tf32 = False  # with TF32, convolutions would depend on the batch
    _quiet()
    code = DONE
    try:
        first = begin(arguments.device) if arguments.ranks else True
        for row, right in _rows(arguments):
            if not first:
                continue
            out.write(saved(row, arguments.save) + "\n")
            out.flush()
            log.write(SUMMARIES[row["bench"]](row) + ("" if right else ", not within 5%") + "\n")
            code = code if right else WRONG_RESULT
    except (Disagreement, SettingsError) as error:
        log.write(f"stgfast bench: {error}\n")
        return WRONG_RESULT if isinstance(error, Disagreement) else WRONG
    return code


def _report(folder: Path, page: Path, log: TextIO) -> int:
    from stgfast.bench import report
    from stgfast.errors import SettingsError

    try:
        rows = report.rows_in(folder)
    except SettingsError as error:
        log.write(f"stgfast bench: {error}\n")
        return WRONG
    page.write_text(report.page(rows), encoding="utf-8")
    log.write(f"{page}: {len(rows)} results\n")
    return DONE


def _rows(arguments: argparse.Namespace) -> Any:
    """The results one by one, each with whether it is as predicted, if that is checked."""
    from stgfast.bench.growth import grown
    from stgfast.bench.overhead import overhead
    from stgfast.bench.ranks import over_ranks
    from stgfast.bench.steps import checked, measured

    steps = arguments.steps or (CHECKED_STEPS if arguments.check else 3)
    rounds = arguments.rounds or (CHECKED_ROUNDS if arguments.check else 7 if arguments.overhead else 5)
    given: dict[str, Any] = {"device": arguments.device, "steps": None if arguments.whole else steps}
    models = arguments.models or (
        DEEP if arguments.overhead or arguments.ranks else [GROWN] if arguments.growth else MODELS
    )
    for name in models:
        if arguments.ranks:
            yield over_ranks(name, size=arguments.size or TINY, rounds=rounds, **given), True
        elif arguments.overhead:
            yield overhead(name, size=arguments.size or SMALL, device=arguments.device, rounds=rounds), True
        elif arguments.growth:
            rows = grown(name, size=arguments.size or TINY, rounds=rounds, **given)
            yield from ((row, True) for row in rows)
        elif arguments.check:
            variants = arguments.variants or CHECKED[arguments.device]
            row = checked(name, size=arguments.size or TINY, rounds=rounds, variants=variants, **given)
            yield row, row["right"]
        else:
            variants = arguments.variants or (*USUAL, "reference")
            given |= {"size": arguments.size or SMALL, "backend": arguments.backend, "reference": arguments.reference}
            yield measured(name, rounds=rounds, variants=variants, **given), True


def _of_steps(row: dict[str, Any]) -> str:
    """A result in words."""
    times = ", ".join(f"{name} {value:.3f}" for name, value in row["over"].items() if name != "stgfast")
    predicted = f"; predicted for paper {row['predicted']['paper']:.3f}" if "paper" in row["over"] else ""
    return f"{row['model']:14} stgfast {row['seconds']['stgfast']:.4g} s; over it: {times}{predicted}"


def _of_growth(row: dict[str, Any]) -> str:
    fit = row["fit"]["seconds"]
    curve = " + ".join(f"{c:.3g}" + " n" * (n > 0) + f"^{n}" * (n > 1) for n, c in enumerate(fit["coefficients"]))
    return f"{row['model']:14} seconds by {row['axis']}: {curve}; R2 {fit['r2']:.4f}"


def _of_overhead(row: dict[str, Any]) -> str:
    taken = ", ".join(f"{value:g} {of}" for of, value in row["microseconds"].items())
    return f"{row['model']:14} microseconds: {taken}; {row['share_of_a_step']:.2%} of a step"


def _of_check(row: dict[str, Any]) -> str:
    paper, predicted = row["over"]["paper"], row["predicted"]["paper"]
    of = f"{len(row['distance'])} variants agree; the paper's scheme over stgfast"
    return f"{row['model']:14} {of} {paper:.3f}, predicted {predicted:.3f}"


def _of_ranks(row: dict[str, Any]) -> str:
    counts = [
        f"{count} ranks {over:.3f} of that, predicted {row['predicted'][count]:.3f}, receiving "
        f"{max(row['received'][count]):,} bytes a step at most"
        for count, over in row["over_one"].items()
        if count > 1
    ]
    return f"{row['model']:14} {row['seconds'][1]:.4g} s on one rank; {'; '.join(counts)}"


SUMMARIES = {
    **{"steps": _of_steps, "check": _of_check, "growth": _of_growth, "overhead": _of_overhead},
    "ranks": _of_ranks,
}


def _quiet() -> None:
    """Silence messages that do not matter for a measurement."""
    import warnings

    from diffusers.utils import logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "In CPU autocast")
    warnings.filterwarnings("ignore", "CPU Autocast only supports")
