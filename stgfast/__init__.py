"""Spatiotemporal Skip Guidance for diffusers video pipelines, computing nothing twice."""

from stgfast.errors import EngineError, SettingsError, UnsupportedPipelineError
from stgfast.evaluate.run import evaluate
from stgfast.explain import explain
from stgfast.guidance import Guidance, Perturbation
from stgfast.guided import guided
from stgfast.install import accelerate, restore
from stgfast.integrations.spec import Adapter
from stgfast.render.run import render
from stgfast.restart import restart
from stgfast.schedules import BySigma
from stgfast.version import __version__

__all__ = [
    "Adapter",
    "BySigma",
    "EngineError",
    "Guidance",
    "Perturbation",
    "SettingsError",
    "UnsupportedPipelineError",
    "__version__",
    "accelerate",
    "evaluate",
    "explain",
    "guided",
    "render",
    "restart",
    "restore",
]
