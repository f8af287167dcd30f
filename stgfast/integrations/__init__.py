"""The table of known pipelines."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from typing import Any

from stgfast.errors import UnsupportedPipelineError
from stgfast.integrations import families
from stgfast.integrations.spec import Adapter

NAMELESS = ""  # facts from which other adapters are made
BLOCKS = "default_blocks_name"  # the attribute by which a modular pipeline names its blocks


def discovered() -> dict[str, Adapter]:
    """The adapters in all files of `families`, by the exact name of the pipeline's class."""
    names = sorted(file.name for file in pkgutil.iter_modules(families.__path__))
    modules = [importlib.import_module(f"{families.__name__}.{name}") for name in names]
    adapters = [each for module in modules for each in vars(module).values() if isinstance(each, Adapter)]
    return {adapter.pipeline: adapter for adapter in adapters if adapter.pipeline != NAMELESS}


ADAPTERS = discovered()


def known_class(cls: type[Any]) -> type[Any] | None:
    """The class in the table that a pipeline of this class inherits its facts from, or None.

    A modular pipeline calls its model as its blocks do: a subclass with other blocks inherits no facts.
    """
    for parent in cls.__mro__:
        if parent.__name__ in ADAPTERS:
            return parent
        if BLOCKS in vars(parent):
            return None
    return None


def adapter_for(pipe: Any, cls: type[Any]) -> Adapter:
    """The adapter for a pipeline of this class; raises if the class is not supported.

    A subclass that does not define `__call__` has the adapter of its parent.
    """
    known = known_class(cls)
    if known is None:
        near = difflib.get_close_matches(cls.__name__, ADAPTERS, n=3, cutoff=0.0)
        needed = [field.name for field in dataclasses.fields(Adapter) if field.default is dataclasses.MISSING]
        raise UnsupportedPipelineError(
            f"pipeline: got {cls.__name__}, expected one of the {len(ADAPTERS)} that are supported (the closest are "
            f"{', '.join(near)}), or an adapter in accelerate(pipe, adapter=stgfast.Adapter(...)) "
            f"with at least {', '.join(needed)}"
        )
    own = next(parent for parent in cls.__mro__ if "__call__" in vars(parent))
    if own is not known and issubclass(own, known):
        raise UnsupportedPipelineError(
            f"pipeline: got {cls.__name__}, a {known.__name__} with a __call__ of its own; if it calls its model as "
            f"{known.__name__} does, use that adapter: from stgfast.integrations import ADAPTERS, "
            f"accelerate(pipe, adapter=ADAPTERS[{known.__name__!r}])"
        )
    adapter = ADAPTERS[known.__name__]
    missing = adapter.unsupported(pipe)
    if missing:
        raise UnsupportedPipelineError(f"{cls.__name__}: {missing} is not supported")
    return adapter
