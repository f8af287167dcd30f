"""One step in which each rank computes some predictions, and receives the others."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stgfast.batching.rows import join
from stgfast.ranks.division import Division
from stgfast.ranks.wire import Ranks


class Shared:
    """The predictions of a step. Each is a tuple of tensors with one row for each prompt."""

    def __init__(self, ranks: Ranks, division: Division, prompts: int):
        self.ranks, self.division = ranks, division
        self.all_prompts, self.mine = prompts, division.share(ranks.rank)
        each = prompts // division.parts
        self.prompts = slice(division.part(ranks.rank) * each, (division.part(ranks.rank) + 1) * each)
        self.made: dict[str, tuple[Tensor, ...]] = {}  # by this rank, for its prompts

    def whole(self, names: Sequence[str], like: Sequence[Tensor], where: str) -> dict[str, tuple[Tensor, ...]]:
        """All of these for all prompts, bit for bit the same on each rank. `like` are tensors with as many rows."""
        rows = self.prompts.stop - self.prompts.start
        parts: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in names}
        sent: list[tuple[int, Tensor]] = []

        def empty() -> tuple[Tensor, ...]:
            return tuple(one.new_empty(rows, *one.shape[1:]) for one in like)

        def spread() -> None:
            for sender in self.division.senders:
                share, own = self.division.share(sender), sender == self.ranks.rank
                for name in (name for name in names if name in share):
                    tensors = tuple(one.contiguous() for one in (self.made[name] if own else empty()))
                    parts[name].append(tensors)
                    sent.extend((sender, tensor) for tensor in tensors)
            self.ranks.spread(sent)

        self.ranks.meet(f"{where}, which takes {', '.join(names)}", spread)
        return {name: tuple(join(same) for same in zip(*known, strict=True)) for name, known in parts.items()}


def fingerprint(value: Any) -> str:
    """A checksum of what must be the same on each rank: a tensor, bit for bit, or numbers and words by name."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return f"{zlib.crc32(raw.numpy().data):08x}"
    if isinstance(value, Mapping):
        plain = {name: one for name, one in value.items() if _plain(one)}
        return f"{zlib.crc32(repr(sorted(plain.items())).encode()):08x}"
    raise TypeError(f"fingerprint of {type(value).__name__}: expected a tensor or a mapping")


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
