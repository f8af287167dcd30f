"""The plain method for pipelines that use a prediction before their scheduler receives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from stgfast import Guidance
from tests.integrations.family import Family
from tests.oracle import perturbing


@dataclass(frozen=True)
class ByCalls(Family):
    """A family whose denoiser is called for cond, then for uncond, and returns the guided prediction both times.

    The arguments for uncond are known at the call for cond: they differ only in the text, which is among the
    pipeline's arguments. With `known=False` they are not known, and the tensor returned for cond is filled in later.
    """

    known: bool = True

    def plain(
        self, guidance: Guidance, prompts: int = 1, cfg: bool = True, other: bool = False, **settings: Any
    ) -> torch.Tensor:
        pipe = self.pipe(other=other)
        scale = self.cfg if cfg else None
        negative = {"encoder_hidden_states": self.arguments(prompts, cfg=cfg).get("negative_prompt_embeds")}
        forward = pipe.transformer.forward
        calls: list[dict[str, Any]] = []
        held: list[torch.Tensor] = []
        done = []

        def guided(cond: dict[str, Any], uncond: dict[str, Any]) -> torch.Tensor:
            inputs = {"cond": cond, "uncond": uncond}
            plain = {"cond": forward(**cond)[0].double()}
            plain["guided"] = plain["cond"]
            if scale is not None:
                plain["uncond"] = forward(**uncond)[0].double()
                plain["guided"] = plain["uncond"] + scale * (plain["cond"] - plain["uncond"])
            result = plain["guided"]
            for part in guidance.perturbations:
                with perturbing(self.facts, pipe.transformer, part.layers, part.kind, part.axis, part.sigma):
                    perturbed = forward(**inputs[part.of])[0].double()
                strength = part.scale[len(done)] if isinstance(part.scale, tuple) else part.scale
                result = result + strength * (plain[part.base] - perturbed)
            if guidance.rescale:
                pairs = zip(plain["cond"], result, strict=True)
                phi = guidance.rescale
                result = torch.stack([g * (phi * c.std() / g.std() + 1 - phi) for c, g in pairs])
            done.append(True)
            return result.float()

        def called(**given: Any) -> tuple[torch.Tensor]:
            calls.append(given)
            last = scale is None or len(calls) == 2
            if self.known and len(calls) == 1:
                held.append(guided(given, {**given, **negative}))
            elif not self.known and last:
                result = guided(calls[0], given)
                held[:] = [held[0].copy_(result) if held else result]
            elif not self.known:
                held.append(torch.zeros_like(given["hidden_states"]))
            result = held[0].clone() if self.known else held[0]
            if last:
                calls.clear()
                held.clear()
            return (result,)

        with mock.patch.object(pipe.transformer, "forward", called):
            return self.run(pipe, prompts, cfg, **settings)
