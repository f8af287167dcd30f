"""The faster way to compute an attention: all rows in one call, or attending rows and values of the others separately.

Three rows, one of which is the identity: at its fork, where it shares queries, keys and values with another row, and
with an input of its own, as at every later layer. Attentions of released models, random weights. Both run in turns in
one process, and are checked to agree before anything is timed. Because of these results, `stgfast` uses the way with
fewer projections on a CPU. On a GPU it uses the first way, unless results of a GPU say otherwise.

    python bench/ways.py [--device cuda] [--tokens 256 1024 2048] [--save FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stgfast.batching.arguments import Arguments
from stgfast.batching.one_call import one_call, saves
from stgfast.batching.values import identity_attention
from stgfast.bench.measure import agreeing, in_turns, medians, result, saved

TOKENS = {"cpu": [256, 1024, 2048], "cuda": [2048, 8192, 32768]}
MASKED = [False, False, True]
FORKED = {"forked": [0, 1, 1], "of its own": [0, 1, 2]}  # the input of every row


def attentions() -> dict[str, tuple[nn.Module, int]]:
    """Self-attentions without text, each with its width."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.transformers.transformer_ltx import LTXAttention
    from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

    return {
        "LTX 2B": (LTXAttention(2048, heads=32, kv_heads=32, dim_head=64), 2048),
        "Wan 1.3B": (WanAttention(1536, heads=12, dim_head=128, processor=WanAttnProcessor()), 1536),
        "SVD": (Attention(640, heads=10, dim_head=64), 640),
    }


def compare(name: str, attention: nn.Module, width: int, tokens: int, device: str, rounds: int) -> list[dict[str, Any]]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    attention = attention.to(device, dtype).eval()
    results = []
    for whose, source in FORKED.items():
        inputs = max(source) + 1
        x = torch.randn(inputs, tokens, width, device=device, dtype=dtype)

        def one(x: Tensor = x, inputs: int = inputs, source: list[int] = source) -> Tensor:
            made: Tensor = one_call(attention, Arguments(attention, (x,), {}), inputs, MASKED, source)
            return made

        def apart(x: Tensor = x, source: list[int] = source) -> Tensor:
            return torch.cat([attention(x[:2]), identity_attention(attention, x[source[2]][None])])

        calls: dict[str, Callable[[], Tensor]] = {"one": one, "apart": apart}
        made = {way: call() for way, call in calls.items()}
        agreeing(f"{name}, {tokens} tokens", made, "apart", 16 * torch.finfo(dtype).eps)
        in_turns(calls, 1, device)
        seconds = medians(in_turns(calls, rounds, device))
        figures = {
            **{"attention": name, "tokens": tokens, "identity row": whose, "rounds": rounds},
            "one / apart": round(seconds["one"] / seconds["apart"], 3),
            "chosen": "one" if device != "cpu" or saves(inputs, 2, 1) else "apart",
        }
        results.append(result("ways", device, **figures))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(TOKENS), default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", type=Path, help="a file to add the results to, one line of JSON each")
    options = parser.parse_args()
    with torch.no_grad():
        for name, (attention, width) in attentions().items():
            for tokens in options.tokens or TOKENS[options.device]:
                for line in compare(name, attention, width, tokens, options.device, options.rounds):
                    print(saved(line, options.save))
    return 0


if __name__ == "__main__":
    sys.exit(main())
