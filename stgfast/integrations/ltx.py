"""LTX-Video: from text, from an image, and from images and videos at any frame."""

from __future__ import annotations

import functools
from dataclasses import replace

from stgfast.guidance import Guidance, Perturbation
from stgfast.integrations.guiders import guided_by, steps_of_modular_call
from stgfast.integrations.spec import Adapter, steps_of_call

LTX = Adapter(
    pipeline="LTXPipeline",
    protocol="stacked",
    blocks=("transformer_blocks",),
    rows=frozenset(
        {
            "hidden_states",
            "encoder_hidden_states",
            "timestep",
            "encoder_attention_mask",
            "video_coords",
            "temb",
            "image_rotary_emb",
        }
    ),
    float32=True,
    # Of the 2B model, which has 28 blocks; the 13B model has 48, and is guided by schedules of its own.
    defaults=Guidance(Perturbation([19], scale=1.0), rescale=0.7),
)

# A timestep for every token; the frame that is given takes no part in the scheduler's step, but in the rescale.
LTX_IMAGE = replace(LTX, pipeline="LTXImageToVideoPipeline")

LTX_CONDITION = replace(
    LTX,
    pipeline="LTXConditionPipeline",
    float32=False,
    steps_asked=functools.partial(steps_of_call, strength="denoise_strength"),
)
LTX_MODULAR = guided_by(LTX, "LTXModularPipeline", steps_asked=steps_of_modular_call)
