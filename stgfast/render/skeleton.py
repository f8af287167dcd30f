"""A pipeline without weights: its models have their structure and no numbers, so that calls are checked before it
loads.

This takes no memory, and less than a second for the largest models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stgfast.errors import SettingsError
from stgfast.render.loading import read_json

Find = Callable[[str], Path | None]  # a file of the model's folder, such as vae/config.json


def skeleton(kind: type[Any], index: Mapping[str, Any], denoisers: tuple[str, ...], find: Find) -> Any | None:
    """The pipeline of this class, with the models and scheduler in its index; None if they cannot be built from the
    package and the folder.
    """
    parameters = inspect.signature(kind.__init__).parameters
    given = {name: value for name, value in index.items() if name in parameters and not isinstance(value, list)}
    try:
        for name, part in index.items():
            if isinstance(part, list) and name in parameters:
                given[name] = _part(name, part, find)
        if any(given.get(name) is None for name in denoisers[:1]):
            return None
        pipe = kind(**{name: None for name, one in parameters.items() if _needed(name, one)} | given)
    except SettingsError:
        raise
    except Exception:  # the class needs more than its configuration: calls are checked after loading
        return None
    return pipe


def _needed(name: str, parameter: inspect.Parameter) -> bool:
    return name != "self" and parameter.default is parameter.empty and parameter.kind == parameter.POSITIONAL_OR_KEYWORD


def _part(name: str, part: list[Any], find: Find) -> Any:
    import diffusers
    from accelerate import init_empty_weights

    library, named = part[:2]
    cls = getattr(diffusers, str(named), None) if library == "diffusers" else None
    if cls is None:
        return None
    if hasattr(cls, "set_timesteps"):
        path = find(f"{name}/scheduler_config.json")
        return None if path is None else cls.from_config(read_json(path))
    path = find(f"{name}/config.json")
    if path is None or not issubclass(cls, diffusers.ModelMixin):
        return None
    with init_empty_weights():
        return cls.from_config(read_json(path)).eval()
