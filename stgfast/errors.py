"""The exceptions of this library. Each message names the setting, what was given, and what is expected."""

from __future__ import annotations

from collections.abc import Sequence


class SettingsError(ValueError):
    """A setting is wrong, or does not fit the model."""


class LoadError(SettingsError):
    """A model cannot be loaded: its files are wrong, or a library that they need is missing."""


class UnsupportedPipelineError(ValueError):
    """A pipeline, or this variant of it, is not supported."""


class EngineError(RuntimeError):
    """A model did not behave as its adapter says. The call was stopped."""


class DeviceError(RuntimeError):
    """The device failed: this run can render nothing more."""


def wrong(what: str, got: object, right: str) -> SettingsError:
    """Make the error for a wrong setting. All such messages have this form."""
    return SettingsError(f"{what}: got {got!r}, expected {right}")


def flat(error: BaseException) -> str:
    """The message of an error in one line, to be quoted in another message."""
    return " ".join(str(error).split())[:200]


def one_line(error: BaseException) -> str:
    """The type and the message of an error, to be quoted in another message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def check_names(what: str, names: object) -> None:
    """Raise if a setting is not a tuple of names. A single string is a common mistake."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise wrong(what, names, "a tuple of names")
