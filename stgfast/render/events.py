"""The events of a run, for its listener."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stgfast.recipes import Recipe

Event = dict[str, Any]
Listener = Callable[[Event], None]


class Events:
    """The events of one run. `note` is for the page about its folder."""

    def __init__(self, listener: Listener | None, recipe: Recipe | None = None):
        self.listener = listener or _nobody
        self.note = "" if recipe is None else f"Approximate, by a recipe: {recipe}."

    def tell(self, event: str, **more: Any) -> None:
        try:
            self.listener({"event": event, **more})
        except BrokenPipeError:  # the reader of the output went away, as `| head` does: the run continues
            self.listener = _nobody
            self.note = f"{self.note} The output of the run has no reader any more; the run continued.".strip()


def _nobody(event: Event) -> None:
    pass
