"""Guidance for samplers that are functions, not pipelines: they receive a model and call it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stgfast.batching.arguments import Arguments, unwrapped
from stgfast.batching.execution import Execution
from stgfast.batching.room import Rows
from stgfast.call import check, check_layers, check_max_rows
from stgfast.combining import Combining, CombiningStep, branches_of
from stgfast.engine import Run
from stgfast.errors import EngineError, SettingsError, wrong
from stgfast.formulas import COND
from stgfast.guidance import Guidance
from stgfast.integrations.open_sora import adapter_for_model
from stgfast.kernels import combine


@contextmanager
def guided(
    model: nn.Module, guidance: Guidance | None = None, *, steps: int, cfg: bool = True, max_rows: Rows = None
) -> Iterator[None]:
    """Guide an Open-Sora model while its sampler runs. Open-Sora's samplers are functions, not diffusers pipelines.

    Args:
        model: the denoiser, `STDiT3` of Open-Sora 1.2 or `MMDiTModel` of Open-Sora 2.0.
        guidance: what guides the clip. Default: the settings for the model.
        steps: the number of steps that the sampler makes.
        cfg: whether the sampler calls the model with the rows of CFG. It combines these with its own scales. To replace
            them, for example for `rescale`, set `Guidance(..., cfg=7.0)`.
        max_rows: as for `accelerate`.

    Raises:
        EngineError: the sampler made another number of steps.

    Example:
        >>> with stgfast.guided(model, steps=30):  # doctest: +SKIP
        ...     latents = scheduler.sample(model, text_encoder, z, prompts, device, additional_args)
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise wrong("steps", steps, "the number of steps of the sampler, 1 or more")
    if guidance is not None and not isinstance(guidance, Guidance):
        raise wrong("guidance", guidance, "a stgfast.Guidance, or None for default settings")
    check_max_rows(max_rows)
    if unwrapped(model) is not model:
        raise SettingsError(
            "model: got one that is compiled as a whole, expected one that is not compiled, or only in blocks"
        )
    sampler = SimpleNamespace(model=model, num_timesteps=steps)
    fitted = adapter_for_model(sampler).on(sampler)
    chosen = fitted.adapter.defaults if guidance is None else guidance
    check_layers(fitted, chosen, default=guidance is None)
    call = {"num_inference_steps": steps, "cfg": cfg}
    check(fitted, chosen, call, max_rows=max_rows)
    run = Run(fitted, chosen, call, Beside(chosen), Execution(max_rows))
    if chosen.inert and max_rows is None:
        yield
        return
    with run.in_place():
        yield
    if run.steps_done != steps:
        raise EngineError(f"denoising steps: got {run.steps_done} calls of the model, expected {steps}")


class Beside(Combining):
    """The strategy for a sampler that combines predictions with scales that only it knows. What guidance adds to the
    conditional prediction is added to all of them. The sampler's weights add up to 1, so it counts once.
    """

    def arranged(self, run: Run, arguments: Arguments, sources: Sequence[str]) -> Arguments:
        """Repeat what is given once for each prompt, as the model itself would do later.

        Rows that are not those of CFG would be taken for them. So the sampler's rows are checked once, at its first
        step.
        """
        samples, expected = arguments[run.adapter.sample], run.adapter.calls(bool(run.call["cfg"]))[0]
        if run.steps_done == 0:
            prompts, left = divmod(len(samples), len(expected))
            if left or not all(torch.equal(samples[:prompts], part) for part in samples.split(prompts)):
                raise EngineError(
                    f"rows of the model: got {len(samples)}, expected the same samples for {', '.join(expected)}; for "
                    f"a sampler without CFG use guided(..., cfg=False)"
                )

        def repeated(name: str, value: Any) -> Any:
            if name not in run.adapter.blocks.rows or not isinstance(value, Tensor) or not value.ndim:
                return value
            return torch.cat([value] * len(sources)) if len(value) * len(sources) == len(samples) else value

        return arguments.changed(repeated)

    def needed(self, step: CombiningStep) -> frozenset[str]:
        """All rows that the sampler combines itself, too."""
        own = () if self.guidance.cfg is not None else step.calls[0]
        return branches_of({*step.weights, *own})

    def combined(self, step: CombiningStep) -> Any:
        (sources,) = step.calls
        if self.guidance.cfg is not None or len(sources) == 1:
            return super().combined(step)
        return step.formed(torch.cat([self._beside(step, source) for source in sources]))

    def _beside(self, step: CombiningStep, source: str) -> Tensor:
        weights = {source: 0.0, COND: 0.0} | step.weights
        weights[COND] -= 1.0
        weights[source] += 1.0
        weights = {name: weight for name, weight in weights.items() if weight != 0.0}
        predictions = [step.predictions[name] for name in weights]
        return combine(predictions, list(weights.values()), dtype=step.predictions[source].dtype)
