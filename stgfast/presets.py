"""Settings that were published, each with its source."""

from __future__ import annotations

from typing import NamedTuple

from stgfast.guidance import ATTENTION, AXES, CFG_ZERO, GUIDED, ISOLATE, UNCOND, Guidance, Perturbation
from stgfast.schedules import BySigma


class Preset(NamedTuple):
    guidance: Guidance
    source: str


def _of_ltx2(layer: int) -> Guidance:
    """Its modality scale of 3 is written `1 + w` there."""
    return Guidance([Perturbation([layer], kind=ATTENTION), Perturbation(range(48), kind=ISOLATE, scale=2.0)])


# Other layers and scales as sigma falls, and CFG in the middle alone.
LTX_13B = Guidance(
    [
        Perturbation([22, 35, 39], kind=ATTENTION, scale=BySigma([(0.996, 0.0), (0.9933, 4.0), (0.985, 0.0)])),
        Perturbation([28], kind=ATTENTION, scale=BySigma([(0.9933, 0.0), (0.9767, 4.0), (0.9008, 2.0), (0.618, 1.0)])),
    ],
    cfg=BySigma([(0.996, 1.0), (0.9933, 6.0), (0.985, 8.0), (0.9767, 6.0), (0.9008, 1.0)]),
    rescale=BySigma([(0.996, 0.0), (0.985, 0.5), (0.9767, 0.0)]),
    project=CFG_ZERO,
)

PRESETS = {
    "mochi": Preset(Guidance(Perturbation([34])), "the paper"),
    "svd": Preset(
        Guidance([Perturbation([8], kind=ATTENTION, scale=2.0, axis=axis) for axis in AXES]),
        "the paper",
    ),
    "open-sora": Preset(
        Guidance([Perturbation([12], kind=ATTENTION, scale=2.0, axis=axis) for axis in AXES]),
        "the paper, for 1.2",
    ),
    "cogvideox": Preset(Guidance(Perturbation([11])), "the paper's code"),
    "hunyuan-video": Preset(Guidance(Perturbation([2])), "the paper's code"),
    "ltx": Preset(Guidance(Perturbation([19]), rescale=0.7), "the paper's code, for 2B"),
    "ltx-13b": Preset(LTX_13B, "the model's own configuration, for 0.9.8 dev"),
    "ltx-2": Preset(_of_ltx2(29), "the model's own code, for 2.0"),
    "ltx-2.3": Preset(_of_ltx2(28), "the model's own code, for 2.3"),
    # Unlike the paper, its code makes the unconditional branch weak here, and holds it against the CFG result.
    "wan": Preset(
        Guidance(Perturbation([2], scale=2.0, of=UNCOND, base=GUIDED)),
        "the paper's code, for 2.1",
    ),
    "wan-usual": Preset(Guidance(Perturbation([2], scale=2.0)), "the paper's formula with its code's layer and scale"),
    "sd3.5-medium": Preset(
        Guidance(Perturbation([7, 8, 9], scale=2.8), start=0.01, stop=0.2),
        "skip-layer guidance as published with the model",
    ),
    "sdxl": Preset(Guidance(Perturbation([4], kind=ATTENTION, scale=3.0)), "perturbed-attention guidance, the middle"),
}
