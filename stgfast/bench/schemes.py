"""Guidance without sharing, as in the authors' code: other ways to call a denoiser, each with its combination."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from stgfast.batching.layout import Layout, Unit
from stgfast.guidance import Guidance
from stgfast.integrations.spec import Adapter
from stgfast.kinds import RESIDUAL
from stgfast.perturbation import Perturbation


@dataclass(frozen=True)
class Schemes:
    """Each method takes a denoiser's forward, and returns one that gives guided predictions."""

    pipe: Any
    adapter: Adapter
    layout: Layout
    guidance: Guidance
    prompts: int

    def stacked(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stacked(*args: Any, **kwargs: Any) -> Any:
            parts = self.guidance.perturbations
            rows = [0, 1] + [1] * len(parts)
            with ExitStack() as perturbed:
                for number, part in enumerate(parts):
                    perturbed.enter_context(self._perturbing(part, number + 2, len(rows)))
                stack = self._given(forward, args, kwargs, rows)
                uncond, cond, *others = forward(**stack)[0].chunk(len(rows))
            guided = self._guided(uncond, cond, others)
            return (torch.cat([guided, guided]),)

        return stacked

    def apart(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def apart(*args: Any, **kwargs: Any) -> Any:
            uncond, cond = (self._given(forward, args, kwargs, [row]) for row in (0, 1))
            guided = self._guided(forward(**uncond)[0], forward(**cond)[0], self._perturbed(forward, cond))
            return (torch.cat([guided, guided]),)

        return apart

    def after_both(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        held: list[Any] = []

        def after_both(**kwargs: Any) -> Any:
            made = forward(**kwargs)[0]
            if not held:
                held.extend([kwargs, made])
                return (made,)
            cond, first = held
            held.clear()
            guided = self._guided(made, first.clone(), self._perturbed(forward, cond)).to(made.dtype)
            first.copy_(guided)
            return (guided,)

        return after_both

    def after_one(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def after_one(**kwargs: Any) -> Any:
            cond, perturbed = forward(**kwargs)[0], self._perturbed(forward, kwargs)
            return (self._pushed(cond, cond, perturbed),)

        return after_one

    def _perturbed(self, forward: Callable[..., Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Each perturbed branch in a pass of its own."""
        made = []
        for part in self.guidance.perturbations:
            with self._perturbing(part, 0, 1):
                made.append(forward(**kwargs)[0])
        return made

    def _guided(self, uncond: Tensor, cond: Tensor, perturbed: Sequence[Tensor]) -> Tensor:
        uncond, cond, *perturbed = (branch.float() for branch in (uncond, cond, *perturbed))
        return self._pushed(uncond + self.pipe.guidance_scale * (cond - uncond), cond, perturbed)

    def _pushed(self, guided: Tensor, cond: Tensor, perturbed: Sequence[Tensor]) -> Tensor:
        for part, prediction in zip(self.guidance.perturbations, perturbed, strict=True):
            assert isinstance(part.scale, float)
            guided = guided + part.scale * (cond - prediction)
        return guided

    def _given(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], branches: Sequence[int]
    ) -> dict[str, Any]:
        """The arguments of a denoiser for some of its two branches."""
        given = {**inspect.signature(forward).bind_partial(*args).arguments, **kwargs}
        rows = 2 * self.prompts

        def chosen(name: str, value: Any) -> Any:
            if (
                name not in self.adapter.blocks.rows
                or not isinstance(value, Tensor)
                or not value.ndim
                or len(value) != rows
            ):
                return value
            parts = value.chunk(2)
            return torch.cat([parts[branch] for branch in branches])

        return {name: chosen(name, value) for name, value in given.items()}

    @contextmanager
    def _perturbing(self, part: Perturbation, branch: int, of: int) -> Iterator[None]:
        """Perturb one branch of the stack within the block, after all branches were computed."""
        with ExitStack() as stack:
            for unit in self.layout.units:
                if unit.layer not in part.layers:
                    continue
                for module, perturbed in self._perturbed_modules(unit, part):
                    stack.enter_context(
                        mock.patch.object(module, "forward", _mixed(module.forward, perturbed, branch, of))
                    )
            yield

    def _perturbed_modules(self, unit: Unit, part: Perturbation) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """The modules that change, and their replacements' outputs."""
        if part.kind == RESIDUAL:
            signature = inspect.signature(unit.module.forward)

            def passed(*args: Any, **kwargs: Any) -> Any:
                given = signature.bind(*args, **kwargs).arguments
                return tuple(given[name] for name in unit.state or self.layout.blocks.state)

            yield unit.module, passed
        else:
            for axis, attention in unit.attentions:
                if part.axis in ("", axis):
                    yield attention, functools.partial(self.layout.blocks.identity, attention)


def _mixed(forward: Callable[..., Any], perturbed: Callable[..., Any], branch: int, of: int) -> Callable[..., Any]:
    """A computed stack with one branch replaced."""

    def mixed(*args: Any, **kwargs: Any) -> Any:
        made, others = forward(*args, **kwargs), perturbed(*args, **kwargs)
        if isinstance(made, Tensor):
            return _replaced(made, others[0] if isinstance(others, tuple) else others, branch, of)
        return tuple(_replaced(one, other, branch, of) for one, other in zip(made, others, strict=True))

    return mixed


def _replaced(made: Tensor, other: Tensor, branch: int, of: int) -> Tensor:
    parts = list(made.chunk(of))
    parts[branch] = other.chunk(of)[branch]
    return torch.cat(parts)
