"""A job file with everything that its jobs need, as one archive for another machine.

    jobs.jsonl      the jobs, with their words chosen
    files/<digest>  images and LoRAs

An archive may come from anywhere: only the files that its jobs name are read, by digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stgfast.errors import SettingsError, wrong
from stgfast.queue.job import MAX_IMAGE, MAX_LORA, parse_json, shown
from stgfast.queue.readers import MAX_LINE, Bad, Line, checked, read

JOBS = "jobs.jsonl"
MEMBER = re.compile(r"files/[0-9a-f]{64}\.[A-Za-z0-9]{1,12}")
MAX_JOBS = 1 << 30  # bytes of a job file


def pack(jobs: Path, archive: Path) -> tuple[int, int]:
    """Pack jobs and their files into an archive, and return their numbers. A wrong line raises."""
    if not is_archive(archive):
        raise wrong("archive", archive.name, "a name that ends in .zip")
    aside = archive.with_name(f".{archive.name}.{uuid.uuid4().hex[:8]}")
    files: dict[str, str] = {}
    count = 0
    try:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as made:
            with made.open(JOBS, "w", force_zip64=True) as lines:
                for line in read(jobs):
                    if isinstance(line, Bad):
                        raise SettingsError(f"line {line.number}: {line.why}")
                    for job in line.jobs:
                        lines.write(f"{json.dumps(_packed(job.to_dict(), files))}\n".encode())
                        count += 1
            for member, path in files.items():
                made.write(path, member, zipfile.ZIP_STORED)
        os.replace(aside, archive)
    except OSError as error:
        raise wrong("archive", str(archive), f"a file that can be written ({error.strerror})") from None
    finally:
        aside.unlink(missing_ok=True)
    return count, len(files)


def _packed(job: dict[str, Any], files: dict[str, str]) -> dict[str, Any]:
    """A job whose files are members of the archive."""

    def member(path: str, digest: str) -> str:
        name = f"files/{digest}{Path(path).suffix}"
        if not MEMBER.fullmatch(name):
            raise wrong("a file of a job", path, "a name with an ending of letters and digits")
        return files.setdefault(name, path) and name

    if "image" in job:
        job["image"] = member(job["image"], job["image_sha256"])
    if "loras" in job:
        job["loras"] = [{**lora, "path": member(lora["path"], lora["sha256"])} for lora in job["loras"]]
    return job


def is_archive(path: Path) -> bool:
    return path.suffix.lower() == ".zip"


def read_packed(archive: Path, folder: Path, *, defaults: Mapping[str, Any] | None = None) -> Iterator[Line | Bad]:
    """The lines of an archive. Their words were chosen when it was made."""
    found = 0
    for number, given in unpacked(archive, folder):
        found += 1
        if isinstance(given, str):
            yield Bad(number, given)
        else:
            yield checked(number, given, base=folder, defaults=defaults)
    if not found:
        raise wrong("archive", archive.name, "one with a job in it")


def unpacked(archive: Path, folder: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The entries of an archive, with their files extracted into a folder, each once."""
    right = "an archive of stgfast pack"
    try:
        with zipfile.ZipFile(archive) as given:
            if given.getinfo(JOBS).file_size > MAX_JOBS:
                raise wrong("archive", archive.name, f"jobs of {MAX_JOBS} bytes at most")
            with given.open(JOBS) as lines:
                number = 0
                while raw := lines.readline(MAX_LINE + 1):
                    number += 1
                    yield number, _entry(given, raw, folder)
    except SettingsError:
        raise
    except KeyError:
        raise wrong("archive", archive.name, f"{right}: it has no {JOBS}") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise wrong("archive", archive.name, f"{right} ({type(error).__name__})") from None
    except OSError as error:
        raise wrong("archive", str(archive), f"{right} that can be read ({error.strerror or error})") from None


def _entry(given: zipfile.ZipFile, raw: bytes, folder: Path) -> dict[str, Any] | str:
    try:
        entry = parse_json(raw.decode()) if len(raw) <= MAX_LINE else None
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        return "a line: got something that is not a job of an archive"
    try:
        if "image" in entry:
            entry["image"] = _taken(given, entry["image"], folder, MAX_IMAGE)
        if isinstance(entry.get("loras"), list):
            entry["loras"] = [
                {**lora, "path": _taken(given, lora.get("path"), folder, MAX_LORA)} if isinstance(lora, dict) else lora
                for lora in entry["loras"]
            ]
    except SettingsError as error:
        return str(error)
    return entry


def _taken(given: zipfile.ZipFile, member: object, folder: Path, limit: int) -> str:
    """Extract a member into the folder under its digest, after checking the digest."""
    if not isinstance(member, str) or not MEMBER.fullmatch(member):
        raise wrong("a file of the archive", shown(member), "files/ with a digest and an ending")
    try:
        info = given.getinfo(member)
    except KeyError:
        raise wrong("a file of the archive", member, "one that is in it") from None
    if info.file_size > limit:
        raise wrong("a file of the archive", f"{member} of {info.file_size} bytes", f"{limit} bytes at most")
    path = folder / Path(member).name
    if path.is_file() and not path.is_symlink() and path.stat().st_size == info.file_size:
        return str(path.resolve())
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        with given.open(info) as source, aside.open("xb") as file:
            shutil.copyfileobj(source, file)
        with aside.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != path.stem:
            raise wrong("a file of the archive", member, f"one with this digest, and not {digest[:12]}...")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return str(path.resolve())
