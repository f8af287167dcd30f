"""Batches in, written clips out, on one device. A worker has no database: the result of a job is an `Outcome`.

Each batch has a thread, and goes through four stages, each of which takes one batch at a time:

    text      the pipeline's own call, up to where it prepares latents: each prompt is encoded, once
    denoiser  the call itself, with the encoded prompts
    decoder   the same call, from the VAE's decoder on, one clip after another
    writer    frames become files in a temporary place

So the next batch denoises while this one is decoded and written.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from stgfast.errors import DeviceError
from stgfast.installed import installed_on
from stgfast.queue.batches import Batch, Task, takes_more
from stgfast.queue.job import Job
from stgfast.ranks.wire import Ranks
from stgfast.render.batch_run import STAGES, TEXT, BatchRun, Overdue
from stgfast.render.files import Form
from stgfast.render.loading import moves
from stgfast.render.loras import Loras
from stgfast.render.outcomes import Expired, Outcome, Progress, Prompt, Stopped
from stgfast.render.texts import Texts, encoders_of
from stgfast.version import __version__

ABANDONED = 3  # abandoned batches, after which the device is at fault


class Others(Protocol):
    """The processes that make each clip together with this one."""

    ranks: Ranks

    def begin(self, batch: Batch, ahead: Sequence[Prompt]) -> None:
        """Let them make the calls of this batch too."""


class Worker:
    """Renders batches with one pipeline.

    Attributes:
        scratch: the folder for temporary files.
        fps: frames per second of a job's clip, if it is not the same for all.
        others: the processes that make each clip together with this one; batches are then made one after another.
    """

    def __init__(
        self,
        pipe: Any,
        scratch: Path,
        form: Form,
        *,
        fps: Callable[[Job], float] | None = None,
        offload_text: bool = False,
        revision: str = "",
        others: Others | None = None,
    ):
        import diffusers

        self.pipe, self.scratch, self.form, self.fps = copy.copy(pipe), scratch, form, fps
        self.outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self.stages = {stage: threading.Lock() for stage in STAGES}
        self.others = others
        # If models are moved, each call ends before the next one begins.
        self.overlap = not moves(pipe) and others is None
        encoders = encoders_of(pipe) if offload_text else {}
        vars(self.pipe).update(dict.fromkeys(encoders))
        self.device = torch.device(self.pipe._execution_device)  # text encoders may be elsewhere
        # If the text encoder leaves the device, later prompts are encoded together with current ones.
        self.ahead: Sequence[Prompt] = ()
        self.texts = Texts(scratch / "texts", self.device, parts=encoders, ahead=self._to_come)
        self.loras = Loras(pipe)
        self.stopping = self.aborting = False
        self.abandoned = 0
        self.alike = True
        self.in_hand: dict[threading.Thread, BatchRun] = {}
        self.streams: list[Any] = []
        layout, *_ = installed_on(pipe).adapter.layouts(pipe).values()
        self.made_with = {
            **({"revision": revision} if revision else {}),
            **({"processes": others.ranks.size} if others is not None else {}),
            "dtype": str(layout.denoiser.dtype).removeprefix("torch."),
            "vae_tiling": bool(getattr(getattr(pipe, "vae", None), "use_tiling", False)),
            "device": self.device_name,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        }
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # weights are loaded before other streams read them

    @property
    def busy(self) -> bool:
        return bool(self.in_hand) or not self.outcomes.empty()

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def where(self) -> dict[str, Any]:
        return {"device": self.device_name}

    @property
    def idle(self) -> bool:
        return not self.in_hand

    @property
    def place(self) -> str:
        return ""

    @property
    def places(self) -> int:
        return 1

    def free(self) -> Sequence[Worker]:
        batches = [run.batch for run in list(self.in_hand.values())]
        return [self] if takes_more(batches, len(STAGES)) else []  # one in each stage

    def outcome(self, seconds: float) -> Outcome | None:
        try:
            return self.outcomes.get(timeout=seconds)
        except queue.Empty:
            return None

    def form_of(self, job: Job) -> Form:
        return self.form if self.fps is None else dataclasses.replace(self.form, fps=self.fps(job))

    def metadata_for(self, task: Task, form: Form) -> dict[str, Any]:
        """How a clip was made: enough to make it again."""
        return {
            "job": task.job.to_dict(),
            "model": task.model,
            "fps": form.fps,
            "version": __version__,
            **self.made_with,
        }

    def start(self, batch: Batch, ahead: Sequence[Prompt] = ()) -> None:
        run = BatchRun(self, batch, self.scratch)
        thread = threading.Thread(target=self._run, args=(run,), name="stgfast-batch", daemon=True)
        self.in_hand[thread] = run
        self.ahead = ahead
        thread.start()

    def render(self, batch: Batch, ahead: Sequence[Prompt], aside: Path) -> Iterator[Outcome]:
        """Like `start`, in the caller's thread. Returns the outcomes, with clips in a folder of the caller's."""
        run = self.in_hand[threading.current_thread()] = BatchRun(self, batch, aside)
        self.ahead = ahead
        yield from self._through(run)

    def follow(self, batch: Batch, ahead: Sequence[Prompt]) -> None:
        """Make the calls of a batch that another process writes. If one fails, that process decides what follows."""
        run = self.in_hand[threading.current_thread()] = BatchRun(self, batch, self.scratch)
        self.ahead = ahead
        try:
            run.clips(alone=True)
        except Exception:
            if self.lost is not None:
                raise self.lost from None
        finally:
            run.leave()
            run.close()
            del self.in_hand[threading.current_thread()]

    @property
    def lost(self) -> DeviceError | None:
        """The error that ends the run, if a process is gone that makes clips with this one."""
        return DeviceError(self.others.ranks.lost) if self.others is not None and self.others.ranks.lost else None

    def progress(self) -> list[Progress]:
        return [run.progress() for run in list(self.in_hand.values())]

    def expire(self, batch: Batch, why: str) -> None:
        """Abort a batch at its next step, or at the next line of Python."""
        for thread, run in list(self.in_hand.items()):
            if run.batch == batch and not run.expired:
                run.expired = why
                run.interrupt()
                if thread.ident is not None:
                    asynchronously = ctypes.pythonapi.PyThreadState_SetAsyncExc
                    asynchronously(ctypes.c_ulong(thread.ident), ctypes.py_object(Overdue))

    def replace(self, batch: Batch, why: str) -> None:
        """Abandon a batch that cannot be interrupted: others do not wait for its thread any more."""
        for thread, run in list(self.in_hand.items()):
            if run.batch == batch:
                del self.in_hand[thread]
                left, run.abandoned = run.left(), True
                if TEXT in run.held:  # it has a lock of its own
                    self.texts = self.texts.anew()
                run.leave()
                self.abandoned += 1
                self.outcomes.put(Expired(left, why))
                if self.abandoned >= ABANDONED:
                    error = DeviceError(f"{ABANDONED} batches could not be ended, the last one after: {why}")
                    self.outcomes.put(Stopped((), error))

    def stop(self) -> None:
        """Release batches that do not denoise yet, and finish the others."""
        self.stopping = True

    def abort(self) -> None:
        """Abort all batches at their next step."""
        self.stopping = self.aborting = True
        for run in list(self.in_hand.values()):
            run.interrupt()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """A CUDA stream for a batch, so that batches do not wait for each other on a GPU.

        Streams are reused, because the allocator keeps memory for each. The text stage enters this, one batch at a
        time.
        """
        if self.device.type != "cuda":
            yield
            return
        stream = self.streams.pop() if self.streams else torch.cuda.Stream(self.device)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            self.streams.append(stream)

    def close(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for thread in list(self.in_hand):
            thread.join(max(0.0, until - time.monotonic()))

    def _to_come(self) -> list[Prompt]:
        """Prompts that come later, including those of current batches: several may be handed out before the first
        encodes its prompts.
        """
        ahead = self.ahead  # read before the current batches, because what leaves it is among them
        jobs = [task.job for run in list(self.in_hand.values()) for task in run.batch.tasks]
        return list(dict.fromkeys([*((job.prompt, job.negative_prompt) for job in jobs), *ahead]))

    def _run(self, run: BatchRun) -> None:
        for outcome in self._through(run):
            if run.abandoned:  # its outcomes were reported already
                return
            self.outcomes.put(outcome)

    def _through(self, run: BatchRun) -> Iterator[Outcome]:
        try:
            yield from run.outcomes()
        except GeneratorExit:
            raise
        except BaseException as error:  # the run must learn about each error
            yield Expired(run.left(), run.expired) if run.expired else Stopped(run.left(), error)
        finally:
            run.leave()
            run.close()
            self.in_hand.pop(threading.current_thread(), None)
