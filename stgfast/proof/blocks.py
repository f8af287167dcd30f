"""The facts about a model's blocks, from one observed step."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from stgfast.batching.layout import Blocks
from stgfast.batching.values import identity_attention, identity_of_scores
from stgfast.integrations import turns, unet
from stgfast.kinds import AXES
from stgfast.proof.links import named
from stgfast.proof.look import Block, Look, lists_of, size_of


class UnseenBlocksError(Exception):
    """Facts about a model's blocks could not be found."""


def blocks_of(seen: Look, rows: int) -> tuple[Blocks, int]:
    """The facts about the blocks, and the number of layers. `rows` is the number of rows of the denoiser's call."""
    assert seen.arguments is not None
    denoiser = seen.arguments.module
    if hasattr(denoiser, "down_blocks"):
        return _of_unet(seen, denoiser)
    chain = _chain(seen.blocks)
    paths = list(dict.fromkeys(block.path for block in chain))
    attentions = {seen.attention.get(path, "") for path in paths}
    attention = attentions.pop() if len(attentions) == 1 else ""
    standard = all(seen.identity.get(path, False) for path in paths)
    facts = functools.partial(
        Blocks,
        rows=frozenset(_rows(seen, chain, rows)),
        full=any(None in block.state for block in chain[:-1]),
        identity=identity_attention if standard else identity_of_scores,
    )
    lists = [lists_of(denoiser)[path] for path in paths]
    ran = [block.module for block in chain]
    if ran == [module for listed in lists for module in listed]:
        return facts(lists=tuple(paths), attention=attention, state=_state(chain)), len(ran)
    main = max(paths, key=lambda path: len(lists_of(denoiser)[path]))
    own = [block for block in chain if block.path == main]
    if [block.module for block in own] == lists_of(denoiser)[main] and len(own) > len(chain) / 2:
        # Other blocks run between them, for all rows.
        between = dataclasses.replace(seen, blocks=own, attention={main: seen.attention.get(main, "")})
        found, layers = blocks_of(between, rows)
        return dataclasses.replace(found, full=True), layers
    in_turns = [module for turn in zip(*lists, strict=False) for module in turn]
    if len(paths) == len(AXES) and attention and ran == in_turns:
        axes = sorted(AXES, key=lambda axis: axis in paths[0], reverse=True)
        along = dict(zip(axes, paths, strict=True))
        return facts(units=functools.partial(turns.units, lists=along, attention=attention)), len(lists[0])
    raise UnseenBlocksError(f"the blocks of {', '.join(paths)} run neither one after the other nor in turns")


def _chain(blocks: list[Block]) -> list[Block]:
    """The blocks that ran last, and those before them that pass on to them what they pass on themselves."""
    start = len(blocks) - 1
    passed = set(blocks[start - 1].state) - {None} if start else set()
    turning = len({block.path for block in blocks[-3::2]}) == 1 and blocks[-1].path != blocks[-2].path
    for before, after in reversed(list(pairwise(blocks))):
        if not (before.path == after.path or turning or (passed and set(before.state) == passed)):
            break
        start -= 1
    return blocks[start:]


def _state(chain: Sequence[Block]) -> tuple[str, ...]:
    """The arguments that all blocks pass on."""
    states: set[Any] = {block.state for block in chain if block.state and None not in block.state}
    if len(states) == 1:
        passed: tuple[str, ...] = states.pop()
        return passed
    if len(chain) == 1:
        return ("hidden_states",)
    given = " or ".join(map(str, states)) or "nothing that the next one takes"
    raise UnseenBlocksError(f"its blocks pass on {given}")


def _rows(seen: Look, chain: Sequence[Block], rows: int) -> Iterator[str]:
    """The arguments with as many rows as the samples or the blocks have, or several for each."""
    # A model may make a mask only if there are several samples, which was not the case.
    yield from (name for name in chain[0].given if name.endswith("mask"))
    inner = next(size for size in chain[0].given.values() if size is not None)
    for given in (_sizes(seen), *(block.given for block in chain), seen.given):
        for name, size in given.items():
            masks = name.endswith("mask") and size is not None and size % rows == 0
            if size in (rows, inner) or masks:
                yield name


def _of_unet(seen: Look, denoiser: nn.Module) -> tuple[Blocks, int]:
    """The facts about a UNet: all are built from the same parts."""
    names = ("transformer_blocks", "temporal_transformer_blocks")
    temporal = any(hasattr(part, names[1]) for part in denoiser.modules())
    lists = dict(zip(AXES, names, strict=True)) if temporal else {"": names[0]}
    units = functools.partial(unet.units, lists=lists)
    forwards = [inspect.signature(type(part.module).forward).parameters for part in units(denoiser)]
    parts = {one.name for forward in forwards for one in forward.values() if one.kind is one.POSITIONAL_OR_KEYWORD}
    own = {name for name, size in _sizes(seen).items() if size is not None}
    blocks = Blocks(units=units, rows=frozenset((parts | own) - {"self", "num_frames", "return_dict"}), full=True)
    return blocks, len({part.layer for part in units(denoiser)} - {None})


def _sizes(seen: Look) -> dict[str, Any]:
    assert seen.arguments is not None
    return {name: size_of(value) for name, value in named(seen.arguments).items()}
