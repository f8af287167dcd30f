"""What the library raises. Every message names the thing, what was got, and what would be right."""

from __future__ import annotations


class SettingsError(ValueError):
    """A setting, or a combination of settings and model, that cannot work."""


class LoadError(SettingsError):
    """A model that cannot be loaded where it was tried: its files are wrong, or a library that they need is missing."""


class UnsupportedPipelineError(ValueError):
    """A pipeline, or a variant of one, that no adapter describes."""


class EngineError(RuntimeError):
    """A model did not behave as its adapter says. Nothing was guessed: the call was stopped."""


class DeviceError(RuntimeError):
    """Nothing further can be rendered by this run."""


def wrong(what: str, got: object, right: str) -> SettingsError:
    """The one form of every message about a setting."""
    return SettingsError(f"{what}: got {got!r}, expected {right}")
