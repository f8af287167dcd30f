"""`stgfast evaluate`: its arguments and output."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from stgfast.evaluate.run import Evaluation


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a folder that stgfast render or stgfast sweep made")
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME", help="columns of the table (default: all)")
    add_outputs(parser)


def add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--page", type=Path, metavar="FILE", help="write a page with plots to this file")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write all numbers to this file, as JSON")


def run_evaluate(arguments: argparse.Namespace, stdout: TextIO | None = None, stderr: TextIO | None = None) -> int:
    from stgfast.errors import SettingsError
    from stgfast.evaluate.run import evaluate
    from stgfast.queue.state import StoreError

    stdout, stderr = stdout or sys.stdout, stderr or sys.stderr
    try:
        evaluation = evaluate(arguments.folder)
        table = evaluation.table(arguments.columns)
    except (SettingsError, StoreError) as error:
        stderr.write(f"stgfast evaluate: {error}\n")
        return 2
    write_outputs(evaluation, arguments)
    stdout.write(table)
    if evaluation.left_out:
        stdout.write(f"\n{evaluation.left_out} jobs have no clip, and are left out.\n")
    return 0


def write_outputs(evaluation: Evaluation, arguments: argparse.Namespace) -> None:
    if arguments.page:
        arguments.page.write_text(evaluation.page(), encoding="utf-8")
    if arguments.save:
        arguments.save.write_text(json.dumps(evaluation.to_dict(), indent=1) + "\n", encoding="utf-8")
