"""An adapter as Python code."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from stgfast.batching.layout import Blocks
from stgfast.guidance import Guidance
from stgfast.integrations.spec import Adapter
from stgfast.perturbation import Perturbation

PUBLIC = (Adapter, Blocks, Guidance, Perturbation)


def written(adapter: Adapter) -> str:
    """The code that makes an adapter: fields that differ from their default, and the imports that they need."""
    needs: set[str] = set()
    text = _code(adapter, needs, 0)
    return "\n".join(["import stgfast", *sorted(f"import {name}" for name in needs), "", f"adapter = {text}"])


def _code(value: Any, needs: set[str], deep: int) -> str:
    if isinstance(value, PUBLIC):
        return _fields(value, needs, deep)
    if isinstance(value, functools.partial):
        needs.add("functools")
        named = "".join(f", {name}={_code(part, needs, deep)}" for name, part in value.keywords.items())
        return f"functools.partial({_code(value.func, needs, deep)}{named})"
    if isinstance(value, tuple):
        inner = ", ".join(_code(part, needs, deep) for part in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if callable(value):
        needs.add(value.__module__)
        return f"{value.__module__}.{value.__qualname__}"
    return f"frozenset({sorted(value)!r})" if isinstance(value, frozenset) else repr(value)


def _fields(value: Any, needs: set[str], deep: int) -> str:
    """The fields that differ from their default, one in each line if there are many."""
    given = [
        f"{each.name}={_code(getattr(value, each.name), needs, deep + 1)}"
        for each in dataclasses.fields(value)
        if not _is_default(each, getattr(value, each.name))
    ]
    name = f"stgfast.{type(value).__name__}"
    if isinstance(value, Guidance | Perturbation):
        return f"{name}({', '.join(given)})"
    indent = "    " * deep
    lines = "".join(f"{indent}    {each},\n" for each in given)
    return f"{name}(\n{lines}{indent})"


def _is_default(each: dataclasses.Field[Any], value: Any) -> bool:
    if each.default is not dataclasses.MISSING:
        return bool(value is each.default or value == each.default)
    return each.default_factory is not dataclasses.MISSING and value == each.default_factory()
