"""Caches of other libraries, on the model in the package, with the same guidance in separate passes.

The conditional, the unconditional and the perturbed pass run one after another, each with a model and a cache of its
own. (One model would be called by three passes in turn, and caches that count calls can separate only two.) A cache
decides for a whole batch.

`pip install cache-dit==1.5.3`; the others come with diffusers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stgfast import Guidance, toy
from stgfast.formulas import COND, UNCOND
from stgfast.reuse import polynomial
from stgfast.toy import videos

PERTURBED = "perturbed"
Put = Callable[[nn.Module, int], None]  # put a cache on a model that makes so many steps


@contextmanager
def pass_by_pass(pipe: Any, guidance: Guidance, put: Put, steps: int) -> Iterator[Mapping[str, nn.Module]]:
    """Guide one call of this stock pipeline by three passes a step, each with a cache of its own, within the block.
    Yields the models of the passes.
    """
    (part,) = guidance.perturbations
    models = {name: copy.deepcopy(pipe.transformer) for name in (COND, UNCOND, PERTURBED)}
    for layer in part.layers:
        block = models[PERTURBED].transformer_blocks[layer]
        block.forward = functools.wraps(type(block).forward.__get__(block))(_through)
    for model in models.values():
        put(model, steps)
    done = 0

    def stand_in(hidden_states: Tensor, encoder_hidden_states: Tensor, **others: Any) -> tuple[Tensor]:
        nonlocal done
        uncond, cond = (
            {"hidden_states": rows, "encoder_hidden_states": text, **_halves(others, number, len(hidden_states))}
            for number, (rows, text) in enumerate(
                zip(hidden_states.chunk(2), encoder_hidden_states.chunk(2), strict=True)
            )
        )
        given = {COND: cond, UNCOND: uncond, PERTURBED: cond}
        where = {"step_index": done, "sigma": float(pipe.scheduler.sigmas[done]), "num_inference_steps": steps}
        made = {}
        for name, model in models.items():
            with _context(model, name, where):
                made[name] = model(**{**given[name], "return_dict": False})[0]
        done += 1
        scale = pipe.guidance_scale
        guided = made[UNCOND] + scale * (made[COND] - made[UNCOND]) + part.scale * (made[COND] - made[PERTURBED])
        return (torch.cat([guided, guided]),)

    pipe.transformer.forward = stand_in
    try:
        yield models
    finally:
        del pipe.transformer.forward


def _through(hidden_states: Tensor, *others: Any, **named: Any) -> Tensor:
    return hidden_states


def _halves(given: Mapping[str, Any], number: int, rows: int) -> dict[str, Any]:
    """The arguments of one pass of a call that has the rows of two."""
    return {
        name: value.chunk(2)[number] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
        for name, value in given.items()
    }


def _context(model: nn.Module, name: str, where: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Caches of diffusers separate passes and runs by this name."""
    told: AbstractContextManager[None] = model.cache_context(name, **where) if model.is_cache_enabled else nullcontext()
    return told


@contextmanager
def counted(models: Sequence[nn.Module]) -> Iterator[Callable[[], float]]:
    """Block-rows computed within the block, by the arithmetic of the linear layers that ran. Caches skip blocks or
    parts of them; a whole block on one row is 1.
    """
    total = 0.0

    def count(layer: nn.Linear, args: Any, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.in_features

    layers = [part for model in models for part in model.transformer_blocks.modules() if isinstance(part, nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        yield lambda: total / _one(models[0])
    finally:
        for hook in hooks:
            hook.remove()


def _one(model: nn.Module) -> float:
    """The arithmetic of one block on one row: each linear layer processes the tokens of the video or, for keys and
    values, those of the text.
    """
    block = model.transformer_blocks[0]
    text = {block.attn2.to_k, block.attn2.to_v}
    layers = [part for part in block.modules() if isinstance(part, nn.Linear)]
    return float(
        sum(part.in_features * part.out_features * (toy.model.PADDED if part in text else TOKENS) for part in layers)
    )


SIDE, FRAMES = videos.SIZE // 16, (videos.FRAMES - 1) // 4 + 1
TOKENS = FRAMES * SIDE * SIDE


def none(model: nn.Module, steps: int) -> None:
    """No cache."""


def dbcache(model: nn.Module, steps: int, *, threshold: float, taylor: bool) -> None:
    """cache-dit with its recommended settings: one block always computed, four warm-up steps, at most three skipped in
    a row.
    """
    import cache_dit

    cache_dit.enable_cache(
        model,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=4,
            max_continuous_cached_steps=3,
            residual_diff_threshold=threshold,
            enable_separate_cfg=False,
            num_inference_steps=steps,
        ),
        calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None,
    )


def first_block(model: nn.Module, steps: int, *, threshold: float) -> None:
    from diffusers import FirstBlockCacheConfig

    model.enable_cache(FirstBlockCacheConfig(threshold=threshold))


def taylor_seer(model: nn.Module, steps: int, *, every: int, order: int) -> None:
    """Attention and feed-forward of each block; skipped ones are predicted by a Taylor series."""
    from diffusers import TaylorSeerCacheConfig

    layers = [r".*transformer_blocks\.\d+\.(attn1|attn2|ff)"]
    config = TaylorSeerCacheConfig(
        cache_interval=every, max_order=order, taylor_factors_dtype=torch.float32, cache_identifiers=layers
    )
    model.enable_cache(config)


def mag(model: nn.Module, steps: int, *, threshold: float, ratios: Mapping[int, Sequence[float]]) -> None:
    from diffusers import MagCacheConfig

    given = torch.tensor(ratios[steps])
    model.enable_cache(MagCacheConfig(threshold=threshold, num_inference_steps=steps, mag_ratios=given))


def calibrated(model: nn.Module, steps: int) -> None:
    """MagCache while it measures its calibration; the run does not reach its end, where the calibration is cleared."""
    from diffusers import MagCacheConfig

    model.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps + 1))


def ratios_of(model: nn.Module) -> list[float]:
    hook = model.transformer_blocks[0]._diffusers_hook.get_hook("mag_cache_leader_block_hook")
    (state,) = hook.state_manager._state_cache.values()
    return list(state.calibration_ratios)


def sea(model: nn.Module, steps: int, *, threshold: float) -> None:
    from diffusers import SeaCacheConfig

    model.enable_cache(SeaCacheConfig(threshold=threshold, raw_vision_callback=_latents_of))


def _latents_of(module: nn.Module, args: Any, named: Mapping[str, Any]) -> list[Tensor]:
    return list(named["hidden_states"].unflatten(1, (FRAMES, SIDE, SIDE)).movedim(-1, 1).unbind())


def forecast(model: nn.Module, steps: int, *, every: int, order: int) -> None:
    """Caching by a schedule: in skipped steps, the residual of all blocks after the first is extrapolated by a
    polynomial.
    """
    blocks = list(model.transformer_blocks)
    past: list[tuple[int, Tensor]] = []
    now: dict[str, Any] = {"step": 0}

    def first(hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
        now["in"] = type(blocks[0]).forward(blocks[0], hidden_states, *args, **named)
        step = now["step"]
        now["whole"] = step < 3 or (step - 3) % every == every - 1 or step == steps - 1
        return now["in"]

    def later(forward: Callable[..., Tensor], number: int, hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
        made = forward(hidden_states, *args, **named) if now["whole"] else hidden_states
        if number < len(blocks) - 1:
            return made
        if now["whole"]:
            past.append((now["step"], made - now["in"]))
            del past[: -order - 1]
        else:
            weights = polynomial([step for step, _ in past], now["step"])
            made = now["in"] + sum(weight * value for weight, (_, value) in zip(weights, past, strict=True))
        now["step"] += 1
        return made

    blocks[0].forward = first
    for number, block in enumerate(blocks[1:], 1):
        block.forward = functools.partial(later, block.forward, number)


PEERS: dict[str, Put] = {
    "pass after pass": none,
    **{
        f"cache-dit{' with TaylorSeer' if taylor else ''}, {threshold:g}": functools.partial(
            dbcache, threshold=threshold, taylor=taylor
        )
        for taylor in (False, True)
        for threshold in (0.04, 0.08, 0.16)
    },
    **{f"FirstBlockCache, {t:g}": functools.partial(first_block, threshold=t) for t in (0.05, 0.1, 0.2)},
    **{
        f"TaylorSeer, every {every}, order {order}": functools.partial(taylor_seer, every=every, order=order)
        for every, order in ((2, 1), (3, 1), (3, 2), (5, 1))
    },
    **{f"SeaCache, {t:g}": functools.partial(sea, threshold=t) for t in (0.1, 0.25, 0.5)},
    **{
        f"block forecasts, every {every}, order {order}": functools.partial(forecast, every=every, order=order)
        for every, order in ((2, 1), (2, 2), (3, 1))
    },
}
MAG = {f"MagCache, {t:g}": functools.partial(mag, threshold=t) for t in (0.03, 0.06, 0.12)}  # which is calibrated first
