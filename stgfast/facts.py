"""Facts about pipelines that are not in the table: found at a guided call if nobody gave them, and verified if somebody
did. Both run on a copy of the pipeline, before the call itself.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stgfast.batching.arguments import unwrapped
from stgfast.batching.execution import Execution
from stgfast.call import settle
from stgfast.errors import EngineError
from stgfast.guidance import Guidance
from stgfast.installed import INSTALLED, Installed, original_class, settled
from stgfast.integrations import known_class
from stgfast.integrations.spec import Adapter, Fitted
from stgfast.integrations.steps import CallArguments
from stgfast.perturbation import Perturbation
from stgfast.proof.check import Accelerated, check
from stgfast.proof.find import found, proposed
from stgfast.proof.look import lists_of
from stgfast.proof.written import written

log = logging.getLogger("stgfast")


def sure(
    pipe: Any, installed: Installed, call: CallArguments, given: Mapping[str, Any]
) -> tuple[Installed, Fitted, Guidance] | None:
    """What a call runs with, after its facts were found or verified where necessary. None if the facts are not known
    and the call has no guidance.
    """
    if installed.found:
        # The default layers are not known yet.
        asked = settle(installed.given or Guidance(Perturbation([0])), None, given)
        if asked.inert:
            return None
        installed = _find(pipe, installed, call, given, _kinds(asked))
    fitted, guidance = settled(pipe, installed, call, given)
    if installed.verified is not None and not installed.found and not guidance.inert:
        _verify(installed, fitted, guidance, call)
    notice = installed.adapter.notice(call)
    if notice and notice not in installed.notices:
        log.warning("%s: %s", installed.original.__name__, notice)
        installed.notices.add(notice)
    return installed, fitted, guidance


def may_be_found(pipe: Any, cls: type[Any]) -> bool:
    """Whether a pipeline is not in the table, and its facts might be found."""
    if known_class(cls) is not None:
        return False
    models = [part for part in vars(pipe).values() if isinstance(part, nn.Module)]
    return hasattr(getattr(pipe, "scheduler", None), "step") and any(lists_of(unwrapped(model)) for model in models)


def proposal(pipe: Any, *args: Any, **kwargs: Any) -> Adapter:
    """The facts of a pipeline as the first step of this call shows them. They are not verified."""
    original = original_class(type(pipe))
    bound = inspect.signature(original.__call__).bind(pipe, *args, **kwargs)
    bound.apply_defaults()
    return proposed(pipe, original, bound.arguments)


def _find(
    pipe: Any, installed: Installed, call: CallArguments, given: Mapping[str, Any], kinds: frozenset[Any]
) -> Installed:
    """The installation with the facts for calls like this one."""
    assert installed.verified is not None
    kind = _outline(call), kinds
    if kind in installed.verified:
        return dataclasses.replace(installed, known=installed.verified[kind])

    def guided(adapter: Adapter) -> Guidance:
        return settle(installed.given or adapter.defaults, adapter.own_rescale(call), given)

    adapter = found(pipe, installed.original, call, guided, _alone(installed.execution))
    if adapter not in installed.verified.values():
        known = adapter.pipeline, written(adapter)
        log.warning("%s is not in the table: its facts were found and verified.\n%s", *known)
    installed.verified[kind] = adapter
    installed = dataclasses.replace(installed, known=adapter)
    vars(pipe)[INSTALLED] = installed
    return installed


def _verify(installed: Installed, fitted: Fitted, guidance: Guidance, call: CallArguments) -> None:
    """Raise if a guided call does not give what the plain method gives. Similar calls are checked once."""
    assert installed.verified is not None
    kind = _kinds(guidance), installed.adapter.requested(call) is None
    if kind in installed.verified:
        return
    given = Accelerated(fitted, installed.original, guidance, call, _alone(installed.execution))
    verdict = check(given)
    if not verdict.ok:
        raise EngineError(
            f"the facts of {installed.original.__name__} do not give the plain method's result: {verdict.reason}"
        )
    installed.verified[kind] = installed.adapter


def _alone(execution: Execution) -> Execution:
    """The execution on one rank: facts are the same on all ranks, and each finds or verifies them itself."""
    return dataclasses.replace(execution, ranks=None)


def _kinds(guidance: Guidance) -> frozenset[Any]:
    return frozenset((part.kind, part.axis, part.of) for part in guidance.perturbations)


def _outline(value: Any, name: str = "") -> Any:
    """The part of a call's arguments that determines steps and shapes: everything except texts, seeds and pixels."""
    if isinstance(value, Mapping):
        return tuple((key, _outline(part, str(key))) for key, part in value.items() if key != "self")
    parts = value if isinstance(value, list) else [value]
    if any(isinstance(part, torch.Generator) for part in parts):
        return None
    if isinstance(value, list | tuple):
        return type(value).__name__, len(value), tuple({_outline(part, name) for part in value})
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    known = isinstance(value, bool | int | float | str) and "prompt" not in name
    return value if known or value is None else (type(value).__name__, getattr(value, "size", None))
