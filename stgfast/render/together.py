"""Processes that make one clip together. The first one has the jobs and tells the others the next batch. They make
the same calls of the pipeline, and write nothing.

This module is for processes that torchrun started; those of a Ray cluster are in actors.py.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import time
from base64 import b64decode, b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch.distributed as dist

from stgfast.errors import wrong
from stgfast.queue.batches import Batch
from stgfast.ranks.wire import joined
from stgfast.render.crew import Setup
from stgfast.render.loading import execution_of
from stgfast.render.models import Model
from stgfast.render.outcomes import Prompt
from stgfast.render.worker import Worker

LOOK = 0.02  # seconds between checks for the next batch


def check(gpus_per_clip: int | None, ray: str | None, model: Model | None) -> int:
    """Check the number of processes over which each clip is divided."""
    if model is not None and model.pipe is not None:
        if gpus_per_clip is not None or execution_of(model.pipe).ranks is not None:
            right = "a folder or a name: each of the processes of a clip loads a pipeline of its own"
            raise wrong("model", type(model.pipe).__name__, right)
        return 1
    if gpus_per_clip is not None and (
        isinstance(gpus_per_clip, bool) or not isinstance(gpus_per_clip, int) or gpus_per_clip < 1
    ):
        raise wrong("gpus_per_clip", gpus_per_clip, "a number of GPUs, 1 or more")
    started = int(os.environ["WORLD_SIZE"]) if dist.is_available() and dist.is_torchelastic_launched() else 1
    if started > 1:
        if ray is not None:
            raise wrong("ray", ray, "none with torchrun: it starts the processes of one clip itself")
        if gpus_per_clip not in (None, started):
            raise wrong("gpus_per_clip", gpus_per_clip, f"{started}, as many as torchrun has started")
        return started
    if (gpus_per_clip or 1) > 1 and ray is None:
        right = "ray beside it, or torchrun --nproc-per-node N -m stgfast.cli render"
        raise wrong("gpus_per_clip", gpus_per_clip, right)
    return gpus_per_clip or 1


def follows() -> bool:
    """Whether this process was started by torchrun and is not the first, which reports errors for all."""
    return dist.is_available() and dist.is_torchelastic_launched() and os.environ["RANK"] != "0"


class Started:
    """The processes that torchrun started, as seen by one of them. The first one sends messages through the store."""

    def __init__(self, device: str | None):
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        self.device, self.ranks = device, joined(device)
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        # Another name if torchrun has restarted all of them.
        self.store = PrefixStore(f"stgfast {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self.sent = 0

    @property
    def first(self) -> bool:
        return self.ranks.rank == 0

    def worker(self, setup: Setup, scratch: Path) -> Worker:
        """The worker of the first process, with which the others work."""
        self._say("load", setup, scratch)
        return setup.worker(scratch, self)

    def begin(self, batch: Batch, ahead: Sequence[Prompt]) -> None:
        """Let the others make the calls of this batch too."""
        if self.first:
            self._say("batch", batch, ahead)

    def end(self) -> None:
        """Tell the others that nothing comes any more."""
        self._say("end")

    def follow(self) -> None:
        """The loop of the other processes, until the first one ends it. Interrupts go to the first one."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        worker: Worker | None = None
        while True:
            what, *more = self._heard()
            if what == "end":
                return
            if what == "load":
                worker = None  # and its model
                setup, scratch = more
                own = dataclasses.replace(setup, loading=dataclasses.replace(setup.loading, device=self.device))
                worker = own.worker(scratch / uuid4().hex, self)  # for its encoded prompts
            elif worker is not None:
                worker.follow(*more)

    def _say(self, *message: Any) -> None:
        self.store.set(str(self.sent), b64encode(pickle.dumps(message)).decode())
        self.sent += 1

    def _heard(self) -> Any:
        key = str(self.sent)
        while not self.store.check([key]):
            time.sleep(LOOK)
        self.sent += 1
        return pickle.loads(b64decode(self.store.get(key)))
