"""Install guidance on one pipeline instance, and remove it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from stgfast.announced import Answering
from stgfast.batching.execution import AS_IT_IS, AUTO, Execution
from stgfast.batching.room import Rows
from stgfast.batching.seam import Call, handling
from stgfast.call import check_call, check_forwards, check_layers, check_max_rows, settings_of
from stgfast.combining import Combining
from stgfast.divided import DividedAnswering, DividedCombining
from stgfast.engine import Run, Strategy
from stgfast.errors import wrong
from stgfast.facts import may_be_found, sure
from stgfast.guidance import Guidance
from stgfast.installed import INSTALLED, ORIGINAL, Installed, bound_call, installed_on, original_class
from stgfast.integrations import adapter_for
from stgfast.integrations.spec import Adapter
from stgfast.ranks.wire import ranks_of
from stgfast.recipes import Recipe, taken
from stgfast.solvers import own_solver

Pipe = TypeVar("Pipe")


def accelerate(
    pipe: Pipe,
    guidance: Guidance | None = None,
    *,
    max_rows: Rows = None,
    compile: bool | Mapping[str, Any] = False,
    attention: str | None = None,
    branches: Any = None,
    recipe: Recipe | str | Path | None = None,
    adapter: Adapter | None = None,
    verify: bool | None = None,
) -> Pipe:
    """Guide every call of a diffusers pipeline by Spatiotemporal Skip Guidance, beside classifier-free guidance (CFG).

    The pipeline is changed in place. Its calls take the same arguments as before, and settings of one call such as
    `stg_scale` and `stg_layers`. A second call of `accelerate` replaces the first one; `restore` undoes it.

    Args:
        pipe: a diffusers pipeline. If its class is not known, the facts about it are found and verified at its first
            guided call.
        guidance: what guides the clips. Default: the published settings for the pipeline's model.
        max_rows: the number of samples that a block computes at once. A lower number needs less memory and gives the
            same result. Default: as many as in the pipeline's own calls, or all if the GPU is known to have the memory.
            `"all"` sets no limit.
        compile: compile the model's blocks with `torch.compile`: True, or a dict of its arguments. Steps, scales and
            schedules cause no further compilation.
        attention: `"auto"` computes each attention layer by the kernel that is fastest for its shape.
        branches: a `torch.distributed` group or one-dimensional device mesh. Its processes share the branches of each
            step. All of them must make the same calls with the same seeds, and all get the same clip.
        recipe: a `Recipe` or the path of one. An approximation: fewer steps, another solver, reuse across steps.
        adapter: the facts of a pipeline class that stgfast does not know. They are verified at the first guided call.
        verify: compare the first guided call with the plain method before it runs, and raise `EngineError` if they
            differ. Default: only if `adapter` is given.

    Returns:
        The same pipeline.

    Raises:
        SettingsError: a setting is wrong, or does not fit the model.
        UnsupportedPipelineError: the pipeline, or this variant of it, is not supported.

    Example:
        >>> pipe = stgfast.accelerate(pipe)
        >>> frames = pipe("a red kite over a grey sea").frames
        >>> frames = pipe("a red kite over a grey sea", stg_scale=2.0, stg_layers=[2]).frames
        >>> pipe = stgfast.accelerate(pipe, stgfast.Guidance(stgfast.Perturbation([2], scale=1.5), rescale=0.7))
    """
    original = original_class(type(pipe))
    unknown = adapter is None and may_be_found(pipe, original)
    verified = dict[Any, Adapter]() if verify or unknown or (verify is None and adapter is not None) else None
    if adapter is None and not unknown:
        adapter = adapter_for(pipe, original)
    if adapter is not None:
        if adapter.pipeline not in (cls.__name__ for cls in original.__mro__):
            raise wrong("adapter", adapter.pipeline, f"one for {original.__name__}")
        check_call(original, adapter)
    if guidance is not None and not isinstance(guidance, Guidance):
        raise wrong("guidance", guidance, "a stgfast.Guidance, or None for the paper's settings")
    check_max_rows(max_rows)
    if not isinstance(compile, bool | Mapping):
        raise wrong("compile", compile, "True, False, or arguments of torch.compile such as {'dynamic': True}")
    if attention not in (None, AUTO):
        raise wrong("attention", attention, f"{AUTO!r}, or None for the model's own")
    if attention is not None and compile is not False:
        raise wrong(
            "attention and compile",
            (attention, compile),
            "only one of them: attention of compiled blocks cannot be replaced",
        )
    compilation = None if compile is False else {} if compile is True else dict(compile)
    execution = Execution(max_rows, compilation, attention, None if branches is None else ranks_of(branches))
    installed = Installed(adapter, guidance, execution, taken(recipe), original, verified, unknown)
    if adapter is not None:
        fitted = adapter.on(pipe)
        check_layers(fitted, installed.guidance(pipe), default=guidance is None)
        check_forwards(fitted)
    before: Installed | None = pipe.__dict__.get(INSTALLED)
    if before is not None and before.recipe is not None:
        own_solver(pipe)
    if installed.recipe is not None:
        if adapter is None:
            raise wrong("recipe", "one for a pipeline that has no adapter", "an adapter, or a pipeline of the table")
        installed.recipe.applied(installed.guidance(pipe))  # raises if they do not fit
        installed.recipe.put_on(pipe, adapter)
    pipe.__dict__[INSTALLED] = installed
    pipe.__class__ = _guided_class(original)
    return pipe


def restore(pipe: Pipe) -> Pipe:
    """Undo `accelerate` and `solver`: leave a pipeline as it was before them.

    Args:
        pipe: any pipeline. One that was not changed stays as it is.

    Returns:
        The same pipeline.

    Example:
        >>> pipe = stgfast.restore(stgfast.accelerate(pipe))
    """
    own_solver(pipe)
    installed: Installed | None = pipe.__dict__.pop(INSTALLED, None)
    if installed is not None:
        pipe.__class__ = installed.original
    return pipe


def _guided_class(original: Any) -> Any:
    """Make a class for one pipeline: the pipeline's own class with a guided `__call__`.

    Each pipeline gets a class of its own, so that a library which replaces `type(pipe).__call__` affects this pipeline
    only.
    """
    settings = settings_of(original)

    def __new__(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # `type(pipe)(...)`, `from_pretrained` and `from_pipe` make pipelines without guidance.
        return original(*args, **kwargs) if cls is guided else object.__new__(cls)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if INSTALLED not in vars(self):
            return original.__call__(self, *args, **kwargs)
        given = {name: kwargs.pop(name) for name in settings if name in kwargs}
        return guided_call(self, original.__call__, args, kwargs, given)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        reduced = original.__reduce_ex__(self, protocol)
        return (_remade, (original,), *reduced[2:]) if type(self) is guided else reduced

    functools.update_wrapper(__call__, original.__call__)
    del __call__.__wrapped__  # type: ignore[attr-defined]  # which is not what this pipeline does
    signature = inspect.signature(original.__call__)
    extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in settings]
    parameters = sorted([*signature.parameters.values(), *extra], key=lambda parameter: parameter.kind)
    __call__.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    body = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {"__new__": __new__, "__call__": __call__, "__reduce_ex__": __reduce_ex__, ORIGINAL: original}
    guided = type(original.__name__, (original,), body)
    return guided


def _remade(original: Any) -> Any:
    """Make an accelerated pipeline without its state, for `pickle` and `copy`."""
    pipe = original.__new__(original)
    pipe.__class__ = _guided_class(original)
    return pipe


def guided_call(pipe: Any, original: Call, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]) -> Any:
    """Run one call of an accelerated pipeline."""
    ranks = installed_on(pipe).execution.ranks
    with nullcontext() if ranks is None else ranks.together():
        return _guided_call(pipe, original, args, kwargs, given)


def _guided_call(
    pipe: Any, original: Call, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]
) -> Any:
    installed = installed_on(pipe)
    bound = bound_call(installed, inspect.signature(original).bind, pipe, *args, **kwargs)
    call = bound.arguments
    known = sure(pipe, installed, call, given)
    if known is None:
        return original(pipe, *args, **kwargs)
    installed, fitted, guidance = known
    announced = installed.adapter.announced if installed.adapter.announces(pipe) else None
    if guidance.inert and installed.execution == AS_IT_IS and announced is None:
        return original(pipe, *args, **kwargs)
    callback = call.get("callback_on_step_end")
    if callable(callback) and not hasattr(callback, "tensor_inputs"):
        call["callback_on_step_end"] = _outside(callback)
    divided = installed.execution.ranks is not None
    if announced is None:
        strategy: Strategy = (DividedCombining if divided else Combining)(guidance)
    else:
        strategy = (DividedAnswering if divided else Answering)(announced, guidance)
    run = Run(fitted, guidance, call, strategy, installed.execution)
    return run.whole(functools.partial(original, *bound.args, **bound.kwargs))


def _outside(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a user's callback so that nothing it runs is guided, for example another pipeline on the same denoiser."""

    @functools.wraps(callback)
    def call(*args: Any, **kwargs: Any) -> Any:
        with handling(None):
            return callback(*args, **kwargs)

    return call
