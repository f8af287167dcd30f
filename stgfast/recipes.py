"""Recipes: the solver, the number of steps, and the reuse with which one model makes its clips.

A recipe is an approximation that was found for a model, by `stgfast tune` or by hand, and applies as a whole.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from stgfast import spacing
from stgfast.batching.arguments import unwrapped
from stgfast.errors import SettingsError, wrong
from stgfast.guidance import Guidance
from stgfast.integrations.spec import Adapter
from stgfast.integrations.steps import CallArguments, steps_of_call
from stgfast.schedules import set_frozen
from stgfast.solvers import own_solver, solver
from stgfast.spacing import ORDER, REUSE, Spacing

STEPS = "num_inference_steps"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How clips of one model are made with less work: an approximation, found by `stgfast.tune`.

    Args:
        model: the model that it was found for, as `stgfast.recipes.model_of` describes it.
        steps: the number of steps.
        solver: a name for `stgfast.solver`, or "" for the pipeline's own.
        reuse, reuse_cfg, reuse_blocks, reuse_order: as in `Guidance`.
        found: the measurements of `tune`, as plain data.

    Raises:
        SettingsError: a setting is wrong.

    Example:
        >>> recipe = stgfast.Recipe(model={"pipeline": "WanPipeline"}, steps=30, solver="unipc", reuse_blocks=2)
    """

    model: Mapping[str, Any]
    steps: int
    solver: str = ""
    reuse: Spacing = spacing.EVERY
    reuse_cfg: Spacing = spacing.EVERY
    reuse_blocks: Spacing = spacing.EVERY
    reuse_order: int | None = None
    found: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.model, Mapping) or not isinstance(self.model.get("pipeline"), str):
            raise wrong("model of a recipe", self.model, "a mapping, as stgfast.recipes.model_of makes it")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise wrong("steps of a recipe", self.steps, "how many steps a clip takes, 1 or more")
        if not isinstance(self.solver, str):
            raise wrong("solver of a recipe", self.solver, "a name, or '' for the pipeline's own")
        for name, setting in spacing.settled({name: getattr(self, name) for name in (*REUSE, ORDER)}).items():
            set_frozen(self, name, setting)
        for name in REUSE:
            spacing.check_steps(f"{name} of a recipe", getattr(self, name), self.steps)

    def put_on(self, pipe: Any, adapter: Adapter) -> None:
        """Give a pipeline the recipe's solver, if the recipe is for the pipeline's model."""
        self.check_model(pipe, adapter)
        if self.solver:
            solver(pipe, self.solver)
        else:
            own_solver(pipe)

    def for_job(
        self, adapter: Adapter, steps: int | None, guidance: Guidance | None, call: CallArguments
    ) -> tuple[int, Guidance]:
        """The steps and the guidance of a job, which may set some of them or none."""
        self.check_pipeline(adapter.pipeline)
        steps = self.steps if steps is None else steps
        self.check_steps({**call, STEPS: steps})
        return steps, self.applied(guidance or Guidance())

    def check_pipeline(self, name: str) -> None:
        if self.model["pipeline"] != name:
            self._raise(self.model["pipeline"], name)

    def check_model(self, pipe: Any, adapter: Adapter) -> None:
        """Raise if the recipe is for another model."""
        mine = model_of(pipe, adapter)
        self.check_pipeline(mine["pipeline"])
        for name in sorted({*self.model, *mine} - {"pipeline"}):
            one, other = self.model.get(name), mine.get(name)
            if one is None or other is None:
                self._raise(*(f"one {'without' if part is None else 'with'} {name}" for part in (one, other)))
            else:
                # Another version of diffusers may know more of a model.
                for key in sorted(key for key in one.keys() & other.keys() if one[key] != other[key])[:1]:
                    self._raise(*(f"one whose {name} has {key} {part[key]!r}" for part in (one, other)))

    def _raise(self, got: str, expected: str) -> None:
        raise SettingsError(f"model of the recipe: got {got}, expected {expected}; stgfast tune makes one for a model")

    def applied(self, guidance: Guidance) -> Guidance:
        """A guidance with the recipe's reuse."""
        own = {name: getattr(self, name) for name in (*REUSE, ORDER)}
        made = replace(guidance.exact, **own)
        if guidance.reuses and guidance != made:
            raise SettingsError("reuse of a Guidance and a recipe: got both, expected one of them")
        return made

    def fill_in(self, bound: inspect.BoundArguments) -> None:
        """Set the steps of a call to the recipe's, if the call does not set them."""
        given = bound.arguments if STEPS in bound.signature.parameters else bound.arguments.setdefault("kwargs", {})
        if all(given.get(name) is None for name in ("timesteps", "sigmas", STEPS)):
            given[STEPS] = self.steps

    def check_steps(self, call: CallArguments) -> None:
        """Raise if a call asks for another number of steps."""
        asked = steps_of_call(call if STEPS in call else call["kwargs"])
        if asked != self.steps:
            raise SettingsError(f"steps with a recipe: got {asked}, expected the {self.steps} that it was found for")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, without what is off."""
        mine = {each.name: getattr(self, each.name) for each in fields(self)}
        off: dict[str, Any] = {"solver": "", **dict.fromkeys(REUSE, spacing.EVERY), ORDER: None, "found": {}}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in mine.items()
            if name not in off or value != off[name]
        }

    @classmethod
    def from_dict(cls, data: object) -> Recipe:
        names = [each.name for each in fields(cls)]
        if not isinstance(data, Mapping) or not {"model", "steps"} <= data.keys() <= set(names):
            got = sorted(data) if isinstance(data, Mapping) else data
            raise wrong("recipe", got, f"model and steps, and some of {', '.join(names[2:])}")
        return cls(**data)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise wrong("recipe", str(path), f"a file written by stgfast tune ({error})") from None

    def __str__(self) -> str:
        """The recipe in words."""
        words = [self.solver or "the pipeline's own solver", f"{self.steps} steps"]
        named: dict[str, list[str]] = {}
        for name in REUSE:
            if getattr(self, name) != spacing.EVERY:
                named.setdefault(spacing.in_words(getattr(self, name)), []).append(name)
        words += [f"{' and '.join(names)} {how}" for how, names in named.items()]
        return ", ".join(words if self.reuse_order is None else [*words, f"order {self.reuse_order}"])


def taken(given: Recipe | str | Path | None) -> Recipe | None:
    """A recipe from a `Recipe` or the path of one."""
    if given is None or isinstance(given, Recipe):
        return given
    if isinstance(given, (str, Path)):
        return Recipe.read(given)
    raise wrong("recipe", given, "a stgfast.Recipe, or the path of its file")


def model_of(pipe: Any, adapter: Adapter) -> dict[str, Any]:
    """What distinguishes a pipeline's model from others: its class and the configuration of its denoisers. Weights do
    not count, so a fine-tune is the same model.
    """
    found: dict[str, Any] = {"pipeline": adapter.pipeline}
    for name in adapter.denoisers:
        part = getattr(pipe, name, None)
        if part is not None:
            config = getattr(unwrapped(part), "config", {})
            plain = {key: value for key, value in config.items() if not key.startswith("_")}
            found[name] = json.loads(json.dumps(plain, default=str))
    return found
