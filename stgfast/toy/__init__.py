"""A small text-to-video model in the package, trained on videos that a program draws.

It is an `LTXPipeline` of 12 blocks that stock diffusers loads from `FOLDER`. It makes clips of coloured shapes that
move and turn, with 64x64 pixels and 17 frames. `README.md` in this folder says how good it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stgfast.guidance import Guidance
from stgfast.perturbation import Perturbation

FOLDER = Path(__file__).parent / "pipeline"
CALL: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 12, "guidance_scale": 2.0}
GUIDANCE = Guidance(Perturbation([10]))
JOB: dict[str, Any] = {  # the same, as a job for `stgfast render` says it
    **{name: CALL[name] for name in ("height", "width", "num_frames")},
    "steps": CALL["num_inference_steps"],
    "pipeline": {"guidance_scale": CALL["guidance_scale"]},
    "guidance": GUIDANCE.to_dict(),
}
PROMPTS = (
    "a red square moves left over a dark blue background",
    "a yellow star turns clockwise over a striped grey background",
    "a white circle moves down over a checked dark green background",
    "a purple triangle moves right over a striped brown background",
)


def pipeline() -> Any:
    """The stock pipeline, with a tokenizer that warns of unknown words."""
    from diffusers import LTXPipeline

    from stgfast.toy.words import Tokenizer

    pipe: Any = LTXPipeline.from_pretrained(FOLDER, tokenizer=Tokenizer.from_pretrained(FOLDER / "tokenizer"))
    pipe.set_progress_bar_config(disable=True)
    return pipe
