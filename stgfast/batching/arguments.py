"""The arguments of a module's call: accessible by name, and stored in the form in which they were given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any, cast

from torch import Tensor, nn

_names: dict[type[nn.Module], list[str]] = {}


class Arguments:
    """The arguments of one call of a module."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.module, self.args, self.kwargs = module, args, kwargs

    def __getitem__(self, name: str) -> Any:
        return self.kwargs[name] if name in self.kwargs else self.args[_parameters(self.module).index(name)]

    def changed(self, change: Callable[[str, Any], Any]) -> Arguments:
        """The same arguments, each changed by a function of its name and value. An argument that only `*args` takes has
        the name "".
        """
        names = _parameters(self.module)[: len(self.args)]
        args = tuple(change(name, value) for name, value in zip_longest(names, self.args, fillvalue=""))
        kwargs = {name: change(name, value) for name, value in self.kwargs.items()}
        return Arguments(self.module, args, kwargs)

    def replaced(self, changes: Mapping[str, Any]) -> Arguments:
        """The same arguments, with some replaced by name."""
        if not changes:
            return self
        changed = self.changed(changes.get)
        given = {*changed.kwargs, *_parameters(self.module)[: len(self.args)]}
        changed.kwargs |= {name: value for name, value in changes.items() if name not in given}
        return changed

    @property
    def device(self) -> str:
        """The device type of the tensors among them."""
        tensors = (value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor))
        return next((tensor.device.type for tensor in tensors), "cpu")

    def given_to(self, call: Callable[..., Any]) -> Any:
        return call(*self.args, **self.kwargs)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the result of `torch.compile(module)`."""
    wrapper = any(cls.__name__ == "OptimizedModule" for cls in type(module).__mro__)
    return cast(nn.Module, module._orig_mod) if wrapper else module


def _parameters(module: nn.Module) -> list[str]:
    """The names of a forward's positional parameters."""
    cls = type(unwrapped(module))
    if cls not in _names:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(cls.forward).parameters.items()
        _names[cls] = [name for name, parameter in parameters if parameter.kind in kinds][1:]
    return _names[cls]
