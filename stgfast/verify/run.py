"""Verify accelerated guidance on one pipeline."""

from __future__ import annotations

import inspect
from typing import Any

from stgfast.batching.execution import AS_IT_IS
from stgfast.call import settings_of
from stgfast.errors import SettingsError
from stgfast.installed import INSTALLED, Installed, bound_call, original_class, settled
from stgfast.integrations import adapter_for
from stgfast.proof.check import Accelerated, check
from stgfast.proof.verdict import Verdict


def verify(pipe: Any, *args: Any, **kwargs: Any) -> Verdict:
    """Compare accelerated guidance with the plain method, for one call of a pipeline.

    The plain method runs each branch alone through the whole model. One step is compared for each denoiser: each
    prediction, what the scheduler receives, and the pipeline's own step at scale 0. How the pipeline combines
    predictions is measured for all steps, without running the model. This takes as long as a few steps.

    Args:
        pipe: a pipeline. If it is not accelerated, the default settings for its model are verified. It is not changed.
        *args, **kwargs: the arguments of the call, including settings such as `stg_scale`.

    Returns:
        A verdict to print, with `ok`, the compared `lines`, and `wrong`: the facts of the adapter that do not hold.

    Example:
        >>> verdict = stgfast.verify(pipe, "a prompt")
        >>> verdict.ok
        True
    """
    original = original_class(type(pipe))
    installed = vars(pipe).get(INSTALLED) or Installed(adapter_for(pipe, original), None, AS_IT_IS, None, original)
    given = {name: kwargs.pop(name) for name in settings_of(original) if name in kwargs}
    call = bound_call(installed, inspect.signature(original.__call__).bind, pipe, *args, **kwargs).arguments
    fitted, guidance = settled(pipe, installed, call, given)
    if guidance.exact.inert and not installed.adapter.announces(pipe):
        raise SettingsError("verify: got a call without guidance, expected one with a scale other than 0")
    return check(Accelerated(fitted, original, guidance, call, installed.execution))
