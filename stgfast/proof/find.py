"""Find the facts of an unknown pipeline: propose them from one observed step, then verify them.

One step shows most facts: which model denoises, on how many rows and in how many calls, how predictions are combined,
what blocks pass on. If there are several ways to read a call, each is compared with all steps, and the first that
agrees is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stgfast.batching.execution import AS_IT_IS, Execution
from stgfast.batching.outputs import prediction_in, tensors_in
from stgfast.call import check_layers
from stgfast.errors import UnsupportedPipelineError
from stgfast.formulas import COND, UNCOND
from stgfast.guidance import Guidance
from stgfast.integrations import guiders, scales, steps
from stgfast.integrations.spec import Adapter
from stgfast.perturbation import Perturbation
from stgfast.proof.blocks import UnseenBlocksError, blocks_of
from stgfast.proof.check import Accelerated, check
from stgfast.proof.links import named
from stgfast.proof.look import Look, look
from stgfast.proof.measure import Combined, Stand, measured
from stgfast.proof.watch import Watch

SAMPLES = ("hidden_states", "sample", "x", "latents")  # names of the denoiser's argument with noisy latents
ATTEMPTS = 3  # attempts, each with a corrected proposal
DEEP = 0.7  # relative depth of the default layer


class Scaled(NamedTuple):
    """One way to read the CFG scale, from a call and from a running pipeline."""

    requested: Callable[..., Any]
    live: Callable[..., Any]
    words: str


SCALES = (
    Scaled(scales.requested_scale, scales.live_scale, "guidance_scale above 1"),
    Scaled(scales.requested_scale, scales.live_scale_of_call, "guidance_scale above 1"),
    Scaled(scales.requested_scale, scales.live_requested, "guidance_scale above 1"),
    Scaled(scales.requested_scale, scales.live_scale_of_second, "guidance_scale above 1"),
    Scaled(scales.requested_excess, scales.live_excess, "guidance_scale above 1"),
    Scaled(scales.true_cfg_scale, scales.live_true_cfg_scale, "true_cfg_scale above 1 and a negative prompt"),
    Scaled(guiders.requested, guiders.live, "a guider that is enabled, with guidance_scale above 1"),
    Scaled(scales.requested_over_frames, scales.live_over_frames, "max_guidance_scale above 1"),
    Scaled(scales.no_scale, scales.no_live_scale, "nothing: it has no CFG"),
)
ASKED = (
    steps.steps_of_call,
    functools.partial(steps.steps_of_call, strength="strength"),
    functools.partial(steps.steps_of_call, strength="denoise_strength"),
    guiders.steps_of_modular_call,
)
MADE = (steps.steps_of_pipe, guiders.steps, steps.steps_of_scheduler)


class Finding:
    """The facts of one pipeline class, from one call."""

    def __init__(self, pipe: Any, cls: type[Any], call: Mapping[str, Any]):
        self.pipe, self.cls, self.call = pipe, cls, call
        self.seen: Look = look(pipe, cls, call)
        assert self.seen.arguments is not None
        self.denoiser = self.seen.arguments.module
        given = named(self.seen.arguments)
        known = [name for name in SAMPLES if isinstance(given.get(name), Tensor)]
        tensors = [name for name, value in given.items() if isinstance(value, Tensor) and value.ndim > 2]
        if not known and not tensors:
            raise self.unknown("its denoiser takes no tensor of samples by name")
        self.sample = (known or tensors)[0]
        self.rows = len(given[self.sample])
        self.watch = Watch(pipe, cls, call, {name: getattr(pipe, name) for name in self.denoisers}, self.sample)
        stand = Stand(self.watch)
        assert self.seen.form is not None
        stand.forms[self.seen.denoiser] = self.seen.form._replace(samples=given[self.sample].shape)
        with torch.no_grad():
            self.combined = measured(self.watch, stand)
            most = max(sum(combined.groups) for combined in self.combined)
            if most > 2:
                raise self.unknown(f"it combines {most} predictions in a step, and guides by more than CFG itself")
            predicted = tensors_in(self.seen.form.output)
            if len(predicted) > 1:
                raise self.unknown(f"its denoiser predicts {len(predicted)} tensors in one call")
            self.scaled, self.made = self._read(stand)

    def unknown(self, why: str) -> UnsupportedPipelineError:
        return UnsupportedPipelineError(
            f"pipeline: got {self.cls.__name__}, whose facts are not known and were not found: {why}; give them in "
            f"accelerate(pipe, adapter=stgfast.Adapter(...))"
        )

    @property
    def denoisers(self) -> tuple[str, ...]:
        """The denoiser that ran, and a second one for other steps if there is one."""
        first = self.seen.denoiser.removesuffix("_2")
        names = (first, f"{first}_2")
        return tuple(name for name in names if getattr(self.pipe, name, None) is not None)

    def adapter(self) -> Adapter:
        try:
            blocks, depth = blocks_of(self.seen, self.rows)
        except UnseenBlocksError as error:
            raise self.unknown(str(error)) from error
        groups = self.combined[0].groups
        if groups == (2,):
            protocol, order = "stacked", (UNCOND, COND) if self.combined[0].cond == 1 else (COND, UNCOND)
        else:
            protocol, order = "sequential", (UNCOND, COND)
            if len(groups) == 2 and self.combined[0].cond == 1:
                raise self.unknown("it calls its model for uncond first, and for cond after it")
        sent, prediction = self.first_sent, prediction_in(self.seen.form.output)  # type: ignore[union-attr]
        halves = sent.ndim == prediction.ndim and sent.shape[1] * 2 == prediction.shape[1]
        asked = next((each for each in ASKED if _says(each, self.watch.copied_call) == self.steps), None)
        if asked is None:
            raise self.unknown(f"it makes {self.steps} steps, which no argument of the call says")
        return Adapter(
            pipeline=self.cls.__name__,
            protocol=protocol,
            blocks=blocks,
            defaults=Guidance(Perturbation([int(DEEP * depth)])),
            source="found",
            order=order,
            float32=sent.dtype is torch.float32 and prediction.dtype is not torch.float32,
            learned_sigma=halves,
            requested=self.scaled.requested,
            cfg_on=self.scaled.words,
            live=self.scaled.live,
            steps=self.made,
            windowed=len(self.combined) > self.steps,
            steps_asked=asked,
            own_solver="its facts were found, but not which scheduler settings it needs",
            denoisers=self.denoisers,
            sample=self.sample,
        )

    # How the scale of CFG and the number of steps are read

    def _read(self, stand: Stand) -> tuple[Scaled, Callable[..., Any]]:
        """The ways to read a call that agree with each step."""
        left, times, counts = list(SCALES), list[float](), {made: list[Any]() for made in MADE}
        answers = stand.answer(lambda shape, group: torch.ones(shape), self.combined[0].rows, own=True)

        def answer(step: int, turn: int, name: str, plain: Any, arguments: Any) -> Any:
            if turn == 0 and step < len(self.combined):
                combined = self.combined[step]
                left[:] = [each for each in left if self._agrees(each, combined, name)]
                time = torch.as_tensor(named(arguments).get("timestep", -step))
                times.append(float(time.max()))
                for made in MADE:
                    counts[made].append(_says(made, self.watch.copy))
            return answers(step, turn, name, plain, arguments)

        run = self.watch.run(answer, thin=True)
        self.first_sent = run[0].combined[0]
        if not left:
            weights = ", ".join(f"{float(weight.max()):g}" for weight in self.combined[0].weights)
            raise self.unknown(
                f"it combines its predictions with {weights}, which nothing that it was called with says"
            )
        for made in MADE:
            if self._steps_are(counts[made], times):
                self.steps = int(counts[made][0])
                return left[0], made
        raise self.unknown(f"it makes {len(run)} steps, which nothing on the pipeline says")

    def _steps_are(self, counts: Sequence[Any], times: Sequence[float]) -> bool:
        """Whether the number of steps agrees in each step, or in each part if the clip is made in parts."""
        if NOTHING in counts:
            return False
        if set(counts) == {len(counts)}:
            return True
        begins = {number for number, (before, time) in enumerate(pairwise(times), 1) if time > before}
        starts, end = set[int](), 0
        while end < len(counts):
            starts, end = starts | {end}, end + max(int(counts[end]), 1)
        return end == len(counts) and starts - {0} == begins

    def _agrees(self, scaled: Scaled, combined: Combined, name: str) -> bool:
        scale = _says(scaled.live, self.watch.copy, self.watch.copied_call, name)
        asked = _says(scaled.requested, self.watch.copied_call)
        if scale is NOTHING or asked is NOTHING or (scale is None) != (len(combined.weights) == 1):
            return False
        measured = combined.weights[combined.cond]
        wanted = torch.as_tensor(1.0 if scale is None else scale).double().cpu()
        return bool(((wanted - measured).abs() <= combined.exactness * (1 + measured.abs())).all())


NOTHING = object()


def _says(read: Callable[..., Any], *given: Any) -> Any:
    """The value that a way to read returns; NOTHING if the pipeline has no such value."""
    try:
        return read(*given)
    except (AttributeError, LookupError, TypeError, StopIteration, ValueError, RuntimeError):
        return NOTHING


def proposed(pipe: Any, cls: type[Any], call: Mapping[str, Any]) -> Adapter:
    """The facts of a pipeline from one step, not verified."""
    return Finding(pipe, cls, call).adapter()


def found(
    pipe: Any,
    cls: type[Any],
    call: Mapping[str, Any],
    guided: Callable[[Adapter], Guidance],
    execution: Execution = AS_IT_IS,
) -> Adapter:
    """The facts of a pipeline, proposed and verified for one call of it.

    `guided` returns the guidance of that call for an adapter; it may be the adapter's default.
    """
    adapter = proposed(pipe, cls, call)
    tried = ""
    for _ in range(ATTEMPTS):
        fitted, guidance = adapter.on(pipe), guided(adapter)
        check_layers(fitted, guidance)
        verdict = check(Accelerated(fitted, cls, guidance, call, execution))
        if verdict.ok:
            return adapter
        tried = tried or verdict.reason
        if verdict.instead is None:
            break
        adapter = verdict.instead
    raise UnsupportedPipelineError(
        f"pipeline: got {cls.__name__}, whose facts are not known; those that were found do not give the plain "
        f"method's result: {tried}; give them in accelerate(pipe, adapter=stgfast.Adapter(...))"
    )
