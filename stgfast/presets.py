"""Published settings, each with its source, as plain data for `Guidance.from_dict`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Preset(NamedTuple):
    source: str
    settings: Mapping[str, Any]


def _by_sigma(*levels: tuple[float, float]) -> dict[str, Any]:
    return {"by_sigma": levels}


def _along_both_axes(layer: int) -> dict[str, Any]:
    part = {"layers": [layer], "kind": "attention", "scale": 2.0}
    return {"perturbations": [{**part, "axis": axis} for axis in ("spatial", "temporal")]}


def _with_modality(layer: int) -> dict[str, Any]:
    """The same with a modality scale of 3, which the source writes as `1 + w`."""
    isolated = {"layers": range(48), "kind": "isolate", "scale": 2.0}
    return {"perturbations": [{"layers": [layer], "kind": "attention"}, isolated]}


# Layers and scales change with sigma, and CFG is used in the middle only.
LTX_13B = {
    "perturbations": [
        {
            "layers": [22, 35, 39],
            "kind": "attention",
            "scale": _by_sigma((0.996, 0.0), (0.9933, 4.0), (0.985, 0.0)),
        },
        {
            "layers": [28],
            "kind": "attention",
            "scale": _by_sigma((0.9933, 0.0), (0.9767, 4.0), (0.9008, 2.0), (0.618, 1.0)),
        },
    ],
    "cfg": _by_sigma((0.996, 1.0), (0.9933, 6.0), (0.985, 8.0), (0.9767, 6.0), (0.9008, 1.0)),
    "rescale": _by_sigma((0.996, 0.0), (0.985, 0.5), (0.9767, 0.0)),
    "project": "along-uncond",
}

PRESETS = {
    "mochi": Preset("the paper", {"perturbations": [{"layers": [34]}]}),
    "svd": Preset("the paper", _along_both_axes(8)),
    "open-sora": Preset("the paper, for 1.2", _along_both_axes(12)),
    "cogvideox": Preset("the paper's code", {"perturbations": [{"layers": [11]}]}),
    "hunyuan-video": Preset("the paper's code", {"perturbations": [{"layers": [2]}]}),
    "ltx": Preset("the paper's code, for 2B", {"perturbations": [{"layers": [19]}], "rescale": 0.7}),
    "ltx-13b": Preset("the model's own configuration, for 0.9.8 dev", LTX_13B),
    "ltx-2": Preset("the model's own code, for 2.0", _with_modality(29)),
    "ltx-2.3": Preset("the model's own code, for 2.3", _with_modality(28)),
    # Unlike the paper, the authors' code perturbs the unconditional branch here, with the CFG result as base.
    "wan": Preset(
        "the paper's code, for 2.1",
        {"perturbations": [{"layers": [2], "scale": 2.0, "of": "uncond", "base": "guided"}]},
    ),
    "wan-usual": Preset(
        "the paper's formula with its code's layer and scale", {"perturbations": [{"layers": [2], "scale": 2.0}]}
    ),
    # The unconditional branch itself skips a layer, and no branch is added: g = u' + 5 (c - u'), for a CFG scale of 5.
    "wan-slg": Preset(
        "skip-layer guidance as ComfyUI-WanVideoWrapper has it, for CFG 5",
        {"perturbations": [{"layers": [9], "scale": 4.0, "of": "uncond", "base": "cond"}], "cfg": 1.0},
    ),
    "sd3.5-medium": Preset(
        "skip-layer guidance as published with the model",
        {"perturbations": [{"layers": [7, 8, 9], "scale": 2.8}], "start": 0.01, "stop": 0.2},
    ),
    "sdxl": Preset(
        "perturbed-attention guidance, the middle",
        {"perturbations": [{"layers": [4], "kind": "attention", "scale": 3.0}]},
    ),
}
