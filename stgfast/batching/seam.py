"""Replace the call of a module during a guided call, only for the thread that runs it.

`module(...)` uses the instance attribute `_compiled_call_impl` if there is one, which `module.compile()` sets too. A
wrapper in its place is outside everything else that changes a call: compiled code, forward hooks, and the `forward`
that offloading replaces. All of these run when the wrapper calls the original.

Pipelines and threads may share modules. So the wrapper decides nothing itself: it looks up the handler for its module
in the current context, and makes the plain call if there is none. Wrappers are reference-counted: the first user
installs them, the last one removes them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from stgfast.batching.arguments import Arguments, unwrapped
from stgfast.errors import EngineError

ATTRIBUTE = "_compiled_call_impl"
# Hooks of these libraries call what they replace.
CALL_ON = ("torch", "diffusers", "accelerate", "transformers", "peft", "stgfast")
Call = Callable[..., Any]
Handler = Callable[[Call, Arguments], Any]

_handlers: ContextVar[Mapping[nn.Module, Handler] | None] = ContextVar("stgfast_handlers", default=None)
_lock = threading.Lock()
_held: dict[nn.Module, int] = {}
_codes: dict[Any, CodeType] = {}


@contextmanager
def handling(handlers: Mapping[nn.Module, Handler] | None) -> Iterator[None]:
    """Within the block and in this context only, pass calls of these modules to their handlers. They must be `held`."""
    token = _handlers.set(handlers)
    try:
        yield
    finally:
        _handlers.reset(token)


@contextmanager
def handling_also(handlers: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """The same, in addition to the current handlers."""
    with handling({**(_handlers.get() or {}), **handlers}):
        yield


@contextmanager
def held(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Install wrappers on these modules within the block."""
    if not hasattr(nn.Module, ATTRIBUTE):
        raise EngineError(f"this version of torch has no nn.Module.{ATTRIBUTE}, which guidance needs")
    modules = list(modules)
    with _lock:
        for module in modules:
            if module not in _held:
                _put(module)
            _held[module] = _held.get(module, 0) + 1
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                _held[module] -= 1
                if not _held[module]:
                    del _held[module]
                    _take(module)


def compiled_in_place(module: nn.Module) -> bool:
    """Whether a module's call was compiled by `module.compile()`, or its forward by `torch.compile`."""
    call = module.__dict__.get(ATTRIBUTE)
    return getattr(call, "replaced", call) is not None or _compiled_forward(module) is not None


def compiled(module: nn.Module) -> bool:
    """Whether a module runs as compiled code, however it was compiled."""
    return unwrapped(module) is not module or compiled_in_place(module)


def as_written(module: nn.Module) -> Call:
    """The call of a module with its hooks, without compiled code."""
    inner = unwrapped(module)
    forward = _compiled_forward(inner)

    def call(*args: Any, **kwargs: Any) -> Any:
        with _lock:
            inner.__dict__["forward"] = forward._torchdynamo_orig_callable
        try:
            return inner._call_impl(*args, **kwargs)
        finally:
            with _lock:
                inner.__dict__["forward"] = forward

    return inner._call_impl if forward is None else call


def compiled_calls(modules: Iterable[nn.Module], make: Callable[[Call], Call]) -> dict[nn.Module, Call]:
    """The calls of modules, compiled by `make`, with a code object of its own for each kind of module.

    torch.compile stores its results with the code object, up to a limit, and modules of one class share it. A UNet with
    blocks of several widths would reach the limit.
    """
    made: dict[CodeType, Call] = {}
    calls: dict[nn.Module, Call] = {}
    for module in modules:
        kind = type(module), tuple((name, tuple(part.shape)) for name, part in module.named_parameters())
        # The same one in every run, so that what was compiled stays compiled; equal to no other, by its first line.
        code = _codes.setdefault(kind, _call.__code__.replace(co_firstlineno=1 + len(_codes)))
        if code not in made:
            made[code] = make(FunctionType(code, _call.__globals__, _call.__name__))
        calls[module] = functools.partial(made[code], module)
    return calls


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module._call_impl(*args, **kwargs)


def foreign_forward(module: nn.Module) -> str:
    """The module that defined a forward, if it is neither that of the class nor a library that only calls it."""
    cls = type(module)
    forward = vars(module).get("forward", cls.forward)
    while isinstance(forward, functools.partial):
        forward = forward.func
    home = str(getattr(forward, "__globals__", {}).get("__name__", cls.__module__))
    return "" if home.split(".", maxsplit=1)[0] in {cls.__module__.split(".")[0], *CALL_ON} else home


def _compiled_forward(module: nn.Module) -> Any:
    """The result of `module.forward = torch.compile(module.forward)`, if it is there."""
    forward = vars(module).get("forward")
    return forward if hasattr(forward, "_torchdynamo_orig_callable") else None


def caching_hooks(denoiser: nn.Module) -> list[str]:
    """The names of diffusers' hooks that store values from call to call, in the order in which to remove them."""
    found: dict[str, None] = {}
    for module in denoiser.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name, hook in registry.hooks.items() if registry is not None else ():
            # The hooks of one cache share a state; only one of them says so.
            if hook._is_stateful or any(type(part).__name__ == "StateManager" for part in vars(hook).values()):
                found[name] = None
    return [*reversed(found)]


def _put(module: nn.Module) -> None:
    before = module.__dict__.get(ATTRIBUTE)
    plain = before or module._call_impl

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        handlers = _handlers.get()
        handler = handlers.get(module) if handlers else None
        return plain(*args, **kwargs) if handler is None else handler(plain, Arguments(module, args, kwargs))

    stand_in.replaced = before  # type: ignore[attr-defined]
    module.__dict__[ATTRIBUTE] = stand_in


def _take(module: nn.Module) -> None:
    before = module.__dict__[ATTRIBUTE].replaced
    if before is None:
        del module.__dict__[ATTRIBUTE]
    else:
        module.__dict__[ATTRIBUTE] = before
