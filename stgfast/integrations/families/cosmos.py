"""Cosmos Predict 1, 2 and 2.5: text to world, image or video to world, and text to image.

All of them combine as `c + s (c - u)`. In the form used here, `u + scale (c - u)`, the scale is `1 + s`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from stgfast.batching.layout import Blocks, Grid
from stgfast.guidance import Guidance
from stgfast.integrations.clips import EACH
from stgfast.integrations.scales import live_excess, requested_excess
from stgfast.integrations.spec import Adapter, patches
from stgfast.integrations.steps import CallArguments
from stgfast.perturbation import Perturbation


def schedule(pipe: Any, call: CallArguments) -> Mapping[str, Any]:
    return {"sigmas": np.linspace(0.0, 1.0, call["num_inference_steps"])}


# What the model gives becomes x0 by the same linear step for cond and for uncond, and the frames that are given are put
# in place of it alike in both: so whatever is the same for both stays so.
COSMOS = Adapter(
    pipeline="CosmosTextToWorldPipeline",
    protocol="sequential",
    blocks=Blocks(
        lists=("transformer_blocks",),
        # `padding_mask` is one for all samples: the model repeats it itself.
        rows=frozenset(
            {
                "hidden_states",
                "timestep",
                "encoder_hidden_states",
                "condition_mask",
                "embedded_timestep",
                "temb",
                "extra_pos_emb",
            }
        ),
        grid=Grid(patches),
    ),
    requested=requested_excess,
    live=live_excess,
    # 70% of the depth of the smaller models, which have 28 blocks; the 14B ones have 36. Predict 1 and 2 agree in this.
    defaults=Guidance(Perturbation([19], scale=1.0)),
)
COSMOS_VIDEO = replace(COSMOS, pipeline="CosmosVideoToWorldPipeline", clips=replace(COSMOS.clips, images=EACH))

# These have x0 of the first prediction before they call for the second.
COSMOS2_IMAGE = replace(
    COSMOS,
    pipeline="Cosmos2TextToImagePipeline",
    early=True,
    float32=True,
    schedule=schedule,
    own_solver="its noise levels are not fractions of noise",
)
COSMOS2_VIDEO = replace(
    COSMOS2_IMAGE, pipeline="Cosmos2VideoToWorldPipeline", clips=replace(COSMOS2_IMAGE.clips, images=EACH)
)
COSMOS25 = replace(COSMOS, pipeline="Cosmos2_5_PredictBasePipeline", early=True)
