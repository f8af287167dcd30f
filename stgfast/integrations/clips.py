"""The facts about a pipeline that rendering needs, and that guidance does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stgfast.errors import check_names, wrong

EACH, ONE = "each", "one"  # of Clips.images; `stgfast.queue.batches` reads the first


@dataclass(frozen=True, kw_only=True)
class Clips:
    """The facts about a pipeline that rendering needs.

    Args:
        images: how a call for several prompts takes images. `"each"`: a list with one for each prompt. `"one"`: one for
            all prompts. `""`: clips with images are rendered one by one, because in a batch they would differ.
        exact: the components that are loaded in float32, whatever the dtype of the others.
        tiled: the VAE can only decode in tiles.
        negative: a call fails without a negative prompt.
        fps: frames per second of the training data, as a number or a function of the configuration. A call that sets
            its own overrides it.
    """

    images: str = ""
    exact: tuple[str, ...] = ()
    tiled: bool = False
    negative: bool = False
    fps: float | Callable[[Mapping[str, Any]], float] = 24.0

    def __post_init__(self) -> None:
        if self.images not in ("", EACH, ONE):
            raise wrong("images of clips", self.images, f"{EACH!r}, {ONE!r} or ''")
        check_names("exact of clips", self.exact)


DEFAULT = Clips()
