"""The peak memory of a guided step, without the model itself, compared with the stock pipeline.

Models and clips have their released sizes, on the meta device: every allocation of the denoiser is counted, on any
machine. Attention is assumed to keep no scores, like fused kernels.

    python bench/memory.py                     all models
    python bench/memory.py --models wan-14b
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx.experimental import _config as fx
from torch.utils import _pytree as pytree

from stgfast.bench.memory import peak_of
from stgfast.bench.models import FULL, MODELS
from stgfast.bench.variants import Bench

WAYS: dict[str, Any] = {"default": None, "max_rows=1": 1, 'max_rows="all"': "all"}
GIB = 2**30


def _moved(device: str, values: Any) -> Any:
    return pytree.tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, values)


def _attention(query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@contextlib.contextmanager
def without_numbers(bench: Bench) -> Iterator[None]:
    """Run the denoiser's calls on the meta device; the pipeline and its scheduler stay on the host."""
    autocast = torch.autocast

    def into(module: Any, args: Any, kwargs: Any) -> Any:
        return _moved("meta", args), _moved("meta", kwargs)

    def back(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return pytree.tree_map(lambda part: torch.zeros_like(part, device="cpu"), output)

    def on_host(kind: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if kind == "meta" else autocast(kind, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.callback(bench.denoiser.register_forward_pre_hook(into, with_kwargs=True).remove)
        stack.callback(bench.denoiser.register_forward_hook(back, with_kwargs=True).remove)
        for owner, name in ((bench.denoiser, "device"), (bench.pipe, "_execution_device")):
            stack.enter_context(mock.patch.object(type(owner), name, torch.device("cpu")))
        stack.enter_context(mock.patch("torch.autocast", on_host))
        stack.enter_context(fx.patch(meta_nonzero_assume_all_nonzero=True))  # Mochi looks up which text is valid
        stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", _attention))
        yield


def peaks(name: str) -> dict[str, int]:
    """Bytes by setting; `stock` is the pipeline without guidance."""
    bench = Bench(MODELS[name], FULL, "meta", 2)
    with without_numbers(bench):
        found = {"stock": peak_of(bench.stock)}
        for way, max_rows in WAYS.items():
            found[way] = peak_of(functools.partial(bench.stgfast, max_rows=max_rows))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    print(f"{'model':16} {'stock, GiB':>11} " + " ".join(f"{way:>15}" for way in WAYS))
    for name in parser.parse_args().models:
        found = peaks(name)
        shares = " ".join(f"{found[way] / found['stock']:15.2f}" for way in WAYS)
        print(f"{name:16} {found['stock'] / GIB:11.2f} {shares}", flush=True)


if __name__ == "__main__":
    main()
