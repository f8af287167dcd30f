"""Whether accelerated guidance is what it claims to be, on one pipeline as it is."""

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
    """Compare accelerated guidance with the plain method, for this call of this pipeline:

        verdict = stgfast.verify(pipe, "a prompt", num_frames=49)
        print(verdict)
        assert verdict.ok

    The arguments are those of the call, settings such as `stg_scale` among them. The plain method runs every branch
    alone through the whole model. One step of it is compared for every denoiser: each prediction, what the scheduler
    is sent, and the pipeline's own step at scale 0, beside the error that the number type explains. How the pipeline
    combines predictions is measured for all steps, which runs no model. A verdict has `ok`, `lines` and `wrong`: the
    facts of the adapter that are not what was seen.

    It takes the time of a handful of steps. A pipeline that is not accelerated is verified with the default settings
    for its model; nothing is left behind on it.
    """
    original = original_class(type(pipe))
    installed = vars(pipe).get(INSTALLED) or Installed(adapter_for(pipe, original), None, AS_IT_IS, None, original)
    given = {name: kwargs.pop(name) for name in settings_of(original) if name in kwargs}
    call = bound_call(installed, inspect.signature(original.__call__).bind, pipe, *args, **kwargs).arguments
    fitted, guidance = settled(pipe, installed, call, given)
    if guidance.exact.inert and not installed.adapter.announces(pipe):
        raise SettingsError("verify: got a call without guidance, expected one with a scale other than 0")
    return check(Accelerated(fitted, original, guidance, call, installed.execution))
