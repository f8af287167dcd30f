"""A run that is killed many times, at random moments, and its result.

    python -m tests.render.killed --jobs 200 --kills 20

One process loads the model. Each start is a fork of it that renders, and is killed with SIGKILL. Afterwards every job
is rendered alone for comparison.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import stgfast
from stgfast import Guidance, Perturbation, toy
from stgfast.queue.state import FOLDER
from stgfast.queue.store import Store
from stgfast.render import worker
from stgfast.render.files import metadata_of, read_frames
from stgfast.render.gallery import NAME
from stgfast.render.run import render
from tests.precision import NEAR
from tests.render import pipes

BAD = (
    '{"prompt": "a", "name": "../../etc/passwd"}',
    '{"prompt": "a", "name": "/tmp/x"}',
    '{"prompt": "a", "width": 100}',
    '{"prompt": "a", "guidance": {"perturbations": [{"layers": []}]}}',
    '{"prompt": "a", "pipeline": {"output_type": "latent"}}',
    '{"prompt": "a", "image": "none.png"}',
    '{"prompt": "a", "seed": -1}',
    '{"prompt": ""}',
    "this is not JSON",
    '{"prompt": "' + "x" * (10 << 20) + '"}',
)


@dataclass(frozen=True)
class Kind:
    """What is rendered: a pipeline, and the settings that its jobs choose from."""

    pipeline: Callable[[], Any]
    prompts: Sequence[str]
    negative: str
    widths: Sequence[int]
    height: int
    frames: Sequence[int]
    tokens: int


KINDS = {
    "tiny": Kind(
        lambda: stgfast.accelerate(pipes.pipeline("wan"), Guidance(Perturbation([1]))),
        ("a red kite", "the grey sea", "a dog runs", "a blue kite over the sea"),
        "bad",
        (32, 48),
        32,
        (1, 5),
        16,
    ),
    "toy": Kind(
        lambda: stgfast.accelerate(toy.pipeline(), toy.GUIDANCE), toy.PROMPTS, "a white star", (64, 96), 64, (9, 17), 20
    ),
}


def job_file(path: Path, count: int, bad: int, rng: random.Random, kind: Kind) -> None:
    """Mixed sizes, settings and prompts, with bad lines among them."""
    lines = []
    for seed in range(count - bad):
        job = {
            "prompt": rng.choice(kind.prompts),
            "seed": seed,
            "name": f"clip-{seed}",
            "width": rng.choice(kind.widths),
            "height": kind.height,
            "num_frames": rng.choice(kind.frames),
            "steps": rng.choice((2, 3)),
            "pipeline": {"max_sequence_length": kind.tokens, "guidance_scale": rng.choice((1.0, 5.0))},
        }
        if rng.random() < 0.3:
            job["guidance"] = {"perturbations": []}
        if rng.random() < 0.3:
            job["negative_prompt"] = kind.negative
        lines.append(json.dumps(job))
    for number in range(bad):
        lines.insert(rng.randrange(len(lines) + 1), BAD[number % len(BAD)])
    path.write_text("\n".join(lines))


def start(pipe: object, jobs: Path, out: Path, log: Path, max_batch: int, most: float) -> int:
    """A process that renders, and logs the finished clips. After `most` of them, it waits for the kill: on a busy
    machine, it could otherwise end before.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("a", buffering=1) as file:

            def listener(event: dict[str, object]) -> None:
                file.write(json.dumps(event) + "\n")
                while event["event"] == "done" and done(log) >= most:
                    time.sleep(1)

            report = render(pipe, jobs, out, format="png", max_batch=max_batch, skip_bad=True, listener=listener)
        code = report.code
    except BaseException:
        traceback.print_exc()
        code = 99
    finally:
        os._exit(code)


def compare(pipe: object, jobs: Path, out: Path, alone: Path, max_batch: int) -> tuple[int, float]:
    """The number of clips that are bit for bit the same as alone, and the largest relative difference of latents."""
    seen: dict[str, dict[str, torch.Tensor]] = {"together": {}, "alone": {}}
    decoded = worker.BatchRun._decoded
    where = "alone"

    def recording(self, decode, latents, *rest):
        for task, latent in zip(self.batch.tasks, latents.detach().clone(), strict=True):
            seen[where][task.file] = latent
        return decoded(self, decode, latents, *rest)

    worker.BatchRun._decoded = recording
    report = render(pipe, jobs, alone, format="png", max_batch=1, skip_bad=True)
    where = "together"
    render(pipe, jobs, alone.with_name("together"), format="png", max_batch=max_batch, skip_bad=True)
    worker.BatchRun._decoded = decoded
    equal, worst = 0, 0.0
    for file, latent in seen["alone"].items():
        other = seen["together"][file]
        worst = max(worst, float((latent - other).abs().max() / latent.abs().max()))
        one, two = read_frames(out / file).astype(int), read_frames(alone / file).astype(int)
        assert one.shape == two.shape, file
        assert np.abs(one - two).max() <= 1, file
        equal += int(torch.equal(latent, other) and (one == two).all())
    assert report.done == len(seen["alone"])
    return equal, worst


def run(
    folder: Path, count: int, kills: int, bad: int, max_batch: int, seed: int = 0, model: str = "tiny"
) -> dict[str, object]:
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    jobs, out, log = folder / "jobs.jsonl", folder / "out", folder / "log.jsonl"
    job_file(jobs, count, bad, rng, KINDS[model])
    pipe = KINDS[model].pipeline()
    killed = 0
    # Each kill comes a random time after a certain number of clips, so all come before the last clip.
    moments = sorted(rng.sample(range(int(0.8 * (count - bad))), kills))
    while True:
        most = min(moments[killed] + max_batch, count - bad - 1) if killed < kills else math.inf
        child = start(pipe, jobs, out, log, max_batch, most)
        if killed < kills:
            while done(log) < moments[killed] and alive(child):
                time.sleep(0.002)
            time.sleep(rng.uniform(0.0, 0.2))
            if alive(child):
                os.kill(child, signal.SIGKILL)
                killed += 1
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            code = os.WEXITSTATUS(status)
            break
    good = count - bad
    events = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    finished = [event["file"] for event in events if event["event"] == "done"]
    last = [event for event in events if event["event"] == "ended"][-1]
    assert code == (1 if bad else 0), code
    assert (last["done"], last["failed"], last["waiting"], last["bad"]) == (good, 0, 0, bad), last
    assert len(finished) == len(set(finished)), "a clip was finished twice"
    there = {path.name for path in out.iterdir()}
    assert there - {NAME} == {FOLDER, *(f"clip-{n}" for n in range(good))}
    assert sorted(path.name for path in (out / FOLDER).iterdir()) == ["jobs.db", "lock"]
    database = sqlite3.connect(out / FOLDER / "jobs.db")
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
    with Store(out) as store:
        rows = list(store.rows(every=True))
    assert len(rows) == good
    for row in rows:
        assert row.status == "done", row
        assert metadata_of(out / row.file)["job"]["seed"] == row.job.seed
        frames = read_frames(out / row.file)
        assert frames.shape == (row.job.num_frames, row.job.height, row.job.width, 3)
    equal, worst = compare(pipe, jobs, out, folder / "alone", max_batch)
    assert worst <= NEAR, worst
    assert equal == good or max_batch > 1, equal
    return {
        "model": model,
        "jobs": count,
        "bad": bad,
        "kills": killed,
        "clips": good,
        "attempts": sum(row.attempts for row in rows),
        "bit-equal to the same job alone": equal,
        "largest relative difference of latents": worst,
    }


def done(log: Path) -> int:
    return log.read_text().count('"event": "done"') if log.exists() else 0


def alive(child: int) -> bool:
    """Whether it runs. A process that ended waits for its parent to read its exit code."""
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--bad", type=int, default=10)
    parser.add_argument("--max-batch", type=int, default=4, help="1: then every clip is bit for bit what it is alone")
    parser.add_argument("--model", choices=KINDS, default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="is emptied first")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    given = arguments.folder, arguments.jobs, arguments.kills, arguments.bad, arguments.max_batch
    result = run(*given, seed=arguments.seed, model=arguments.model)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
