"""Functions of other libraries that take several percent of the tests' time, replaced by ones with the same results:
the models are tiny, so what is done for each call counts.
"""

import inspect
import sys
import types
import weakref

import torch

_signature = inspect.signature
_known: weakref.WeakKeyDictionary[types.FunctionType, inspect.Signature] = weakref.WeakKeyDictionary()


def signature(of, **options):
    """Attention of diffusers asks for the signature of its processor in every call."""
    if options or type(of) is not types.MethodType or torch.compiler.is_compiling():
        return _signature(of, **options)
    if of.__func__ not in _known:
        _known[of.__func__] = _signature(of)
    return _known[of.__func__]


def offloading_hook(module):
    """Pipelines of diffusers look for it in all modules, several times in a call."""
    waiting = [module]
    while waiting:
        one = waiting.pop()
        if "_diffusers_hook" in vars(one):
            hook = one._diffusers_hook.get_hook("group_offloading")
            if hook is not None:
                return hook
        waiting += [child for child in reversed(one._modules.values()) if child is not None]
    return None


def replace():
    """Replace them in what is imported: to import diffusers takes seconds, and some tests do without."""
    inspect.signature = signature
    if offloading := sys.modules.get("diffusers.hooks.group_offloading"):
        offloading._get_top_level_group_offload_hook = offloading_hook
    if not torch.cuda.is_available():
        # Torch's own function keeps the stack of every call, for a GPU that is found later.
        torch.manual_seed = torch.default_generator.manual_seed
