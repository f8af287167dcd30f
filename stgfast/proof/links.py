"""What a model's blocks pass on to each other, observed while they run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stgfast.batching.arguments import Arguments
from stgfast.batching.layout import Layout, Unit
from stgfast.batching.rows import as_given, as_tuple
from stgfast.batching.seam import Call, Handler
from stgfast.proof.plain import Part


class Links:
    """For each block, which of its arguments its outputs replace.

    If the next block receives an output unchanged, the output has that argument's name. If the model changes it first,
    it has the name of the only argument of its own block with its shape.

    Attributes:
        passed: by block, the name for each output; None if it is not known.
        changed: blocks with an output that the model changes.
        rows: by block, the rows of its first tensor argument.
        given: the arguments of the current or last block.
        arguments: those of the denoiser and of one block of each kind, by name.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        self.passed: dict[nn.Module, tuple[str | None, ...]] = {}
        self.changed: list[nn.Module] = []
        self.rows: dict[nn.Module, int] = {}
        self.given: Arguments | None = None
        self.arguments: list[dict[str, Any]] = []
        self._last: tuple[Arguments, tuple[Any, ...]] | None = None

    def handlers(self) -> Mapping[nn.Module, Handler]:
        return {unit.module: self._seen for unit in self.layout.units}

    def noted(self, plain: Call, arguments: Arguments) -> Any:
        """Record the arguments of a block's call only."""
        self.given = arguments
        return arguments.given_to(plain)

    def unchanged(self, part: Part, arguments: Arguments) -> Any:
        """The output of a block that does nothing."""
        unit = next(unit for unit in self.layout.units if unit.module is part.module)
        seen = self.passed.get(unit.module, ())
        names = seen if seen and None not in seen else self._claimed(unit)
        return as_given([arguments[str(name)] for name in names], wrapped=unit.wrapped)

    @property
    def mistaken(self) -> str:
        """Where the adapter differs, in words."""
        for unit in self.layout.units:
            seen, claimed = self.passed.get(unit.module, ()), self._claimed(unit)
            if unit.layer is not None and seen and None not in seen and seen != claimed:
                names = ", ".join(map(str, seen))
                return f"state: the adapter says {', '.join(claimed)}, {type(unit.module).__name__} returns {names}"
        return ""

    def _claimed(self, unit: Unit) -> tuple[str, ...]:
        return tuple(unit.state or self.layout.blocks.state)

    def _seen(self, plain: Call, arguments: Arguments) -> Any:
        given = named(arguments)
        if type(arguments.module) not in {type(module) for module in self.rows}:
            self.arguments.append(given)
        if self._last is not None:
            self._link(*self._last, given)
        self.rows[arguments.module] = next(len(value) for value in given.values() if isinstance(value, Tensor))
        self.given = arguments
        output = arguments.given_to(plain)
        self._last = arguments, as_tuple(output)
        return output

    def _link(self, arguments: Arguments, outputs: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        own = named(arguments)
        names = [found_in(output, given) for output in outputs]
        if None in names:
            self.changed.append(arguments.module)
        names = [name if name in own else None for name in names]
        for number, output in enumerate(outputs):
            if names[number] is None and isinstance(output, Tensor):
                alike = [name for name, value in own.items() if _shape(value) == output.shape and name not in names]
                names[number] = alike[0] if len(alike) == 1 else None
        self.passed[arguments.module] = tuple(names)


def named(arguments: Arguments) -> dict[str, Any]:
    """Arguments by name."""
    found: dict[str, Any] = {}

    def see(name: str, value: Any) -> Any:
        found[name] = value
        return value

    arguments.changed(see)
    return found


def found_in(output: Any, given: Mapping[str, Any]) -> str | None:
    return next((name for name, value in given.items() if _same(output, value)), None)


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape)


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None
