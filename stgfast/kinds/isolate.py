"""No attention between video and audio, for models that have both and have an argument for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stgfast.kinds import ISOLATE, Kind, register

if TYPE_CHECKING:
    from stgfast.batching.layout import Layout


class Isolate(Kind):
    name = ISOLATE

    def suits(self, layout: Layout) -> bool:
        return bool(self.changes(layout))


register(Isolate())
