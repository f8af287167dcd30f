"""The command line: the commands, and the modules that implement them."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import select
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from stgfast import extras
from stgfast.version import __version__


@dataclass(frozen=True)
class Command:
    """One command. Its module has `add_<name>(parser)` and `run_<name>(arguments)`, and is imported when the command
    is called.

    Attributes:
        extra: the extra that it needs.
    """

    help: str
    module: str
    extra: str = ""


UNREAD = 141  # the exit code of any command whose output nobody reads to its end
COMMANDS = {
    "demo": Command(
        "render clips of the model in the package by CFG, CFG + STG and a recipe, and compare them",
        "demo_command",
        "toy",
    ),
    "doctor": Command("show what is installed, what runs here, and which attention is chosen", "doctor"),
    "render": Command("render a file of jobs into a folder", "render.command", "render"),
    "sweep": Command("render one prompt at several layers and scales", "render.command", "render"),
    "status": Command("show what runs in a folder, what waits, and when it will be done", "queue.command"),
    "pack": Command("put a job file, its images and its LoRAs into one archive", "queue.command"),
    "add": Command("add jobs to a folder, for the current run or the next one", "queue.command"),
    "cancel": Command("cancel unfinished jobs of a folder", "queue.command"),
    "pause": Command("pause a folder, or some of its jobs", "queue.command"),
    "resume": Command("resume a paused folder, or some of its jobs", "queue.command"),
    "retry": Command("retry failed or cancelled jobs of a folder", "queue.command"),
    "serve": Command("serve a live page of a folder: what runs, what waits, and buttons", "serve.command", "serve"),
    "priority": Command("change the priority of jobs of a folder", "queue.command"),
    "evaluate": Command("measure the clips of a folder", "evaluate.command", "render"),
    "tune": Command("find the cheapest recipe for a model: solver, steps, reuse", "tune.command", "render"),
    "verify": Command("compare accelerated guidance with the plain method", "verify.command", "render"),
    "bench": Command("measure what guidance costs, compared with alternatives", "bench.command"),
}


def main(argv: Sequence[str] | None = None) -> int:
    _open_standard_files()
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="stgfast", description="Spatiotemporal Skip Guidance for diffusers pipelines")
    parser.add_argument("--version", action="version", version=f"stgfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    called = given[0] if given else ""
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.help, description=command.help)
        if name == called:
            getattr(_module(command), f"add_{name}")(added)
    arguments = parser.parse_args(given)
    command = COMMANDS[arguments.command]
    try:
        if command.extra:
            extras.require(command.extra)
    except extras.MissingError as error:
        print(f"stgfast {arguments.command}: {error}", file=sys.stderr)
        return 2
    try:
        code: int = getattr(_module(command), f"run_{arguments.command}")(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        if _is_read(sys.stdout.fileno()):
            raise
        _discard_output()
        return UNREAD
    except OSError as error:
        if not _output_fails():
            raise
        _discard_output()
        print(f"stgfast {arguments.command}: standard output: {error.strerror}", file=sys.stderr)
        return 1
    return code


def _output_fails() -> bool:
    """Whether standard output takes nothing more, for example on a full disk."""
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except io.UnsupportedOperation:  # it is no file
        return False
    except OSError:
        return True
    return False


def _discard_output() -> None:
    """Discard what is left, which Python writes when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_read(handle: int) -> bool:
    """Whether a pipe has a reader, which is not so after `| head`."""
    poll = select.poll()
    poll.register(handle, 0)
    return not any(state & select.POLLERR for _, state in poll.poll(0))


def _open_standard_files() -> None:
    """Open standard files that a shell has closed: the next opened file would take their place, and receive output."""
    for handle in (0, 1, 2):
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number
    for name in ("stdout", "stderr"):  # None where Python started without the file
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _module(command: Command) -> object:
    return importlib.import_module(f"stgfast.{command.module}")


if __name__ == "__main__":
    raise SystemExit(main())
