"""One small file for every diffusers family, and the table of them by exact class name."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from stgfast.errors import UnsupportedPipelineError
from stgfast.integrations.allegro import ALLEGRO
from stgfast.integrations.cogvideox import COGVIDEOX, COGVIDEOX_CONTROL, COGVIDEOX_IMAGE, COGVIDEOX_VIDEO
from stgfast.integrations.cosmos import COSMOS, COSMOS2_IMAGE, COSMOS2_VIDEO, COSMOS_VIDEO
from stgfast.integrations.easyanimate import EASYANIMATE, EASYANIMATE_INPAINT
from stgfast.integrations.flux import FLUX
from stgfast.integrations.hunyuan_video import HUNYUAN_SKYREELS_IMAGE, HUNYUAN_VIDEO, HUNYUAN_VIDEO_IMAGE
from stgfast.integrations.hunyuan_video15 import HUNYUAN_VIDEO_15, HUNYUAN_VIDEO_15_IMAGE, HUNYUAN_VIDEO_15_MODULAR
from stgfast.integrations.kandinsky5 import KANDINSKY5, KANDINSKY5_IMAGE, KANDINSKY5_TO_IMAGE
from stgfast.integrations.latte import LATTE
from stgfast.integrations.ltx import LTX, LTX_CONDITION, LTX_IMAGE, LTX_MODULAR
from stgfast.integrations.ltx2 import LTX2, LTX2_CONDITION, LTX2_IMAGE
from stgfast.integrations.mochi import MOCHI
from stgfast.integrations.skyreels_v2 import (
    SKYREELS_V2,
    SKYREELS_V2_FORCED,
    SKYREELS_V2_FORCED_IMAGE,
    SKYREELS_V2_IMAGE,
)
from stgfast.integrations.spec import Adapter
from stgfast.integrations.stable_diffusion_3 import STABLE_DIFFUSION_3
from stgfast.integrations.stable_diffusion_xl import STABLE_DIFFUSION_XL
from stgfast.integrations.stable_video_diffusion import STABLE_VIDEO_DIFFUSION
from stgfast.integrations.wan import WAN, WAN_22_MODULAR, WAN_IMAGE, WAN_MODULAR, WAN_VACE, WAN_VIDEO

ADAPTERS = {
    adapter.pipeline: adapter
    for adapter in (
        STABLE_VIDEO_DIFFUSION,
        LATTE,
        MOCHI,
        LTX2,
        LTX2_IMAGE,
        LTX2_CONDITION,
        LTX,
        LTX_IMAGE,
        LTX_CONDITION,
        LTX_MODULAR,
        ALLEGRO,
        COGVIDEOX,
        COGVIDEOX_IMAGE,
        COGVIDEOX_VIDEO,
        COGVIDEOX_CONTROL,
        EASYANIMATE,
        EASYANIMATE_INPAINT,
        HUNYUAN_VIDEO,
        HUNYUAN_VIDEO_IMAGE,
        HUNYUAN_SKYREELS_IMAGE,
        HUNYUAN_VIDEO_15,
        HUNYUAN_VIDEO_15_IMAGE,
        HUNYUAN_VIDEO_15_MODULAR,
        WAN,
        WAN_IMAGE,
        WAN_VIDEO,
        WAN_VACE,
        WAN_MODULAR,
        WAN_22_MODULAR,
        SKYREELS_V2,
        SKYREELS_V2_IMAGE,
        SKYREELS_V2_FORCED,
        SKYREELS_V2_FORCED_IMAGE,
        COSMOS,
        COSMOS_VIDEO,
        COSMOS2_IMAGE,
        COSMOS2_VIDEO,
        KANDINSKY5,
        KANDINSKY5_IMAGE,
        KANDINSKY5_TO_IMAGE,
        STABLE_DIFFUSION_3,
        STABLE_DIFFUSION_XL,
        FLUX,
    )
}


def adapter_for(pipe: Any, cls: type[Any]) -> Adapter:
    """The adapter of a pipeline of this class, or what is supported instead and what it would take.

    A subclass that leaves `__call__` alone is what it inherits from.
    """
    known = next((parent for parent in cls.__mro__ if parent.__name__ in ADAPTERS), None)
    if known is None:
        near = difflib.get_close_matches(cls.__name__, ADAPTERS, n=3, cutoff=0.0)
        needed = [field.name for field in dataclasses.fields(Adapter) if field.default is field.default_factory]
        raise UnsupportedPipelineError(
            f"pipeline: got {cls.__name__}, expected one of the {len(ADAPTERS)} that are supported (the closest are "
            f"{', '.join(near)}), or its facts in accelerate(pipe, adapter=stgfast.Adapter(...)): "
            f"{', '.join([*needed, 'blocks', 'state', 'attention'])} at least"
        )
    own = next(parent for parent in cls.__mro__ if "__call__" in vars(parent))
    if own is not known and issubclass(own, known):
        raise UnsupportedPipelineError(
            f"pipeline: got {cls.__name__}, a {known.__name__} with a __call__ of its own; where it calls its model as "
            f"{known.__name__} does, say so: from stgfast.integrations import ADAPTERS, "
            f"accelerate(pipe, adapter=ADAPTERS[{known.__name__!r}])"
        )
    adapter = ADAPTERS[known.__name__]
    missing = adapter.unsupported(pipe)
    if missing:
        raise UnsupportedPipelineError(f"{cls.__name__}: {missing} is not supported")
    return adapter
