"""Latte: blocks that attend over space and blocks that attend over time, in turns."""

from __future__ import annotations

import functools
from typing import Any

from stgfast.batching.layout import Blocks, Grid
from stgfast.guidance import Guidance
from stgfast.integrations.clips import Clips
from stgfast.integrations.scales import live_requested
from stgfast.integrations.spec import Adapter, patches
from stgfast.integrations.steps import CallArguments
from stgfast.integrations.turns import units
from stgfast.kinds import ATTENTION, AXES
from stgfast.perturbation import Perturbation


def unfit(pipe: Any, guidance: Guidance, call: CallArguments) -> str | None:
    if not call["enable_temporal_attentions"] and not guidance.inert:
        return "enable_temporal_attentions=False leaves out half of the blocks; leave it True, or use stg_scale=0"
    return None


LATTE = Adapter(
    pipeline="LattePipeline",
    protocol="stacked",
    clips=Clips(fps=8.0),
    blocks=Blocks(
        units=functools.partial(
            units, lists={"spatial": "transformer_blocks", "temporal": "temporal_transformer_blocks"}
        ),
        rows=frozenset({"hidden_states", "timestep", "encoder_hidden_states"}),
        full=True,  # tokens are turned from space to time and back between blocks
        grid=Grid(functools.partial(patches, dims=(3, 4))),  # every frame is a row of its own
    ),
    learned_sigma=True,
    live=live_requested,
    unfit=unfit,
    # The middle of 28 layers.
    defaults=Guidance([Perturbation([14], kind=ATTENTION, axis=axis) for axis in AXES]),
)
