"""One batch on its way through the stages of a worker: from jobs to written clips.

No pipeline code is copied: a batch has a shallow copy of the pipeline with its own scheduler, in which `encode_prompt`,
`prepare_latents` and the VAE's `decode` are replaced.
"""

from __future__ import annotations

import copy
import functools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stgfast.queue.batches import Batch, Task
from stgfast.queue.placing import discard
from stgfast.render.calls import arguments_of
from stgfast.render.files import heard, pixels, remark_on, write
from stgfast.render.outcomes import (
    Again,
    Clip,
    Clock,
    Expired,
    Failed,
    Outcome,
    Progress,
    Stopped,
    Written,
    tasks_of,
)
from stgfast.render.shortage import free, is_out_of_memory
from stgfast.render.texts import NotStackable
from stgfast.solvers import solver

if TYPE_CHECKING:
    from stgfast.render.worker import Worker

LESS = " (offload, vae_tiling or a smaller clip take less)"
TEXT, DENOISER, DECODER, WRITER = STAGES = ("text", "denoise", "decode", "write")


class Stopping(Exception):
    """Raised in a batch that is to be released."""


class Overdue(BaseException):
    """Raised in the thread of a batch that took too long. No library takes it for an error of its own."""


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
                    again = _why(error)
            # Outside the handler, what the error held is free.
            free(self.worker.device)
            if again is not None:
                if len(tasks) > 1:
                    yield Again(tasks, again, self.batch.shape, rows=len(tasks) // 2)
                else:
                    why = f"out of memory, with nothing else running{LESS}: {again}"
                    yield Failed(tasks[0], why, self._share(), memory=True)
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
            return Again(tasks, _why(error), apart=True)
        return Failed(tasks[0], _why(error), self._share(), "".join(traceback.format_exception(error)))

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
                    yield Again((task,), _why(error), apart=True)
                else:
                    yield Failed(task, _why(error), self._share(), "".join(traceback.format_exception(error)))
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
                yield Failed(task, _why(fault), self._share(), "".join(traceback.format_exception(fault)))
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


def _why(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:2000]
