"""What the engine asks of a device. Each operation's specification is in `reference`."""

from stgfast.kernels.reference import combine

__all__ = ["combine"]
