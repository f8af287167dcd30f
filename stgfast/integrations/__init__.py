"""One small file for every diffusers family, and the table of them by exact class name."""

from __future__ import annotations

from typing import Any

from stgfast.errors import UnsupportedPipelineError
from stgfast.integrations.cogvideox import COGVIDEOX
from stgfast.integrations.hunyuan_video import HUNYUAN_VIDEO
from stgfast.integrations.ltx import LTX
from stgfast.integrations.mochi import MOCHI
from stgfast.integrations.spec import Adapter
from stgfast.integrations.wan import WAN

ADAPTERS = {adapter.pipeline: adapter for adapter in (MOCHI, LTX, COGVIDEOX, HUNYUAN_VIDEO, WAN)}


def adapter_for(pipe: Any) -> Adapter:
    """The adapter of a pipeline instance, or one sentence that says what is supported instead."""
    name = type(pipe).__name__
    adapter = ADAPTERS.get(name)
    if adapter is None:
        raise UnsupportedPipelineError(f"pipeline: got {name}, expected one of {', '.join(sorted(ADAPTERS))}")
    missing = adapter.unsupported(pipe)
    if missing:
        raise UnsupportedPipelineError(f"{name}: {missing} is not supported")
    return adapter
