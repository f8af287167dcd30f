"""Spatiotemporal Skip Guidance for diffusers video pipelines, without computing anything twice.

`accelerate` guides a pipeline, `restore` undoes it. `Guidance` and `Perturbation` are the settings, `explain` says what
a call would compute, and `verify` compares it with the plain method. `render`, `evaluate` and `tune` make many clips,
measure them, and find cheaper recipes.

Example:
    >>> pipe = stgfast.accelerate(pipe)
    >>> video = pipe("a prompt").frames
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from stgfast.version import __version__

if TYPE_CHECKING:
    from stgfast.batching.layout import Blocks
    from stgfast.errors import EngineError, SettingsError, UnsupportedPipelineError
    from stgfast.evaluate.run import evaluate
    from stgfast.explain import explain
    from stgfast.guidance import Guidance
    from stgfast.guided import guided
    from stgfast.install import accelerate, restore
    from stgfast.integrations.clips import Clips
    from stgfast.integrations.spec import Adapter, Announced
    from stgfast.perturbation import Perturbation
    from stgfast.recipes import Recipe
    from stgfast.render.run import render
    from stgfast.restart import restart
    from stgfast.schedules import BySigma
    from stgfast.solvers import solver
    from stgfast.tune.run import tune
    from stgfast.verify.run import verify

# The module of each name. Names are imported on first use: settings need no torch.
_HOME = {
    "batching.layout": ("Blocks",),
    "errors": ("EngineError", "SettingsError", "UnsupportedPipelineError"),
    "evaluate.run": ("evaluate",),
    "explain": ("explain",),
    "guidance": ("Guidance",),
    "guided": ("guided",),
    "install": ("accelerate", "restore"),
    "integrations.clips": ("Clips",),
    "integrations.spec": ("Adapter", "Announced"),
    "perturbation": ("Perturbation",),
    "recipes": ("Recipe",),
    "render.run": ("render",),
    "restart": ("restart",),
    "schedules": ("BySigma",),
    "solvers": ("solver",),
    "tune.run": ("tune",),
    "verify.run": ("verify",),
}
_MODULES = {name: f"{__name__}.{module}" for module, names in _HOME.items() for name in names}

__all__ = [
    "Adapter",
    "Announced",
    "Blocks",
    "BySigma",
    "Clips",
    "EngineError",
    "Guidance",
    "Perturbation",
    "Recipe",
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
    "solver",
    "tune",
    "verify",
]


class _Package(ModuleType):
    """Make `stgfast.explain` the function and not the module of that name, whichever is imported first."""

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(_MODULES[name]), name)
        super().__setattr__(name, found)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
