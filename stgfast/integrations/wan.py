"""Wan 2.1."""

from __future__ import annotations

from typing import Any

from stgfast.guidance import GUIDED, UNCOND, Guidance, Perturbation
from stgfast.integrations.spec import Adapter


def unsupported(pipe: Any) -> str | None:
    if pipe.config.get("boundary_ratio") is not None or getattr(pipe, "transformer_2", None) is not None:
        return "Wan 2.2 with two transformers"
    if pipe.config.get("expand_timesteps"):
        return "Wan 2.2 with a timestep for every token"
    return None


WAN = Adapter(
    pipeline="WanPipeline",
    protocol="sequential",
    blocks=("blocks",),
    rows=frozenset({"hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image", "temb"}),
    unsupported=unsupported,
    # As the paper's code does it for Wan: the unconditional branch is made weak, and held against the CFG result.
    defaults=Guidance(Perturbation([2], scale=2.0, of=UNCOND, base=GUIDED)),
)
