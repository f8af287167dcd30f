"""Guidance for samplers that are functions and not pipelines: they are given a model, and call it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stgfast.batching.arguments import Arguments, unwrapped
from stgfast.batching.plan import Plan
from stgfast.batching.room import Rows
from stgfast.batching.seam import Call
from stgfast.call import check, check_layers, check_max_rows
from stgfast.engine import GuidedRun
from stgfast.errors import EngineError, SettingsError, wrong
from stgfast.guidance import COND, Guidance
from stgfast.integrations.open_sora import adapter_for_model
from stgfast.kernels import combine


@contextmanager
def guided(
    model: nn.Module, guidance: Guidance | None = None, *, steps: int, cfg: bool = True, max_rows: Rows = None
) -> Iterator[None]:
    """Within the block, calls of this Open-Sora model are guided, by `guidance` or by default settings:

        with stgfast.guided(model, steps=30):
            scheduler.sample(model, text_encoder, z, prompts, device, additional_args)

    The block is one run of a sampler, of `steps` steps. `cfg` says whether it calls the model on the rows of CFG, as
    the samplers of Open-Sora do. They combine these with scales of their own, which stay as they are; to set the scale
    in their place, as a rescale needs it, say `Guidance(..., cfg=7.0)`. `max_rows` is that of `accelerate`.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise wrong("steps", steps, "how many steps the sampler is going to make, 1 or more")
    if guidance is not None and not isinstance(guidance, Guidance):
        raise wrong("guidance", guidance, "a stgfast.Guidance, or None for default settings")
    check_max_rows(max_rows)
    if unwrapped(model) is not model:
        raise SettingsError("model: got one that is compiled as a whole, expected one with its blocks compiled, if any")
    sampler = SimpleNamespace(model=model, num_timesteps=steps)
    adapter = adapter_for_model(sampler)
    chosen = adapter.defaults if guidance is None else guidance
    check_layers(sampler, adapter, chosen, default=guidance is None)
    call = {"num_inference_steps": steps, "cfg": cfg}
    check(sampler, adapter, chosen, call, max_rows=max_rows)
    run = SamplerRun(sampler, adapter, chosen, call=call, max_rows=max_rows)
    if chosen.inert and max_rows is None:
        yield
        return
    with run.in_place():
        yield
    if run.step != steps:
        raise EngineError(f"denoising steps: got {run.step} calls of the model, expected {steps}")


class SamplerRun(GuidedRun):
    """One run of a sampler, which combines predictions with scales that only it knows."""

    def _weighed(self) -> Collection[str]:
        """All rows that the sampler combines itself, too."""
        return self.weights if self.guidance.cfg is not None else {*self.weights, *self.calls[0]}

    def _denoise(self, name: str, plain: Call, arguments: Arguments) -> Any:
        """Rows that are not those of CFG would be taken for them: the sampler is held to it once, at its first step."""
        if self.step == 0:
            sources = self.adapter.calls(bool(self.call["cfg"]))[0]
            samples = arguments[self.adapter.sample]
            prompts, left = divmod(len(samples), len(sources))
            if left or not all(torch.equal(samples[:prompts], part) for part in samples.split(prompts)):
                raise EngineError(
                    f"rows of the model: got {len(samples)}, expected the same samples for {', '.join(sources)}; for a "
                    f"sampler without CFG say guided(..., cfg=False)"
                )
        return super()._denoise(name, plain, arguments)

    def _compute(self, plain: Call, arguments: Arguments, sources: tuple[str, ...], plan: Plan) -> Any:
        """The model itself repeats what is given once for every prompt; here that is done before it."""
        rows = arguments[self.adapter.sample].shape[0]

        def repeated(name: str, value: Any) -> Any:
            if name not in self.adapter.rows or not isinstance(value, Tensor) or not value.ndim:
                return value
            return torch.cat([value] * len(sources)) if len(value) * len(sources) == rows else value

        return super()._compute(plain, arguments.changed(repeated), sources, plan)

    def _combine(self) -> Any:
        """What guidance adds to the conditional prediction is added to all of them: the sampler's weights add up to 1,
        so whatever they are, it comes out once."""
        (sources,) = self.calls
        if self.guidance.cfg is not None or len(sources) == 1:
            return super()._combine()
        return self._formed(torch.cat([self._beside(source) for source in sources]))

    def _beside(self, source: str) -> Tensor:
        weights = {source: 0.0, COND: 0.0} | self.weights
        weights[COND] -= 1.0
        weights[source] += 1.0
        weights = {name: weight for name, weight in weights.items() if weight != 0.0}
        prediction = self.predictions[source]
        return combine([self.predictions[name] for name in weights], list(weights.values()), dtype=prediction.dtype)
