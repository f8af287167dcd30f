"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Line(NamedTuple):
    """One comparison: the distance of two results, as a fraction of the second, and the distance that rounding
    explains.
    """

    what: str
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget  # NaN is not


@dataclass(frozen=True)
class Verdict:
    """Whether accelerated guidance is right for one pipeline.

    Attributes:
        lines: all comparisons.
        wrong: facts that differ from what was observed, and other errors.
        notes: what was not checked, and why.
        instead: facts that would be right, if exactly one is wrong and was found.
    """

    pipeline: str
    lines: tuple[Line, ...]
    wrong: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    instead: Any = None

    @property
    def ok(self) -> bool:
        return bool(self.lines) and not self.wrong and all(line.ok for line in self.lines)

    @property
    def reason(self) -> str:
        """What is wrong, in one line; "" if nothing is."""
        apart = [f"{line.what}: {line.error:.2g}, rounding explains {line.budget:.2g}" for line in self.failed]
        return "; ".join([*self.wrong, *apart]) or ("" if self.ok else "no step of this call is guided")

    @property
    def failed(self) -> list[Line]:
        return [line for line in self.lines if not line.ok]

    def __str__(self) -> str:
        width = max([len("comparison"), *(len(line.what) for line in self.lines)])
        table = [f"{'comparison':{width}}      error  explained"]
        for line in self.lines:
            table.append(f"{line.what:{width}}  {line.error:9.2g}  {line.budget:9.2g}{'' if line.ok else '  WRONG'}")
        verdict = "equal to the plain method" if self.ok else "NOT equal to the plain method"
        words = [f"{self.pipeline}: accelerated guidance is {verdict}.", "", *(table if self.lines else [])]
        return "\n".join([*words, *(f"Wrong: {each}" for each in self.wrong), *self.notes])
