"""Files of a folder for a browser, and from it. A requested name never becomes a path: a clip is looked up in the
folder's list, a picture by its number, an image by its digest.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from pathlib import Path

from stgfast.errors import SettingsError, wrong
from stgfast.queue.job import MAX_IMAGE, read_image, shown
from stgfast.queue.state import DONE, PACKED, State

TYPES = {".mp4": "video/mp4", ".gif": "image/gif", ".png": "image/png", ".npz": "application/octet-stream"}
IMAGE = re.compile(r"[0-9a-f]{64}\.[A-Za-z0-9]{1,12}")


def clip_of(state: State, file: str, frame: int | None = None) -> Path | None:
    """The file of a finished clip, or of one of its pictures; None if the folder does not have it."""
    if not _is_name(file):
        return None
    query = "SELECT 1 FROM jobs WHERE file = ? AND status = ?"
    if state.connection.execute(query, (file, DONE)).fetchone() is None:
        return None
    path = state.out / file
    if frame is not None:
        frames = frames_of(path)
        path = frames[frame] if 0 <= frame < len(frames) else path
    if path.is_symlink() or not path.is_file() or path.suffix.lower() not in TYPES:  # a link may lead anywhere
        return None
    return path


def frames_of(path: Path) -> list[Path]:
    """The pictures of a clip that is a folder of them."""
    return sorted(path.glob("*.png")) if path.is_dir() and not path.is_symlink() else []


def _is_name(file: str) -> bool:
    """Whether it is one part of a path, as names of clips are. Anybody may have written the list."""
    try:
        file.encode()
    except UnicodeEncodeError:
        return False
    return bool(file) and "\0" not in file and file not in (".", "..") and Path(file).name == file


def keep_image(folder: Path, data: bytes) -> str:
    """Store an image that was sent beside those of archives, and return its name."""
    if len(data) > MAX_IMAGE:
        raise wrong("image", f"{len(data)} bytes", f"{MAX_IMAGE} bytes at most")
    name = f"{hashlib.sha256(data).hexdigest()}.image"
    folder.mkdir(exist_ok=True)
    aside = folder / f"{name}.{uuid.uuid4().hex[:8]}"
    try:
        aside.write_bytes(data)
        try:
            read_image(str(aside))
        except SettingsError as error:
            raise SettingsError(str(error).replace(str(aside), f"{len(data)} bytes")) from None
        os.replace(aside, folder / name)
    finally:
        aside.unlink(missing_ok=True)
    return name


def kept_image(state: State, name: object) -> str:
    """The path of an image that was sent."""
    right = "an image that was sent to this page"
    if not isinstance(name, str) or not IMAGE.fullmatch(name):
        raise wrong("image", shown(name), right)
    path = state.home / PACKED / name
    if path.is_symlink() or not path.is_file():
        raise wrong("image", name, right)
    return str(path.resolve())
