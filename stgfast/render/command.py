"""`stgfast render` and `stgfast sweep`: their arguments, what they show while they run, and what they tell the shell.

Exit codes: 0 every job is done; 1 some failed, were left out as wrong, or still wait; 2 the arguments, the jobs or the
model are wrong, and nothing was rendered; 3 the output folder or the disk gave out; 4 the device did; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

DONE, SOME, WRONG, DISK, DEVICE, INTERRUPTED = 0, 1, 2, 3, 4, 130


def add_render(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", nargs="?", type=Path, help="a .jsonl, .csv, .yaml or .txt file, one job in each entry")
    parser.add_argument("--from", dest="source", type=Path, metavar="CLIP", help="repeat a clip that stgfast rendered")
    _add_common(parser)


def add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts",
        nargs="+",
        metavar="PROMPT",
        help="what to render with CFG alone, and at every one of the layers and scales; or a .txt file of such prompts",
    )
    parser.add_argument("--layers", nargs="+", required=True, metavar="N[,N]", help="to perturb one after another")
    parser.add_argument("--scales", nargs="+", required=True, type=float, metavar="W")
    parser.add_argument("--kind", default="residual", help="residual, attention, ...")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument(
        "--cfg", nargs="+", type=float, default=[], metavar="S", help="CFG scales; else the model's own"
    )
    _add_common(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, how it is had, and what all clips have."""
    parser.add_argument(
        "--model", required=True, metavar="NAME_OR_PATH", help="a model's folder, or its name on the hub"
    )
    parser.add_argument(
        "--set",
        dest="defaults",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="what every job has that does not say otherwise, such as steps=30",
    )
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--offload",
        choices=("text", "model", "group"),
        help="what is on the device only while it computes, for memory: the text encoders, every model, every layer",
    )
    parser.add_argument("--trust", metavar="NAME", help="the model's name again, for one that brings code of its own")


def _add_common(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder for clips and their state")
    parser.add_argument("--format", choices=("mp4", "gif", "png", "npz"), default="mp4")
    parser.add_argument("--fps", type=float, help="frames in a second; the model's own where left out")
    parser.add_argument("--crf", type=int, default=18, help="quality of MP4, from 0 (without loss) to 51")
    parser.add_argument("--max-batch", type=int, default=8, help="clips that are rendered at once at most")
    parser.add_argument("--skip-bad", action="store_true", help="go on without jobs that are wrong")
    parser.add_argument("--retry-failed", action="store_true", help="try jobs again that failed in an earlier run")
    parser.add_argument("--plan", action="store_true", help="check and list the jobs, and render nothing")
    parser.add_argument(
        "--vae-tiling", action="store_true", help="decode in tiles, for memory: not quite the same pixels"
    )
    faster = parser.add_mutually_exclusive_group()
    faster.add_argument("--compile", action="store_true", help="compile the model's blocks")
    faster.add_argument(
        "--attention", choices=["auto"], help="auto: every layer attends by what is fastest for its shape"
    )
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="make all clips by what stgfast tune found: an approximation"
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="render on the GPUs of a Ray cluster: local (this machine), auto, or host:port"
    )
    parser.add_argument("--actors", type=int, metavar="N", help="how many of its devices; all GPUs, or one CPU")
    parser.add_argument(
        "--gpus-per-clip",
        type=int,
        metavar="N",
        help="divide every clip over so many GPUs, with --ray; or start this with torchrun --nproc-per-node N",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--quiet", action="store_true", help="say only what went wrong")
    output.add_argument("--json", action="store_true", help="say everything as lines of JSON")


def run(arguments: argparse.Namespace, stdout: TextIO | None = None, stderr: TextIO | None = None) -> int:
    """The command, from its arguments to its exit code."""
    from stgfast.errors import DeviceError, LoadError, SettingsError, UnsupportedPipelineError
    from stgfast.render.run import BadJobs, render
    from stgfast.render.store import StoreError
    from stgfast.render.together import follows

    screen = Screen(stdout or sys.stdout, stderr or sys.stderr, quiet=arguments.quiet, as_json=arguments.json)
    try:
        report = render(
            arguments.model,
            jobs_of(arguments),
            arguments.out,
            format=arguments.format,
            fps=arguments.fps,
            crf=arguments.crf,
            defaults=defaults_of(arguments.defaults),
            max_batch=arguments.max_batch,
            skip_bad=arguments.skip_bad,
            retry_failed=arguments.retry_failed,
            dtype=arguments.dtype,
            device=arguments.device,
            offload=arguments.offload,
            vae_tiling=arguments.vae_tiling,
            compile=arguments.compile,
            attention=arguments.attention,
            recipe=arguments.recipe,
            trust=arguments.trust,
            ray=arguments.ray,
            actors=arguments.actors,
            gpus_per_clip=arguments.gpus_per_clip,
            listener=screen.show,
            plan_only=arguments.plan,
        )
        if arguments.plan:
            screen.listing(arguments.out)
            return SOME if report.bad else DONE
        return report.code
    except BadJobs as error:
        screen.error(
            f"{error.count} bad line{'s' * (error.count > 1)}; nothing was rendered (--skip-bad goes on without)"
        )
        return WRONG
    except (SettingsError, UnsupportedPipelineError, StoreError, DeviceError) as error:
        if not follows() or isinstance(error, (LoadError, DeviceError)):
            screen.error(str(error))
        return DISK if isinstance(error, StoreError) else DEVICE if isinstance(error, DeviceError) else WRONG
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        screen.close()


def jobs_of(arguments: argparse.Namespace) -> Path | list[dict[str, Any]]:
    """The file of jobs, or the jobs that the arguments say."""
    from stgfast.errors import SettingsError, wrong
    from stgfast.render.sweep import sweep

    if "prompts" in arguments:
        try:
            layers = [[int(number) for number in one.split(",")] for one in arguments.layers]
        except ValueError:
            raise wrong("--layers", arguments.layers, "numbers, such as 10 20 30, or 10,11 20,21") from None
        more = {"pipeline": defaults_of(arguments.defaults).get("pipeline", {})} if arguments.cfg else {}
        jobs = sweep(
            prompts_of(arguments.prompts),
            layers,
            arguments.scales,
            kind=arguments.kind,
            seeds=arguments.seeds,
            cfg=arguments.cfg,
            **more,
        )
        return [job.to_dict() for job in jobs]
    if (arguments.jobs is None) == (arguments.source is None):
        raise SettingsError("jobs: expected a job file, or --from with a clip, and not both")
    given: Path = arguments.jobs
    return given if arguments.source is None else [repeated(arguments.source)]


def prompts_of(given: list[str]) -> list[str]:
    """Prompts as they are given, or those of a file."""
    from stgfast.errors import SettingsError
    from stgfast.render.jobs import Bad, read

    if len(given) > 1 or not given[0].lower().endswith(".txt"):
        return given
    found = []
    for line in read(Path(given[0])):
        if isinstance(line, Bad):
            raise SettingsError(f"line {line.number}: {line.why}")
        found += [job.prompt for job in line.jobs]
    if not found:
        raise SettingsError(f"prompts: got {given[0]!r} with none, expected one in each line")
    return found


def repeated(clip: Path) -> dict[str, Any]:
    """The job that a clip says it came from."""
    from stgfast.errors import wrong
    from stgfast.render.files import metadata_of

    job = metadata_of(clip).get("job")
    if not isinstance(job, dict):
        raise wrong("clip", str(clip), "a clip that says what it was rendered from")
    return job


def defaults_of(given: Iterable[str]) -> dict[str, Any]:
    """`FIELD=VALUE`, where a value that is no JSON is text."""
    from stgfast.errors import wrong
    from stgfast.render.jobs import parse_json

    defaults: dict[str, Any] = {}
    for one in given:
        name, equals, text = one.partition("=")
        if not equals:
            raise wrong("--set", one, "FIELD=VALUE, such as steps=30")
        try:
            defaults[name] = parse_json(text)
        except ValueError:
            defaults[name] = text
    return defaults


class Screen:
    """What a person, or a machine, sees of a run."""

    def __init__(self, stdout: TextIO, stderr: TextIO, *, quiet: bool, as_json: bool):
        self.stdout, self.stderr, self.quiet, self.as_json = stdout, stderr, quiet, as_json
        self.bar: Any = None

    def show(self, event: dict[str, Any]) -> None:
        if self.as_json:
            self._line(self.stdout, json.dumps({"time": round(time.time(), 3), **event}))
            return
        said = TOLD.get(event["event"])
        if event["event"] in ("done", "failed"):
            self._progress(event)
        if said is not None and (not self.quiet or event["event"] in ("bad", "failed")):
            self._line(self.stderr, said.format_map(event))

    def error(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            if self.as_json:
                self._line(self.stdout, json.dumps({"time": round(time.time(), 3), "event": "error", "error": text}))
            else:
                self._line(self.stderr, f"stgfast render: {text}")

    def listing(self, out: Path) -> None:
        """Every job, one line each."""
        from stgfast.render.store import Store

        with contextlib.suppress(BrokenPipeError), Store(out) as store:
            for row in store.rows(every=True):
                if self.as_json:
                    line = json.dumps({"file": row.file, "status": row.status, "job": row.job.to_dict()})
                else:
                    line = f"{row.status:10} {row.file}"
                self._line(self.stdout, line)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _progress(self, event: dict[str, Any]) -> None:
        if self.quiet:
            return
        if self.bar is None:
            from tqdm import tqdm

            before = event["finished"] - 1
            self.bar = tqdm(total=event["total"], initial=before, unit="clip", file=self.stderr, dynamic_ncols=True)
        self.bar.update(event["finished"] - self.bar.n)

    def _line(self, stream: TextIO, text: str) -> None:
        # Prompts and names come from job files: nothing in them is a command to the terminal.
        text = "".join(c if c.isprintable() else "\ufffd" for c in text)
        if self.bar is not None and not self.as_json:
            self.bar.clear()
        try:
            stream.write(text + "\n")
            stream.flush()
        except BrokenPipeError:
            # Nobody reads it any more. What is written after this, or at the end of the process, goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            raise


TOLD = {
    "bad": "line {line}: {error}",
    "recovered": "{jobs} clips were in hand when an earlier run died; they are rendered again",
    "planned": "{pending} clips to render, {done} done, {failed} failed earlier",
    "loading": "loading {model}",
    "asking": "loading {model} on {actors} {each} of Ray",
    "joined": "actor {actor}: ready on {node}, {device}",
    "died": "{files}: again, as who rendered them died: {why}",
    "lost": "actor {actor} does not come back: {why}",
    "failed": "{file}: {error}",
    "again": "{files}: again, smaller or apart: {why}",
    "page": "the page about the folder could not be written: {error}",
    "stopping": "{why}: finishing what is in hand",
    "ended": "{rendered} rendered in {seconds:.1f} s; {done} done, {failed} failed, {waiting} waiting, {bad} bad lines",
}


def main(arguments: argparse.Namespace) -> int:
    """As `run`, in a process of its own: what still computes after a second interruption ends with it."""
    if arguments.quiet or arguments.json:
        _without_bars()
    code = run(arguments)
    if code == INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _without_bars() -> None:
    """Of the libraries that load a model."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
