"""The state that `accelerate` stores on a pipeline, and how a call of the pipeline is read."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from stgfast.batching.execution import Execution
from stgfast.call import check, settle
from stgfast.errors import SettingsError
from stgfast.guidance import Guidance
from stgfast.integrations.spec import Adapter, Fitted
from stgfast.integrations.steps import CallArguments
from stgfast.recipes import Recipe

INSTALLED = "_stgfast"  # the only additional attribute of an accelerated pipeline
ORIGINAL = "_stgfast_original"  # the attribute of an accelerated pipeline's class with its former class


@dataclasses.dataclass(frozen=True)
class Installed:
    """The state that `accelerate` stores on a pipeline."""

    known: Adapter | None  # None until its facts are found
    given: Guidance | None
    execution: Execution
    recipe: Recipe | None
    original: Any  # the class of the pipeline before it was accelerated
    # Verified facts, by kind of call; None if they need not be verified.
    verified: dict[Any, Adapter] | None = None
    found: bool = False  # its facts are found, not given
    notices: set[str] = dataclasses.field(default_factory=set)  # notices that were given

    @property
    def adapter(self) -> Adapter:
        if self.known is None:
            raise SettingsError(
                f"{self.original.__name__} is not in the table of pipelines: its facts are found at its first guided "
                f"call; call it first, or give them in accelerate(pipe, adapter=stgfast.Adapter.of(pipe, ...))"
            )
        return self.known

    def guidance(self, pipe: Any) -> Guidance:
        """The guidance that was given, or the default: none if the pipeline asks for perturbed branches itself."""
        return self.given or (Guidance() if self.adapter.announces(pipe) else self.adapter.defaults)


def original_class(cls: type[Any]) -> Any:
    """The class of a pipeline before it was accelerated."""
    return vars(cls).get(ORIGINAL, cls)


def installed_on(pipe: Any) -> Installed:
    installed: Installed | None = getattr(pipe, INSTALLED, None)
    if installed is None:
        raise SettingsError(f"{type(pipe).__name__} is not accelerated: call stgfast.accelerate(pipe) first")
    return installed


def settled(pipe: Any, installed: Installed, call: CallArguments, given: Mapping[str, Any]) -> tuple[Fitted, Guidance]:
    """The pipeline with its current blocks, and the checked guidance of a call."""
    adapter = installed.adapter
    own_rescale = None if adapter.announces(pipe) else adapter.own_rescale(call)
    fitted, guidance = adapter.on(pipe), settle(installed.guidance(pipe), own_rescale, given)
    if installed.recipe is not None:
        installed.recipe.check_steps(call)
        guidance = installed.recipe.applied(guidance)
    check(fitted, guidance, call, max_rows=installed.execution.max_rows)
    return fitted, guidance


def bound_call(installed: Installed, bind: Callable[..., inspect.BoundArguments], *args: Any, **kwargs: Any) -> Any:
    """The arguments of a call by name, with defaults. A recipe's steps override the pipeline's default."""
    bound = bind(*args, **kwargs)
    if installed.recipe is not None:
        installed.recipe.fill_in(bound)
    bound.apply_defaults()
    return bound
