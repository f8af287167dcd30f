"""`stgfast render` and `stgfast sweep`: their arguments, output and exit codes.

Exit codes: 0 all jobs are done; 1 some failed, were skipped as invalid, or still wait; 2 the arguments, jobs or model
are wrong, and nothing was rendered; 3 the output folder or disk failed; 4 the device failed; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from stgfast.render.screen import Screen

DONE, SOME, WRONG, DISK, DEVICE, INTERRUPTED = 0, 1, 2, 3, 4, 130


def add_render(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", nargs="?", type=Path, help="a .jsonl, .csv, .yaml or .txt file, one job in each entry")
    parser.add_argument("--from", dest="source", type=Path, metavar="CLIP", help="render again the job of this clip")
    _add_common(parser, required=False)


def add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts",
        nargs="+",
        metavar="PROMPT",
        help="prompts to render with CFG alone and at each layer and scale, or a .txt file of them",
    )
    parser.add_argument(
        "--layers", nargs="+", required=True, metavar="N[,N]", help="layers to perturb, one after another"
    )
    parser.add_argument("--scales", nargs="+", required=True, type=float, metavar="W")
    parser.add_argument("--kind", default="residual", help="kind of perturbation: residual, attention, ...")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument(
        "--cfg", nargs="+", type=float, default=[], metavar="S", help="CFG scales (default: the model's own)"
    )
    _add_common(parser)


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the arguments for the model, for loading it, and for the form of clips."""
    rest = "" if required else "; left out where every job names its own"
    parser.add_argument(
        "--model", required=required, metavar="NAME_OR_PATH", help=f"a model's folder, or its name on the hub{rest}"
    )
    parser.add_argument(
        "--set",
        dest="defaults",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="default field of all jobs, such as steps=30",
    )
    parser.add_argument("--device", help="default: cuda if there is a GPU, else cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--offload",
        choices=("text", "model", "group"),
        help="save memory: keep the text encoders, each model or each layer on the device only while it computes",
    )
    parser.add_argument("--trust", metavar="NAME", help="the model's name again, to allow code in its folder")


def _add_common(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    add_model(parser, required=required)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for clips and their state")
    parser.add_argument("--format", choices=("mp4", "gif", "png", "npz"), default="mp4")
    parser.add_argument("--fps", type=float, help="frames per second (default: the model's own)")
    parser.add_argument("--crf", type=int, default=18, help="quality of MP4, from 0 (lossless) to 51")
    parser.add_argument("--max-batch", type=int, default=8, help="largest number of clips in one batch")
    parser.add_argument("--skip-bad", action="store_true", help="skip invalid jobs")
    parser.add_argument("--retry-failed", action="store_true", help="retry jobs that failed in an earlier run")
    parser.add_argument(
        "--retries", type=int, default=2, metavar="N", help="how often to retry a job whose process died (default: 2)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="time limit for a clip (default: a multiple of what clips of its shape took)",
    )
    parser.add_argument(
        "--wait", action="store_true", help="keep running when all jobs are done, for jobs of stgfast add"
    )
    parser.add_argument("--verify", action="store_true", help="decode finished clips, and render damaged ones again")
    parser.add_argument(
        "--same-process",
        action="store_true",
        help="render in this process, which is not replaced if it hangs or dies",
    )
    parser.add_argument(
        "--plan", action="store_true", help="check and list the jobs, estimate their time, and render nothing"
    )
    parser.add_argument("--like", type=Path, metavar="DIR", help="with --plan: estimate by the clips of this folder")
    parser.add_argument(
        "--on-done", metavar="COMMAND", help="shell command to run if all jobs are done; it reads the report as JSON"
    )
    parser.add_argument(
        "--on-fail", metavar="COMMAND", help="shell command to run at any other end; it reads the report as JSON"
    )
    parser.add_argument("--webhook", metavar="URL", help="URL that receives the report at the end")
    parser.add_argument(
        "--vae-tiling", action="store_true", help="decode in tiles: less memory, slightly different pixels"
    )
    faster = parser.add_mutually_exclusive_group()
    faster.add_argument("--compile", action="store_true", help="compile the model's blocks")
    faster.add_argument("--attention", choices=["auto"], help="auto: the fastest attention kernel for each shape")
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="render with this recipe of stgfast tune: an approximation"
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="render on the GPUs of a Ray cluster: local (this machine), auto, or host:port"
    )
    parser.add_argument(
        "--actors", type=int, metavar="N", help="number of actors (default: one for each GPU, or one on a CPU)"
    )
    parser.add_argument(
        "--gpus-per-clip",
        type=int,
        metavar="N",
        help="number of GPUs that share each clip, with --ray; or start with torchrun --nproc-per-node N",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--quiet", action="store_true", help="print errors only")
    output.add_argument("--json", action="store_true", help="print all events as lines of JSON")


def run_render(arguments: argparse.Namespace) -> int:
    """Like `run`, in a process of its own: computations that go on after a second interrupt end with it."""
    if arguments.quiet or arguments.json:
        from stgfast.render.loading import without_bars

        without_bars()
    code = run(arguments)
    if code == INTERRUPTED:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, AttributeError):
                stream.flush()
        os._exit(code)
    return code


run_sweep = run_render


def run(arguments: argparse.Namespace, stdout: TextIO | None = None, stderr: TextIO | None = None) -> int:
    """Run the command, from its arguments to its exit code."""
    from stgfast.errors import SettingsError
    from stgfast.render.hooks import Hooks
    from stgfast.render.screen import Screen

    screen = Screen(
        arguments.command if "command" in arguments else "render",
        stdout or sys.stdout,
        stderr or sys.stderr,
        quiet=arguments.quiet,
        as_json=arguments.json,
    )
    hooks = Hooks()
    try:
        hooks = Hooks(arguments.on_done, arguments.on_fail, arguments.webhook)
        code = _run(arguments, screen)
    except SettingsError as error:
        screen.error(str(error))
        code = WRONG
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        screen.close()
    if os.environ.get("RANK", "0") == "0":  # only the first of torchrun's processes reports
        screen.ended(code)
        if not arguments.plan:
            event = {"out": str(arguments.out), "model": arguments.model, **screen.report}
            hooks.run(code, event, screen.complain)
    return code


def _run(arguments: argparse.Namespace, screen: Screen) -> int:
    from stgfast.errors import DeviceError, LoadError, SettingsError, UnsupportedPipelineError
    from stgfast.queue.state import StoreError
    from stgfast.render.run import BadJobs, render
    from stgfast.render.together import follows

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
            retries=arguments.retries,
            timeout=arguments.timeout,
            wait=arguments.wait,
            verify=arguments.verify,
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
            same_process=arguments.same_process,
            bars=not (arguments.quiet or arguments.json),
            listener=screen.show,
            plan_only=arguments.plan,
            like=arguments.like,
        )
    except BadJobs as error:
        screen.error(
            f"{error.count} bad line{'s' * (error.count > 1)}; nothing was rendered (--skip-bad goes on without)"
        )
        return WRONG
    except (SettingsError, UnsupportedPipelineError, StoreError, DeviceError) as error:
        if not follows() or isinstance(error, (LoadError, DeviceError)):
            screen.error(str(error))
        return DISK if isinstance(error, StoreError) else DEVICE if isinstance(error, DeviceError) else WRONG
    return (SOME if report.bad else DONE) if arguments.plan else report.code


def jobs_of(arguments: argparse.Namespace) -> Path | list[dict[str, Any]] | None:
    """The file of jobs, or the jobs from the arguments."""
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
    if arguments.jobs is not None and arguments.source is not None:
        raise SettingsError("jobs: expected a job file, or --from with a clip, and not both")
    if arguments.source is not None:
        return [repeated(arguments.source)]
    if arguments.jobs is None and not (arguments.wait or _has_added(arguments.out)):
        raise SettingsError("jobs: expected a job file, --from with a clip, or --wait for jobs that are added")
    return arguments.jobs  # type: ignore[no-any-return]


def _has_added(out: Path) -> bool:
    """Whether the folder has jobs from `stgfast add`."""
    from stgfast.queue.desk import Desk

    if not (out / ".stgfast" / "jobs.db").is_file():
        return False
    with Desk(out) as desk:
        return desk.has_added()


def prompts_of(given: list[str]) -> list[str]:
    """The given prompts, or those of a file."""
    from stgfast.errors import SettingsError
    from stgfast.queue.readers import Bad, read

    if len(given) > 1 or not given[0].lower().endswith(".txt"):
        return given
    found = []
    for line in read(Path(given[0])):
        if isinstance(line, Bad):
            raise SettingsError(f"line {line.number}: {line.why}")
        found += [job.prompt for job in line.jobs]
    return found


def repeated(clip: Path) -> dict[str, Any]:
    """The job from which a clip says it was made."""
    from stgfast.errors import wrong
    from stgfast.render.files import metadata_of

    job = metadata_of(clip).get("job")
    if not isinstance(job, dict):
        raise wrong("clip", str(clip), "a clip that says what it was rendered from")
    return job


def defaults_of(given: Iterable[str]) -> dict[str, Any]:
    """`FIELD=VALUE`, where a value that is not JSON is text."""
    from stgfast.errors import wrong
    from stgfast.queue.job import parse_json

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
