"""Blocks that attend along one axis and blocks that attend along another, in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from stgfast.batching.layout import Unit


def units(transformer: nn.Module, lists: Mapping[str, str], attention: str = "attn1") -> Sequence[Unit]:
    """The units: a layer is one block of each list. `lists` has the name of a list for each axis, in the order in
    which they run.
    """
    blocks = [transformer.get_submodule(name).children() for name in lists.values()]
    return [
        Unit(block, layer, ((axis, block.get_submodule(attention)),))
        for layer, turn in enumerate(zip(*blocks, strict=True))
        for axis, block in zip(lists, turn, strict=True)
    ]
