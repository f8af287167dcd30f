"""What diffusers' UNets run, in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from torch import nn

from stgfast.batching.arguments import Arguments
from stgfast.batching.layout import Grid, Unit


def units(unet: nn.Module, lists: Mapping[str, str]) -> Sequence[Unit]:
    """The units: a layer is a whole transformer. Residual blocks and resamplers are only shared.

    `lists` has the name of a transformer's list of blocks for each axis of attention.
    """
    found: list[Unit] = []
    for block in (*_children(unet, "down_blocks"), unet.get_submodule("mid_block"), *_children(unet, "up_blocks")):
        # The middle has one residual block more than transformers, at its end; some blocks have no transformers.
        for resnet, transformer in zip_longest(_children(block, "resnets"), _children(block, "attentions")):
            found.append(Unit(resnet, None))
            if transformer is not None:
                number = len({unit.layer for unit in found} - {None})
                attentions = [
                    (axis, block.get_submodule("attn1"))
                    for axis, name in lists.items()
                    for block in _children(transformer, name)
                ]
                found.append(Unit(transformer, number, tuple(attentions), wrapped=True))
        found += [Unit(part, None) for name in ("downsamplers", "upsamplers") for part in _children(block, name)]
    return found


def size(call: Mapping[str, Any], unet: Arguments, transformer: Arguments) -> tuple[int, int, int]:
    """The size of a transformer's image, which is that of its level. Each frame is a row of its own."""
    height, width = transformer["hidden_states"].shape[2:]
    return 1, height, width


GRID = Grid(size)


def _children(module: nn.Module, name: str) -> Iterable[nn.Module]:
    listed = getattr(module, name, None)
    return () if listed is None else listed.children()
