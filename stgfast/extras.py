"""The packages that parts of stgfast need beside its core, and a message if one is missing."""

from __future__ import annotations

import importlib.util

from stgfast.errors import SettingsError

RENDER = ("av", "yaml", "PIL", "tqdm", "accelerate", "ftfy", "sentencepiece", "google.protobuf")
EXTRAS = {  # as in pyproject.toml, by import name
    "render": RENDER,
    "toy": RENDER,
    "ray": (*RENDER, "ray"),
    "serve": (*RENDER, "starlette", "uvicorn"),
}


class MissingError(SettingsError):
    """A package that this part needs is not installed."""


def require(extra: str) -> None:
    """Raise if a package of an extra is missing."""
    missing = [name for name in EXTRAS[extra] if not _there(name)]
    if missing:
        raise MissingError(f"{', '.join(missing)}: not installed; run pip install 'stgfast[{extra}]'")


def _there(name: str) -> bool:
    parent = name.rpartition(".")[0]
    return (not parent or _there(parent)) and importlib.util.find_spec(name) is not None
