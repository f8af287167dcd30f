"""Atomic placing of files: written to a temporary place, then moved whole to their name."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path


def publish(aside: Path, final: Path) -> None:
    """Move a written clip to its place, where nothing may be."""
    if os.path.lexists(final):
        raise FileExistsError(errno.EEXIST, "a file that this run did not write is there", str(final))
    os.rename(aside, final)
    sync(final.parent)


def discard(path: Path) -> None:
    """Remove a temporary file or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_of(path: Path) -> int | None:
    """The bytes of a clip, which may be a folder of pictures; None if it does not exist."""
    try:
        if path.is_dir():
            # Without files of a file manager.
            parts = [inner for inner in path.iterdir() if inner.suffix in (".png", ".wav")]
            return sum(inner.stat().st_size for inner in parts)
        return path.stat().st_size
    except OSError:
        return None


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
