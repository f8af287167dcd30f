"""Job files in JSONL, CSV, YAML or text: each entry as jobs, or as its error.

Job files come from other people: no line is read without a limit, and an error in one does not stop the others.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from stgfast.errors import SettingsError, flat, wrong
from stgfast.queue.job import (
    EXAMPLE,
    FIELDS,
    MAX_PATH,
    NUMBERS,
    Job,
    check_fields,
    check_number,
    check_text,
    parse_json,
    shown,
)
from stgfast.queue.words import Words

MAX_LINE = 1 << 20  # bytes of one line, and of one entry of a YAML list
MAX_REPEAT = 10_000
VARIABLES = "vars"  # an entry with only this field is not a job


class Line(NamedTuple):
    """A line with jobs; with `repeat`, several from one line."""

    number: int
    jobs: tuple[Job, ...]


class Bad(NamedTuple):
    """A line that is not rendered, and why."""

    number: int
    why: str


def read(path: Path, *, defaults: Mapping[str, Any] | None = None) -> Iterator[Line | Bad]:
    """Read the lines of a job file one by one. Images and word files are relative to it."""
    found = 0
    for number, given, words in entries(path):
        found += 1
        if isinstance(given, str):
            yield Bad(number, given)
        else:
            yield checked(number, given, base=path.parent, defaults=defaults, words=words)
    if not found:
        raise wrong("job file", str(path), "one with a job in it")


def entries(path: Path) -> Iterator[tuple[int, dict[str, Any] | str, Words]]:
    """The entries of a job file as written, or their errors; with the variables that apply."""
    reader = FORMATS.get(path.suffix.lower())
    if reader is None:
        raise wrong("job file", path.name, f"a name that ends in {', '.join(FORMATS)}")
    try:
        file = path.open("rb")
    except OSError as error:
        raise wrong("job file", str(path), f"a file that can be read ({error.strerror})") from None
    words = Words()
    with file:
        for number, given in reader(file):
            if isinstance(given, str) or VARIABLES not in given:
                yield number, given, words
                continue
            try:
                words = words.with_variables(given, path.parent)
            except SettingsError as error:
                yield number, str(error), words


def checked(
    number: int,
    given: Mapping[str, Any],
    *,
    base: Path,
    defaults: Mapping[str, Any] | None = None,
    words: Words | None = None,
) -> Line | Bad:
    """One entry as jobs, or as its error."""
    try:
        return Line(number, tuple(jobs_of(over(defaults or {}, given), base, words)))
    except (SettingsError, TypeError, ValueError) as error:
        return Bad(number, str(error))


def over(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a job over default fields. A recipe sets the number of steps."""
    kept = dict(defaults)
    if given.get("recipe") is not None:
        kept.pop("steps", None)
    return {**kept, **given}


def jobs_of(given: dict[str, Any], base: Path, words: Words | None = None) -> Iterator[Job]:
    """The jobs of one entry. Without `words`, prompts are used as they are."""
    check_fields(given, FIELDS)
    repeat = given.pop("repeat", 1)
    check_number("repeat", repeat, 1, MAX_REPEAT)
    if isinstance(given.get("image"), str):
        given["image"] = str(base.resolve() / _local(given["image"]))
    if isinstance(given.get("loras"), list):
        given["loras"] = [_beside(base, lora) for lora in given["loras"]]
    if isinstance(given.get("recipe"), str):
        given["recipe"] = _recipe(base / _local(given["recipe"], "recipe"))
    if isinstance(given.get("model"), str) and given["model"]:
        check_text("model", given["model"], MAX_PATH)
        beside = base / given["model"]
        given["model"] = str(beside.resolve()) if beside.is_dir() else given["model"]
    first = Job.from_dict(given)
    width = len(str(repeat - 1))
    for index in range(repeat):
        seed = first.seed + index
        changes: dict[str, Any] = {}
        if repeat > 1:
            changes = {"seed": seed, "name": f"{first.name}-{index:0{width}}" if first.name else ""}
        if words is not None:
            changes |= {
                name: chosen
                for name in ("prompt", "negative_prompt")
                if (text := getattr(first, name)) and (chosen := words.chosen(text, f"{seed} {name}")) != text
            }
        yield dataclasses.replace(first, **changes) if changes else first


def _beside(base: Path, lora: object) -> object:
    """A LoRA with its path, relative to the job file."""
    if isinstance(lora, dict) and isinstance(lora.get("path"), str):
        return {**lora, "path": str(base.resolve() / _local(lora["path"], "path of a LoRA"))}
    return lora


def _recipe(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_LINE + 1)
        if len(text) > MAX_LINE:
            raise wrong("recipe", str(path), f"{MAX_LINE} bytes at most")
        return parse_json(text.decode())
    except (OSError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise wrong("recipe", str(path), f"a file written by stgfast tune ({error})") from None


def _local(path: str, what: str = "image") -> str:
    check_text(what, path, MAX_PATH)
    if re.match(r"^[A-Za-z][A-Za-z0-9+.-]+:", path):
        raise wrong(what, path, "a file")
    return path


# Readers: each yields line numbers with an entry, or with an error.
Entry = tuple[int, "dict[str, Any] | str"]


def _lines(file: BinaryIO) -> Iterator[tuple[int, str, str]]:
    """(number, text, error). No line is held in memory beyond its limit."""
    number = 0
    while raw := file.readline(MAX_LINE + 1):
        number += 1
        if len(raw) > MAX_LINE:
            size = len(raw)
            while not raw.endswith(b"\n") and (raw := file.readline(MAX_LINE)):
                size += len(raw)
            yield number, "", f"a line: got {size} bytes, expected {MAX_LINE} at most"
            continue
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8"), ""
        except UnicodeDecodeError as error:
            yield number, "", f"text: got bytes that are not UTF-8 at column {error.start + 1}, expected UTF-8"


def _read_text(file: BinaryIO) -> Iterator[Entry]:
    """One prompt per line. Empty lines and lines that begin with # are ignored."""
    for number, text, why in _lines(file):
        if why:
            yield number, why
        elif text.strip() and not text.startswith("#"):
            yield number, {"prompt": text.strip()}


def _read_jsonl(file: BinaryIO) -> Iterator[Entry]:
    for number, text, why in _lines(file):
        if why:
            yield number, why
        elif text.strip():
            try:
                entry = parse_json(text)
            except ValueError as error:
                yield number, f"a line: got invalid JSON ({error}), expected an object such as {EXAMPLE}"
                continue
            yield number, entry if isinstance(entry, dict) else _no_object(entry)


def _read_csv(file: BinaryIO) -> Iterator[Entry]:
    """A header with names of fields; `guidance` and `pipeline` are JSON; an empty cell is left out."""
    faults: list[tuple[int, str]] = []

    def text() -> Iterator[str]:
        for number, line, why in _lines(file):
            if why:
                faults.append((number, why))
            yield line

    reader = csv.reader(text(), strict=True)  # its cell limit ends an unclosed quote
    header: list[str] | None = None
    while True:
        begun = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            why = f"{error}, begun in line {begun}" if reader.line_num > begun else str(error)
            yield reader.line_num, f"a line: got invalid CSV ({why}), expected cells parted by commas"
            continue
        if faults:
            yield from faults
            faults.clear()
            continue
        if header is None:
            header = [cell.strip() for cell in row]
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice or not set(header) <= FIELDS or not header:
                yield reader.line_num, str(wrong("header", row, f"some of {', '.join(sorted(FIELDS))}, each once"))
                return
        elif len(row) > len(header):
            yield reader.line_num, f"a line: got {len(row)} cells, expected {len(header)} as in the header"
        elif any(cell.strip() for cell in row):
            try:
                cells = zip(header, row, strict=False)  # missing cells at the end of a row are empty
                yield reader.line_num, {name: _cell(name, cell) for name, cell in cells if cell.strip()}
            except ValueError as error:
                yield reader.line_num, str(error)


def _cell(name: str, cell: str) -> Any:
    if name in NUMBERS:
        try:
            return int(cell)
        except ValueError:
            raise wrong(name, shown(cell), "a whole number") from None
    if name in ("guidance", "pipeline", "loras") and cell.lstrip().startswith(("{", "[")):
        try:
            return parse_json(cell)
        except ValueError as error:
            raise SettingsError(f"{name}: got invalid JSON ({error}), expected an object") from None
    return cell


def _read_yaml(file: BinaryIO) -> Iterator[Entry]:
    """Lists of mappings or prompts, one in each document, read entry by entry."""
    import yaml

    BETWEEN = yaml.StreamStartEvent, yaml.DocumentStartEvent, yaml.DocumentEndEvent, yaml.SequenceEndEvent

    class Loader(yaml.SafeLoader):
        """A loader without aliases: a few nested ones can ask for any amount of memory."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event: Any = self.peek_event()  # type: ignore[no-untyped-call]
                raise yaml.composer.ComposerError(None, None, "an alias, expected plain values", event.start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            """Raise for duplicate keys: nobody would see which one applies."""
            made = super().construct_mapping(node, deep=True)
            if len(made) < len(node.value):
                keys = [key.value for key, _ in node.value]
                twice = next((key for key in keys if keys.count(key) > 1), keys[0])
                raise yaml.constructor.ConstructorError(None, None, f"{twice!r} twice", node.start_mark)
            return made

    text = _Bounded(file)
    line = 1
    try:
        loader: Any = Loader(text)
        while not loader.check_event(yaml.StreamEndEvent):
            event = loader.get_event()
            line = event.start_mark.line + 1
            if isinstance(event, yaml.SequenceStartEvent):
                while not loader.check_event(yaml.SequenceEndEvent):
                    line = loader.peek_event().start_mark.line + 1
                    text.allow(MAX_LINE)
                    node = loader.compose_node(None, None)
                    loader.anchors.clear()  # nothing refers to them
                    try:
                        entry = loader.construct_document(node)
                    except (yaml.YAMLError, ValueError, RecursionError) as error:
                        why = f"an entry: got invalid YAML ({flat(error)}), expected plain values"
                        yield line, why
                        continue
                    if isinstance(entry, str):
                        entry = {"prompt": entry}
                    yield line, entry if isinstance(entry, dict) else _no_object(entry)
            elif not isinstance(event, BETWEEN) and (not isinstance(event, yaml.ScalarEvent) or event.value):
                yield line, "the file: got no list, expected one, each entry beginning with `- `; the rest was not read"
                return
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        at = mark.line + 1 if mark else line
        yield at, f"an entry: got invalid YAML ({flat(error)}), expected a list of jobs; the rest was not read"


class _Bounded(io.RawIOBase):
    """A file with a limit on the bytes of one entry."""

    def __init__(self, file: BinaryIO):
        self.file, self.left = file, MAX_LINE

    def allow(self, size: int) -> None:
        self.left = size

    def read(self, size: int = -1) -> bytes:
        got = self.file.read(min(size, 4096) if size > 0 else 4096)
        self.left -= len(got)
        if self.left < 0:
            raise ValueError(f"more than {MAX_LINE} bytes in one entry")
        return got


FORMATS: dict[str, Callable[[BinaryIO], Iterator[Entry]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".txt": _read_text,
}


def _no_object(entry: object) -> str:
    return f"an entry: got {shown(entry)}, expected an object such as {EXAMPLE}"
