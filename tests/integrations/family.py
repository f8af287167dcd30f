"""Facts about a pipeline family that tests need, and the runs of every family.

The files in `families/` have one or more `Family` each; `test_families.py` collects them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from stgfast import Adapter, Guidance, Perturbation
from tests.models import shared
from tests.oracle import Facts, Part, Perturbed, Plainly, plain_method
from tests.precision import computing_in, no_worse, same


@dataclass(frozen=True)
class Family:
    """A tiny random pipeline.

    Attributes:
        build: builds a pipeline with the stock scheduler or another: `build(other=False)`; the weights are always the
            same.
        arguments: a call for a number of prompts, with generators, latents as output: `arguments(prompts, cfg=True)`.
        cfg: the CFG scale of such a call, or a function of pipeline and denoiser; None if it has no CFG.
        cfg_asked: whether the call decides about CFG.
        result: the tensor in the output of the pipeline.
        layers: an early layer and a late one.
        steps: the numbers of steps with the stock scheduler and with the other one.
        shared: whether tests may share its models.
    """

    name: str
    build: Callable[..., Any]
    arguments: Callable[..., dict[str, Any]]
    facts: Facts
    cfg: Any
    result: Callable[[Any], Any] = lambda output: output.frames
    layers: tuple[int, int] = (1, 3)
    steps: tuple[int, int] = (2, 2)
    kinds: tuple[str, ...] = ("residual", "attention")
    cfg_asked: bool = True
    shared: bool = True

    def pipe(self, other: bool = False) -> Any:
        """A pipeline of its own, for tests that do not change its models."""
        return shared(self.build, other=other) if self.shared else self.build(other=other)

    def run(self, pipe: Any, prompts: int = 1, cfg: bool = True, **settings: Any) -> torch.Tensor:
        torch.manual_seed(0)  # some schedulers draw noise that no pipeline gives them a generator for
        with torch.no_grad():
            result = self.result(pipe(**{**self.arguments(prompts, cfg=cfg), **settings}))
        assert isinstance(result, torch.Tensor)
        assert result.isfinite().all()
        return result

    def plain(
        self,
        guidance: Guidance,
        prompts: int = 1,
        cfg: bool = True,
        other: bool = False,
        formula: Callable[..., torch.Tensor] | None = None,
        **settings: Any,
    ) -> torch.Tensor:
        """A clip by the plain method, with another formula than the usual one if given."""
        pipe = self.pipe(other=other)
        steps = settings.get("num_inference_steps", self.steps[other])

        def at(schedule: Any) -> list[float]:
            return list(schedule) if isinstance(schedule, tuple) else [schedule] * steps

        perturbed = [
            Perturbed(p.layers, p.kind, at(p.scale), p.of, p.base, p.axis, p.sigma) for p in guidance.perturbations
        ]
        plainly = Plainly(perturbed, self.cfg if cfg else None, at(guidance.rescale), [True] * steps, formula)
        with plain_method(pipe, plainly, self.facts):
            return self.run(pipe, prompts, cfg, **settings)

    def check(
        self, made: torch.Tensor, guidance: Guidance, prompts: int = 1, cfg: bool = True, **settings: Any
    ) -> None:
        """Compare a clip with the plain method's: equal in float64, and not worse in other dtypes."""
        plain = self.plain(guidance, prompts, cfg, **settings)
        if made.dtype is torch.float64:
            same(made, plain)
        else:
            with computing_in(torch.float64):
                no_worse(made, plain, exact=self.plain(guidance, prompts, cfg, **settings))

    def denoisers(self, pipe: Any) -> list[Any]:
        return [getattr(pipe, name) for name in self.facts.denoisers if getattr(pipe, name, None) is not None]

    @contextmanager
    def counted(self, pipe: Any) -> Iterator[list[int]]:
        """The number of rows that each part runs on, counted by hooks on the real modules."""
        counts: list[list[int]] = []
        handles = []
        for model in self.denoisers(pipe):
            for part in self.facts.parts(model):
                rows: list[int] = []
                counts.append(rows)

                def hook(module: Any, args: Any, kwargs: Any, rows: list[int] = rows) -> None:
                    rows.append(len(args[0] if args else kwargs["hidden_states"]))

                handles.append(part.module.register_forward_pre_hook(hook, with_kwargs=True))
        total: list[int] = []
        yield total
        total += [sum(rows) for rows in counts]
        for handle in handles:
            handle.remove()

    def histories(self, pipe: Any, guidance: Guidance, cfg: bool) -> list[int]:
        """The number of rows for one prompt that each part must run on in one step: one for each different history."""
        counts = []
        for model in self.denoisers(pipe):
            before: dict[tuple[str, Any], tuple[Any, ...]] = {}
            branches = [
                ("cond", None),
                *([("uncond", None)] if cfg else []),
                *((p.of, p) for p in guidance.perturbations),
            ]
            for branch in branches:
                before[branch] = (branch[0],)
            for part in self.facts.parts(model):
                run = set()
                for source, perturbed in branches:
                    done = _done(perturbed, part) if perturbed is not None and part.layer in perturbed.layers else ""
                    before[source, perturbed] = (*before[source, perturbed], done)
                    if done != "residual":
                        run.add(before[source, perturbed])
                counts.append(len(run))
        return counts


def with_blocks(adapter: Adapter, **changes: Any) -> Adapter:
    """The same adapter with other facts about its blocks."""
    return replace(adapter, blocks=replace(adapter.blocks, **changes))


def _done(perturbed: Perturbation, part: Part) -> str:
    """What a perturbation does to a part at a layer."""
    if perturbed.kind == "blur":
        return "" if set(part.attentions) == {"temporal"} else f"blur {perturbed.sigma}"
    if perturbed.axis not in ("", *part.attentions):
        return ""
    whole = perturbed.axis == "" or set(part.attentions) == {perturbed.axis}
    return perturbed.kind if whole else f"{perturbed.kind} {perturbed.axis}"
