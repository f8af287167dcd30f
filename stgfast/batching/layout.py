"""What a denoiser's stack of blocks is made of: its units, their arguments, and what may be perturbed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from stgfast.batching.arguments import Arguments, unwrapped
from stgfast.batching.seam import compiled
from stgfast.errors import SettingsError, wrong
from stgfast.guidance import ATTENTION, BLUR, RESIDUAL, TEMPORAL, Perturbation

NO_CHANGES: Mapping[str, Mapping[str, Any]] = MappingProxyType({})


class Unit(NamedTuple):
    """A module that is run for some of the rows: a block, or part of one.

    layer       its number in a perturbation; None for what is never perturbed, and only shared
    attentions  its self-attentions, each with its axis, which is "" where tokens are not told apart by axes
    wrapped     it returns a tuple even of one
    state       the arguments that it passes on, where they are not those of the layout
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
    def compiled_around(self) -> list[nn.Module]:
        """The compiled modules inside of this one that have its self-attentions inside, where no call is seen."""
        attentions = {attention for _, attention in self.attentions}
        inside = [module for module in unwrapped(self.module).modules() if module not in {self.module, *attentions}]
        return [module for module in inside if compiled(module) and not attentions.isdisjoint(module.modules())]


class Grid(NamedTuple):
    """Where the tokens lie of which a self-attention makes queries.

    size   `size(pipeline's call, denoiser's arguments, block's arguments)`: how many (frames, height, width) there are
           in a row, or in as many as there are for every sample
    last   other tokens, if any, come before these, and not after them
    query  the part of the attention that makes the queries
    """

    size: Callable[[Mapping[str, Any], Arguments, Arguments], tuple[int, int, int]]
    last: bool = False
    query: str = "to_q"


@dataclass(frozen=True)
class Layout:
    """What a denoiser's stack of blocks is made of.

    units     in the order in which the model runs them
    state     the arguments that a unit passes on, in the order in which it returns them
    rows      the arguments, of units and of their attention, that have a row for every sample
    packed    those that have the tokens of all samples one after another along dimension 1, each with the argument
              that says how many tokens a sample has
    full      the model itself handles rows between its units
    identity  `identity(attention module, *args, **kwargs)`: the module's call with output = V
    attend    `attend(attention module, masked, source, *args, **kwargs)`: the module's call for rows of which some are
              the identity and some have the same input; None where the module's own is made, as it is on a device
              that is none of `attend_on`
    changes   for a kind of perturbation, the arguments with which a unit is called for it
    grid      where tokens lie; None where that is not known, and queries cannot be blurred
    blur      `blur(queries, (frames, height, width), sigma, first=...)`: with tokens from `first` on blurred in space
    """

    denoiser: nn.Module
    units: Sequence[Unit]
    state: tuple[str, ...]
    rows: frozenset[str]
    identity: Callable[..., Any]
    full: bool = False
    attend: Callable[..., Any] | None = None
    attend_on: tuple[str, ...] = ()
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: NO_CHANGES)
    packed: Mapping[str, str] = field(default_factory=dict)
    grid: Grid | None = None
    blur: Callable[..., Tensor] | None = None

    @property
    def depth(self) -> int:
        return len(self.units)

    @property
    def layers(self) -> int:
        """How many layers there are to be perturbed."""
        return len({unit.layer for unit in self.units} - {None})

    @property
    def axes(self) -> set[str]:
        return {axis for unit in self.units for axis in unit.axes} - {""}

    def marks(self, part: Perturbation) -> dict[int, str]:
        """What a perturbation does, by the number of the unit."""
        if part.axis and part.axis not in self.axes:
            raise wrong("axis of a perturbation", part.axis, f"{_either(self.axes)} for this model")
        kinds = {RESIDUAL, ATTENTION, *self.changes, *([] if self.grid is None else [BLUR])}
        if part.kind not in kinds:
            raise wrong("kind of perturbation", part.kind, f"{_either(kinds)} for this model")
        marks: dict[int, str] = {}
        for number, unit in enumerate(self.units):
            if unit.layer not in part.layers or (part.axis and part.axis not in unit.axes):
                continue
            if part.kind == ATTENTION and not unit.attentions and ATTENTION not in self.changes:
                raise wrong(f"kind of perturbation at layer {unit.layer}", part.kind, f"{RESIDUAL!r} for this model")
            adapters = [module for _, module in unit.attentions if "IPAdapter" in processor_of(module)]
            if part.kind == ATTENTION and adapters:
                raise wrong(
                    f"kind of perturbation at layer {unit.layer}, whose attention has an IP-Adapter",
                    part.kind,
                    f"{RESIDUAL!r}, or a layer without",
                )
            if part.kind == BLUR:
                marks |= self._blurred(number, unit, part)
                continue
            whole = not part.axis or unit.axes == {part.axis}
            if not whole and part.kind == RESIDUAL:
                raise wrong("residual perturbation along an axis", part.axis, "none: this model's blocks have all axes")
            marks[number] = part.kind if whole else f"{part.kind} {part.axis}"
        return marks

    def _blurred(self, number: int, unit: Unit, part: Perturbation) -> dict[int, str]:
        """What a blur does to a unit: nothing where all attention is along time."""
        attentions = [attention for axis, attention in unit.attentions if axis != TEMPORAL]
        if any(getattr(attention, "fused_projections", False) for attention in attentions):
            raise SettingsError(
                f"blur of the queries at layer {unit.layer}: got fused projections, expected one of the queries alone; "
                f"call unfuse_qkv_projections()"
            )
        return {number: f"{BLUR} {part.sigma}"} if attentions else {}


def processor_of(attention: nn.Module) -> str:
    """The class of an attention's processor, by name."""
    return type(getattr(attention, "processor", None)).__name__


def _either(axes: set[str]) -> str:
    return " or ".join(sorted(axes)) if axes else "none"
