"""The speed of attention over a stack of rows, compared with installed libraries. For a GPU.

A stack of three rows, one of them the identity: the fused launches and each split form, compared with the fastest
attention on all three rows, which is the cost if masked rows are computed and discarded. Also one identity row
alone, as a fraction of the copy rate of the device. Results are checked to agree before anything is timed.

    python bench/attention.py [--tokens 2048 8192 32768] [--hopper] [--save FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stgfast.bench.measure import result, saved
from stgfast.kernels import backends

HEADS = 24
STACK = {"identity": [False, False, True]}


def milliseconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Medians of interleaved rounds."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            if number >= 2:  # the first two warm up
                taken[name].append(start.elapsed_time(stop))
    return {name: statistics.median(times) for name, times in taken.items()}


def compare(size: int, tokens: int, rounds: int, hopper: bool) -> dict[str, Any]:
    from stgfast.kernels import attention_hopper  # imports triton

    q, k, v = (
        torch.randn(3, tokens, HEADS, size, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)
    )
    fused = ["triton"]
    if hopper:
        reason = attention_hopper.unsuitable(q, k, v, None)
        if reason:
            raise SystemExit(f"hopper {reason}")
        fused.append("hopper")
    split = [n for n in backends.BACKENDS if n != "math" and not backends.unavailable(n, "cuda", False)]
    expected = backends.masked_attention(q, k, v, **STACK, impl="sdpa").float()
    calls: dict[str, Callable[[], Any]] = {}
    for name in (*fused, *split, "auto"):
        error = (backends.masked_attention(q, k, v, **STACK, impl=name).float() - expected).abs().max()
        if not error <= 2e-2 * expected.abs().max():
            raise SystemExit(f"{name} disagrees with sdpa at size {size}, {tokens} tokens: {error:.2g}; nothing timed")
        calls[f"stack, {name}"] = lambda name=name: backends.masked_attention(q, k, v, **STACK, impl=name)
        if name != "auto":
            calls[f"three rows, {name}"] = lambda name=name: backends.masked_attention(q, k, v, impl=name)
    for name in fused:
        calls[f"identity row, {name}"] = lambda name=name: backends.masked_attention(
            q[:1], k[:1], v[:1], [True], impl=name
        )
    target = torch.empty_like(v[:1])
    calls["copy of a row"] = lambda: target.copy_(v[:1])
    times = milliseconds(calls, rounds)
    plain = {name: times[f"three rows, {name}"] for name in (*fused, *split)}
    fastest, others = min(plain.values()), min(plain[name] for name in split)
    figures: dict[str, Any] = {}
    for name in fused:
        copies = times["copy of a row"] / times[f"identity row, {name}"]
        figures[f"fastest of the split forms / {name}, three rows"] = round(others / plain[name], 3)
        figures[f"identity row, {name}: share of the copy rate"] = round(copies, 3)
        figures[f"{name} TFLOP/s"] = round(3 * 4 * tokens**2 * size * HEADS / plain[name] / 1e9, 1)
    figures |= {"size of a head": size, "tokens": tokens, "heads": HEADS, "rounds": rounds}
    figures["stack of three with one identity row / fastest on three rows"] = round(times["stack, auto"] / fastest, 3)
    figures["milliseconds"] = {name: round(value, 4) for name, value in times.items()}
    return result("attention", "cuda", **figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 16384, 32768, 65536])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hopper", action="store_true", help="the kernel for Hopper too, which nothing else chooses")
    parser.add_argument("--save", type=Path, help="a file to add the results to, one line of JSON each")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a GPU")
        return 1
    for size in (64, 128):
        for tokens in options.tokens:
            print(saved(compare(size, tokens, options.rounds, options.hopper), options.save))
    return 0


if __name__ == "__main__":
    sys.exit(main())
