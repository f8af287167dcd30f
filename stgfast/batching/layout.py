"""The structure of a denoiser's stack of blocks: its units, their arguments, and what can be perturbed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from stgfast.batching.arguments import Arguments, unwrapped
from stgfast.batching.rows import take, take_packed
from stgfast.batching.seam import compiled
from stgfast.batching.values import identity_attention
from stgfast.errors import check_names, wrong
from stgfast.kinds import KINDS, Mark, kind_of
from stgfast.perturbation import Perturbation


class Unit(NamedTuple):
    """A module that runs for some of the rows: a block, or part of one.

    Attributes:
        layer: its number in a perturbation; None if it is never perturbed, only shared.
        attentions: its self-attentions, each with its axis; "" if tokens have no separate axes.
        wrapped: it returns a tuple even for one output.
        state: the arguments that it passes on, if they are not those of the layout.
    """

    module: nn.Module
    layer: int | None
    attentions: tuple[tuple[str, nn.Module], ...] = ()
    wrapped: bool = False
    state: tuple[str, ...] = ()

    @property
    def axes(self) -> set[str]:
        return {axis for axis, _ in self.attentions}

    @property
    def processors(self) -> set[str]:
        """The class names of its attentions' processors."""
        return {processor_of(attention) for _, attention in self.attentions}

    @property
    def compiled_around(self) -> list[nn.Module]:
        """The compiled modules in this unit that contain its self-attentions, so that no call of these is seen."""
        attentions = {attention for _, attention in self.attentions}
        inside = [module for module in unwrapped(self.module).modules() if module not in {self.module, *attentions}]
        return [module for module in inside if compiled(module) and not attentions.isdisjoint(module.modules())]


class Grid(NamedTuple):
    """The positions of the tokens from which a self-attention makes queries.

    Attributes:
        size: `size(pipeline's call, denoiser's arguments, block's arguments)`: the (frames, height, width) in one row,
            or in all rows of a sample together.
        last: other tokens, if any, come before these and not after them.
        query: the part of the attention that makes the queries.
    """

    size: Callable[[Mapping[str, Any], Arguments, Arguments], tuple[int, int, int]]
    last: bool = False
    query: str = "to_q"


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The facts about a model's blocks.

    Args:
        rows: the arguments of denoiser, block or attention that have one row for each sample.
        lists: the attributes that hold the blocks, in the order in which they run.
        attention: the attribute of a block that is its self-attention; "" if it has none that can be perturbed.
        units: for blocks that differ from each other, in place of `lists` and `attention`: `units(denoiser)` returns
            what runs, in order.
        state: the arguments that a block passes on, in the order in which it returns them.
        packed: the arguments of a block that hold the tokens of all samples along dimension 1, each with the argument
            that says how many tokens a sample has.
        full: the model uses rows between its blocks: it adds to them, reshapes them or keeps them.
        identity: `identity(attention module, *args, **kwargs)` is the module's call with output = V.
        attend: `attend(attention module, masked, source, *args, **kwargs)` replaces the call of an attention module
            where the model's own is slow. Output row b is computed from input row `source[b]`, and is the identity if
            `masked[b]`.
        attend_on: the device types on which `attend` is used.
        processor: the class of attention processor that `attend` replaces. With another processor `attend` is not used.
        changes: the arguments that ask a block for a kind of perturbation which the model itself has.
        grid: the positions of tokens in a self-attention, for blurred queries; None if they are not known.
        unspread: why diffusers cannot shard this model's tokens over processes, although it offers to; else "".
    """

    rows: frozenset[str]
    lists: tuple[str, ...] = ()
    attention: str = "attn1"
    units: Callable[[nn.Module], Sequence[Unit]] | None = None
    state: tuple[str, ...] = ("hidden_states",)
    packed: Mapping[str, str] = field(default_factory=dict)
    full: bool = False
    identity: Callable[..., Any] = identity_attention
    attend: Callable[..., Any] | None = None
    attend_on: tuple[str, ...] = ("cuda",)
    processor: str = ""
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    grid: Grid | None = None
    unspread: str = ""

    def __post_init__(self) -> None:
        for name in ("lists", "state", "attend_on"):
            check_names(f"{name} of a model's blocks", getattr(self, name))
        for name in ("rows", "packed"):
            if isinstance(getattr(self, name), str):
                raise wrong(f"{name} of a model's blocks", getattr(self, name), "a list of names, not a single name")
        if not self.lists and self.units is None:
            raise wrong("lists of a model's blocks", self.lists, "at least one name, or a function `units`")

    def of(self, denoiser: nn.Module) -> Layout:
        """The blocks of one model; AttributeError if it does not have them."""
        units = self._listed(denoiser) if self.units is None else self.units(denoiser)
        attentions = [module for unit in units for _, module in unit.attentions]
        stock = all(processor_of(module) == self.processor for module in attentions)
        attend = self.attend if stock and not any(compiled(unit.module) for unit in units) else None
        return Layout(denoiser, tuple(units), self, attend)

    def _listed(self, denoiser: nn.Module) -> list[Unit]:
        blocks = [block for path in self.lists for block in denoiser.get_submodule(path).children()]
        if not self.attention:
            return [Unit(block, i) for i, block in enumerate(blocks)]
        return [Unit(block, i, (("", block.get_submodule(self.attention)),)) for i, block in enumerate(blocks)]


class Layout(NamedTuple):
    """The blocks of one denoiser.

    Attributes:
        units: in the order in which the model runs them.
        attend: `attend` of the blocks, if it can replace the attention of this model.
    """

    denoiser: nn.Module
    units: tuple[Unit, ...]
    blocks: Blocks
    attend: Callable[..., Any] | None = None

    @property
    def depth(self) -> int:
        return len(self.units)

    @property
    def layers(self) -> int:
        """The number of layers that can be perturbed."""
        return len({unit.layer for unit in self.units} - {None})

    @property
    def axes(self) -> set[str]:
        return {axis for unit in self.units for axis in unit.axes} - {""}

    def marks(self, part: Perturbation) -> dict[int, Mark]:
        """What a perturbation does, by number of the unit."""
        if part.axis and part.axis not in self.axes:
            raise wrong("axis of a perturbation", part.axis, f"{_either(self.axes)} for this model")
        if not part.how.suits(self):
            suiting = {name for name, kind in KINDS.items() if kind.suits(self)}
            raise wrong("kind of perturbation", part.kind, f"{_either(suiting)} for this model")
        marks = {}
        for number, unit in enumerate(self.units):
            if unit.layer in part.layers and (not part.axis or part.axis in unit.axes):
                mark = part.how.mark(part, unit, self)
                if mark is not None:
                    marks[number] = mark
        return marks

    def inside(self, mark: Mark | None) -> bool:
        """Whether a mark changes the attention inside a block, rather than an argument of the block."""
        return mark is not None and kind_of(mark).inside and not kind_of(mark).changes(self)

    def some(self, arguments: Arguments, where: list[slice], rows: int) -> Arguments:
        """Some of the rows of a call with `rows` rows, of a unit or of its attention."""
        return arguments.changed(lambda name, value: self.taken(arguments, name, value, where, rows))

    def taken(self, arguments: Arguments, name: str, value: Any, where: list[slice], rows: int) -> Any:
        """Some of the rows of one argument."""
        if name in self.blocks.packed:
            return take_packed(value, arguments[self.blocks.packed[name]], where, rows, name)
        return take(value, where, rows, name) if name in self.blocks.rows else value


def processor_of(attention: nn.Module) -> str:
    """The class name of an attention's processor."""
    return type(getattr(attention, "processor", None)).__name__


def _either(axes: set[str]) -> str:
    return " or ".join(sorted(axes)) if axes else "none"
