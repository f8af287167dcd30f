r"""Choices and variables in the prompts of job files.

    {red|green|blue} kite       one of these, chosen by the job's seed; choices may be nested
    $style, ${style}            a variable: text, or a list from which the seed chooses one, the same everywhere
    \{ \} \| \$                 the character itself

Braces without a bar are text. The same seed chooses the same words on each machine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stgfast.errors import SettingsError, wrong
from stgfast.queue.job import MAX_PROMPT, check_text, shown

MAX_WORDS = 10_000  # of a variable
MAX_FILE = 1 << 20  # bytes of a file of words
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
VARIABLE = re.compile(rf"\$(?:({NAME.pattern})|\{{({NAME.pattern})\}})")
ESCAPED = "{}|$"
PLAIN = re.compile(r"[^\\{}|$]+")


@dataclass(frozen=True)
class Words:
    """The variables that apply to an entry of a job file."""

    variables: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def with_variables(self, entry: Mapping[str, Any], base: Path) -> Words:
        """These variables and those of a `vars` entry, whose word files are relative to the job file."""
        (name, given), *more = entry.items()
        if more or name != "vars" or not isinstance(given, Mapping):
            raise wrong("vars", shown(entry), 'an entry of its own, such as {"vars": {"style": "oil on canvas"}}')
        return Words({**self.variables, **{name: _values(name, value, base) for name, value in given.items()}})

    def chosen(self, text: str, key: str) -> str:
        """The text with all choices made. `key` decides them."""
        if PLAIN.fullmatch(text):
            return text
        made = _Choosing(self.variables, key).text(text)
        if not made.strip():
            raise wrong("prompt", text, "one that is never empty, whatever is chosen")
        return made


class _Choosing:
    """One text while its choices are made."""

    def __init__(self, variables: Mapping[str, Sequence[str]], key: str):
        self.variables, self.key = variables, key
        self.choices = 0
        self.within: list[str] = []  # variables
        self.made = 0  # characters

    def text(self, text: str) -> str:
        made, place = self._until(text, 0, "")
        assert place == len(text)
        return "|".join(made)

    def _until(self, text: str, place: int, end: str) -> tuple[list[str], int]:
        """The parts of the text between bars, up to the character that ends them, and the position after it."""
        parts: list[str] = [""]
        while place < len(text):
            character = text[place]
            if character == "\\" and text[place + 1 : place + 2] in tuple(ESCAPED):
                parts[-1] += self._counted(text[place + 1])
                place += 2
            elif character == "{":
                inner, place = self._group(text, place)
                parts[-1] += inner
            elif character == "$" and (found := VARIABLE.match(text, place)):
                parts[-1] += self._variable(found[1] or found[2], found[0])
                place = found.end()
            elif character == end:
                return parts, place + 1
            elif character == "|" and end:
                parts.append("")
                place += 1
            else:
                plain = PLAIN.match(text, place)
                parts[-1] += self._counted(plain[0] if plain else character)
                place = plain.end() if plain else place + 1
        if end:
            raise wrong("prompt", shown(text), r"a } for every {; \{ is the character itself")
        return parts, place

    def _group(self, text: str, place: int) -> tuple[str, int]:
        if len(self.within) + text.count("{", 0, place) > 200:
            raise wrong("prompt", shown(text), "fewer braces")
        number, self.choices = self.choices, self.choices + 1
        parts, place = self._until(text, place + 1, "}")
        if len(parts) == 1:
            return "{" + parts[0] + "}", place
        return parts[_number(f"{self.key} {number}", len(parts))], place

    def _variable(self, name: str, written: str) -> str:
        if name not in self.variables:
            if not self.variables:
                return self._counted(written)
            known = ", ".join(f"${each}" for each in self.variables)
            raise wrong("prompt", written, rf"a variable of the file: {known}; \$ is the character itself")
        if name in self.within:
            raise wrong("vars", f"${name}", "variables that do not refer to themselves")
        values = self.variables[name]
        seed = self.key.split(" ")[0]
        value = values[_number(f"{seed} ${name}", len(values))]
        self.within.append(name)
        parts, _ = self._until(value, 0, "")
        self.within.pop()
        return "|".join(parts)

    def _counted(self, text: str) -> str:
        self.made += len(text)
        if self.made > 4 * MAX_PROMPT:  # nested variables may grow without limit
            raise wrong("prompt", f"more than {4 * MAX_PROMPT} characters", f"{MAX_PROMPT} at most")
        return text


def _number(key: str, count: int) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % count


def _values(name: object, value: object, base: Path) -> list[str]:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise wrong("vars", shown(name), "a name of letters, digits and _")
    if isinstance(value, Mapping):
        (key, file), *more = value.items() or [("", None)]
        if more or key != "file" or not isinstance(file, str):
            raise wrong(f"${name}", shown(dict(value)), 'text, a list of text, or {"file": "words.txt"}')
        value = _read_words(name, file, base)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not 0 < len(values) <= MAX_WORDS:
        raise wrong(f"${name}", shown(value), f"text, or a list of 1 to {MAX_WORDS} of them")
    for each in values:
        check_text(f"${name}", each)
    return values


def _read_words(name: str, file: str, base: Path) -> list[str]:
    right = f"a text file of {MAX_FILE} bytes at most, in the folder of the job file, with words in each line"
    try:
        path = (base / file).resolve()
        if not path.is_relative_to(base.resolve()) or not path.is_file() or path.stat().st_size > MAX_FILE:
            raise wrong(f"${name}", file, right)
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except SettingsError:
        raise
    except (OSError, ValueError) as error:
        raise wrong(f"${name}", file, f"{right} ({type(error).__name__})") from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
