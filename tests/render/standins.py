"""Named models that hang, or kill their process, if the prompt of a job asks for it."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import threading
import time
from pathlib import Path

from stgfast.render import worker
from stgfast.render.models import Named
from tests.render import pipes

PROMPTS: dict[int, list[str]] = {}  # of the batch that a thread renders


def forever():
    """A thread that can be stopped."""
    while True:
        time.sleep(0.02)


ACTIONS = {
    "sleeps": forever,
    "blocks": lambda: time.sleep(1e6),  # no Python code runs after it
    "blocks all": lambda: ctypes.PyDLL(None).sleep(1_000_000),  # other threads of the process do not run
    "exits": lambda: os._exit(137),
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "breaks the device": None,
}


def named(what: str, marker: Path | None = None) -> Named:
    """A model that does so at the word `bad`. With a marker, only if that file does not exist; the model makes it."""
    return pipes.named(functools.partial(build, what, marker))


def build(what: str, marker: Path | None = None):
    _watch()
    pipe = pipes.guided()
    kind = type(pipe.transformer)

    class Standing(kind):
        def forward(self, *args, **kwargs):
            made = kind.forward(self, *args, **kwargs)
            asked = any("bad" in prompt for prompt in PROMPTS.get(threading.get_ident(), ()))
            if asked and marker is None:
                _act(what)
            elif asked and not marker.exists():
                marker.touch()
                _act(what)
            return made

    pipe.transformer.__class__ = Standing
    return pipe


def _act(what: str) -> None:
    if what == "breaks the device":
        worker.BatchRun._broken = lambda run: RuntimeError("CUDA error")
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    ACTIONS[what]()


def _watch() -> None:
    """Record the prompts of a thread, in whichever way the pipeline gets them."""
    if getattr(worker.BatchRun, "watched", False):
        return
    clips = worker.BatchRun.clips

    def watched(self, alone):
        PROMPTS[threading.get_ident()] = [task.job.prompt for task in self.batch.tasks]
        return clips(self, alone)

    worker.BatchRun.clips, worker.BatchRun.watched = watched, True
