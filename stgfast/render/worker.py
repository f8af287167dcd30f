"""Batches in, written clips out, on one device. A worker has no database: the result of a job is an `Outcome`.

Each batch has a thread, and goes through four stages, each of which takes one batch at a time:

    text      the pipeline's own call, up to where it prepares latents: each prompt is encoded, once
    denoiser  the call itself, with the encoded prompts
    decoder   the same call, from the VAE's decoder on, one clip after another
    writer    frames become files in a temporary place

So the next batch denoises while this one is decoded and written. No pipeline code is copied: a batch has a shallow copy
of the pipeline with its own scheduler, in which `encode_prompt`, `prepare_latents` and the VAE's `decode` are replaced.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import functools
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stgfast.errors import DeviceError
from stgfast.installed import installed_on
from stgfast.queue.batches import Batch, Task, takes_more
from stgfast.queue.job import Job
from stgfast.queue.placing import discard
from stgfast.ranks.wire import Ranks
from stgfast.render.calls import arguments_of
from stgfast.render.files import Form, heard, pixels, remark_on, write
from stgfast.render.loading import moves
from stgfast.render.loras import Loras
from stgfast.render.outcomes import (
    Again,
    Clip,
    Clock,
    Expired,
    Failed,
    Outcome,
    Progress,
    Prompt,
    Stopped,
    Written,
    tasks_of,
)
from stgfast.render.shortage import free, is_out_of_memory
from stgfast.render.texts import NotStackable, Texts, encoders_of
from stgfast.solvers import solver
from stgfast.version import __version__

ABANDONED = 3  # abandoned batches, after which the device is at fault
LESS = " (offload, vae_tiling or a smaller clip take less)"
TEXT, DENOISER, DECODER, WRITER = STAGES = ("text", "denoise", "decode", "write")


class Others(Protocol):
    """The processes that make each clip together with this one."""

    ranks: Ranks

    def begin(self, batch: Batch, ahead: Sequence[Prompt]) -> None:
        """Let them make the calls of this batch too."""


class Stopping(Exception):
    """Raised in a batch that is to be released."""


class Overdue(BaseException):
    """Raised in the thread of a batch that took too long. No library takes it for an error of its own."""


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


class BatchRun:
    """One batch on its way through the stages, with clips in a temporary folder."""

    def __init__(self, worker: Worker, batch: Batch, aside: Path):
        self.worker, self.batch, self.aside = worker, batch, aside
        self.held: list[str] = []
        self.seconds: dict[str, float] = {}
        self.settled: set[int] = set()
        self.errors: dict[int, BaseException] = {}  # errors of the decoder, by the clip's position in the batch
        self.started = self.decoding = 0.0  # start times of denoiser and decoder
        self.expired = ""  # why it is aborted
        self.abandoned = False  # it could not be aborted in time
        self.clock = Clock()
        self.step = self.steps = 0
        self.pipe: Any = self._copy()

    def outcomes(self) -> Iterator[Outcome]:
        """The outcome of each job."""
        for outcome in self._outcomes():
            tasks = tasks_of(outcome)
            self.settled |= {task.id for task in tasks}
            yield outcome

    def progress(self) -> Progress:
        stage = self.held[-1] if self.held else ""
        clock = self.clock
        return Progress(self.batch, stage, self.step, self.steps, clock.seconds, clock.quiet)

    def interrupt(self) -> None:
        """Make no further denoising steps."""
        self.pipe._interrupt = True

    def close(self) -> None:
        """Release what the batch holds: its pipeline refers to it through the replaced methods."""
        self.pipe = SimpleNamespace()

    def left(self) -> tuple[Task, ...]:
        return tuple(task for task in self.batch.tasks if task.id not in self.settled)

    def _outcomes(self) -> Iterator[Outcome]:
        tasks = self.batch.tasks
        again = None
        for alone in (False, True) if self.worker.overlap else (True,):
            try:
                clips = self.clips(alone)
                break
            except Stopping:
                yield Expired(tasks, self.expired) if self.expired else Stopped(tasks)
                return
            except NotStackable as error:
                yield Again(tasks, str(error), apart=True)
                return
            except Exception as error:
                self.leave()
                if not is_out_of_memory(error):
                    yield self._after(error)
                    return
                if len(tasks) > 1 or alone:
                    again = _said(error)
            # Outside the handler, what the error held is free.
            free(self.worker.device)
            if again is not None:
                if len(tasks) > 1:
                    yield Again(tasks, again, self.batch.shape, rows=len(tasks) // 2)
                else:
                    said = f"out of memory, with nothing else running{LESS}: {again}"
                    yield Failed(tasks[0], said, self._share(), memory=True)
                return
            self.pipe = self._copy()
        yield from self._written(clips)

    def _after(self, error: Exception) -> Outcome:
        """The outcome of the jobs after an error in their call."""
        tasks = self.batch.tasks
        if self.expired:
            return Expired(tasks, self.expired)
        broken = self._broken()
        if broken is not None:
            return Stopped(tasks, broken)
        if self.worker.others is not None and self.worker.aborting:  # the others continue to where this process stopped
            return Stopped(tasks)
        if len(tasks) > 1:
            return Again(tasks, _said(error), apart=True)
        return Failed(tasks[0], _said(error), self._share(), "".join(traceback.format_exception(error)))

    def clips(self, alone: bool) -> list[Clip]:
        """The clips, by the pipeline's own call.

        `alone`: nothing else is on the device meanwhile, because memory was short or models are offloaded.
        """
        for stage in (DECODER, DENOISER, TEXT) if alone else (TEXT,):
            self._enter(stage)
        self.errors.clear()
        with self._together(), self.worker.stream():
            started = time.monotonic()
            self._rehearse()
            self.seconds[TEXT] = time.monotonic() - started
            if not alone:
                self.leave()
                self._enter(DENOISER)
            if self.worker.stopping:
                raise Stopping
            self.started, self.decoding = time.monotonic(), 0.0
            self.worker.loras.use(self.batch.tasks[0].job.loras)
            made = self.pipe(**arguments_of(self.pipe, [task.job for task in self.batch.tasks]))
            clips = [Clip(frames) for frames in made.frames]
            if getattr(made, "audio", None) is not None:
                rate = int(self.pipe.vocoder.config.output_sampling_rate)
                clips = [Clip(*both, rate) for both in zip(made.frames, made.audio.float().cpu(), strict=True)]
            self._synchronize()
            ended = time.monotonic()
            self.seconds[DENOISER if not self.decoding else DECODER] = ended - (self.decoding or self.started)
        self.leave()
        if len(clips) != len(self.batch):
            raise RuntimeError(f"the pipeline's clips: got {len(clips)}, expected {len(self.batch)}")
        return clips

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Within the block, all processes of a clip make the calls of this batch, and end them if one fails."""
        others = self.worker.others
        if others is None:
            yield
            return
        others.begin(self.batch, self.worker.ahead)
        with others.ranks.together():
            yield

    def _written(self, clips: Sequence[Clip]) -> Iterator[Outcome]:
        for place, task in enumerate(self.batch.tasks):
            if place in self.errors:
                error = self.errors[place]
                if is_out_of_memory(error):
                    yield Again((task,), _said(error), apart=True)
                else:
                    yield Failed(task, _said(error), self._share(), "".join(traceback.format_exception(error)))
                continue
            path = self.aside / task.file
            self._enter(WRITER)
            if self.worker.aborting:
                yield Stopped(self.left())
                return
            if self.expired:
                raise Stopping
            try:
                started = time.monotonic()
                discard(path)
                form = self.worker.form_of(task.job)
                clip = clips[place]
                sound = None if clip.sound is None else heard(clip.sound, clip.rate)
                frames = pixels(clip.frames)
                metadata = {**self.worker.metadata_for(task, form), "frames": len(frames)}
                write(path, frames, form, metadata, sound)
                share = {**self._share(), WRITER: round(time.monotonic() - started, 4)}
            except OSError as fault:  # an error of the disk, not of the job: the run cannot continue
                yield Stopped(self.left(), fault)
                return
            except Exception as fault:
                discard(path)
                yield Failed(task, _said(fault), self._share(), "".join(traceback.format_exception(fault)))
                continue
            finally:
                self.leave()
            yield Written(task, path, share, remark_on(frames, task.job.num_frames))

    # The pipeline's call

    def _copy(self) -> Any:
        pipe = copy.copy(self.worker.pipe)
        if name := self.batch.tasks[0].job.solver:
            solver(pipe, name)
        self.scheduler = pipe.scheduler
        parts = vars(pipe)
        parts["scheduler"] = self._counting(copy.deepcopy(self.scheduler))
        pipe.set_progress_bar_config(disable=True)
        if isinstance(getattr(pipe, "vae", None), nn.Module):
            parts["vae"] = copy.copy(pipe.vae)  # the same weights, but the decoder's state between calls is its own
            vars(parts["vae"])["decode"] = self._decode_with(parts["vae"].decode)
        return pipe

    def _counting(self, scheduler: Any) -> Any:
        """The scheduler, in which each step counts as progress and can be interrupted."""
        step = getattr(type(scheduler), "step", None)
        if step is None:
            return scheduler
        self.step = 0

        @functools.wraps(step)
        def counted(own: Any, *args: Any, **kwargs: Any) -> Any:
            if self.worker.aborting or self.expired:
                raise Stopping
            made = step(own, *args, **kwargs)
            if own is scheduler:  # some pipelines copy it, for sound
                self.step, self.steps = self.step + 1, len(scheduler.timesteps)
            self.clock.sign()
            return made

        kind = type(scheduler)
        named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        scheduler.__class__ = type(kind.__name__, (kind,), {**named, "step": counted})
        return scheduler

    def _rehearse(self) -> None:
        """Make the call up to its latents: this finds its errors, and encodes its prompts."""
        if not hasattr(self.pipe, "encode_prompt"):
            return
        parts = vars(self.pipe)
        parts["encode_prompt"] = self.worker.texts.encoding(self.pipe, len(self.batch))
        if not hasattr(self.pipe, "prepare_latents"):
            return  # prompts are then encoded within the call

        def reached(*_: Any, **__: Any) -> Any:
            raise _Reached

        parts["prepare_latents"] = reached
        try:
            self.pipe(**arguments_of(self.pipe, [task.job for task in self.batch.tasks]))
        except _Reached:  # the expected end
            parts["scheduler"] = self._counting(copy.deepcopy(self.scheduler))
        finally:
            del parts["prepare_latents"]

    def _decode_with(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        """The replacement of the VAE's `decode`: it releases the denoiser, then decodes one clip at a time."""

        def standing_in(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.worker.aborting or self.expired:
                raise Stopping
            self.clock.sign()
            if not self.decoding:
                self._synchronize()
                self.seconds[DENOISER] = time.monotonic() - self.started
                if DECODER not in self.held:
                    self.leave()
                    self._enter(DECODER)
                self.decoding = time.monotonic()
            return self._decoded(decode, latents, args, kwargs)

        return standing_in

    def _decoded(self, decode: Callable[..., Any], latents: Tensor, args: Any, kwargs: Any) -> Any:
        count = len(self.batch)
        if latents.ndim != 5 or len(latents) != count:  # frames of all clips, in parts
            return self._decode_one(decode, latents, args, kwargs)
        outputs: dict[int, Any] = {}
        for place in range(count):
            one = [_row(value, place, count) for value in args]
            named = {name: _row(value, place, count) for name, value in kwargs.items()}
            try:
                outputs[place] = self._decode_one(decode, latents[place : place + 1], one, named)
            except Exception as error:
                if count == 1:
                    raise
                self.errors[place] = error.with_traceback(None)  # its frames hold tensors
        if not outputs:
            raise self.errors[0]
        stand_in = next(iter(outputs.values()))  # takes the position of a failed clip
        return _stacked([outputs.get(place, stand_in) for place in range(count)])

    def _decode_one(self, decode: Callable[..., Any], latents: Tensor, args: Any, kwargs: Any) -> Any:
        try:
            return decode(latents, *args, **kwargs)
        except Exception as error:
            if not is_out_of_memory(error) or DENOISER in self.held:
                raise
        self._enter(DENOISER)  # the next batch may have used the memory: decode while none denoises
        try:
            free(self.worker.device)
            return decode(latents, *args, **kwargs)
        finally:
            self._leave(DENOISER)

    # Stages, clocks, streams

    def _enter(self, stage: str) -> None:
        """Wait until a stage is free. Several are taken in the order decoder, denoiser, text."""
        self.clock.pause()
        self.worker.stages[stage].acquire()
        self.clock.go()
        self.held.append(stage)
        if self.abandoned:
            self.leave()
            raise Stopping

    def _leave(self, stage: str) -> None:
        if stage in self.held:  # an abandoned batch has left all stages
            self.held.remove(stage)
            self.worker.stages[stage].release()

    def leave(self) -> None:
        for stage in list(self.held):
            self._leave(stage)

    def _share(self) -> dict[str, float]:
        """Seconds per stage, divided among the clips of the batch."""
        count = len(self.batch)
        return {stage: round(self.seconds[stage] / count, 4) for stage in STAGES if stage in self.seconds}

    def _synchronize(self) -> None:
        if self.worker.device.type == "cuda":
            torch.cuda.current_stream(self.worker.device).synchronize()

    def _broken(self) -> BaseException | None:
        """Whether each further job would fail: the device is unusable, as after some errors, or a process is gone
        that clips need.
        """
        if self.worker.lost is not None:
            return self.worker.lost
        if self.worker.device.type != "cuda":
            return None
        try:
            torch.cuda.synchronize(self.worker.device)
        except RuntimeError as error:
            return error
        return None


class _Reached(Exception):
    """Raised when a rehearsal has reached its end."""


def _row(value: Any, place: int, count: int) -> Any:
    rows = isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
    return value[place : place + 1] if rows else value


def _stacked(outputs: list[Any]) -> Any:
    """Decoder outputs of one clip each, as one output."""
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    return type(first)(sample=torch.cat([output.sample for output in outputs]))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:2000]
