"""`stgfast doctor`: what is installed, what runs here, and which attention is chosen for the supported models."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

import torch

from stgfast.kernels import backends
from stgfast.version import __version__

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "flash-attn", "xformers")
# Heads and size of a head, as in the models; tokens of a short clip.
SHAPES = {
    "Mochi": (24, 128),
    "LTX-Video": (32, 64),
    "CogVideoX": (48, 64),
    "Wan 14B": (40, 128),
    "HunyuanVideo": (24, 128),
}
TOKENS = 4096


def report() -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, no GPU"
    lines = [f"stgfast {__version__}, Python {platform.python_version()}, {device}: {name}", "", "packages"]
    lines += [f"  {package:14} {installed(package)}" for package in PACKAGES]
    lines += ["", "attention for rows that attend (identity rows are a copy)"]
    for backend in (*backends.WHOLE, *backends.BACKENDS):
        reason = backends.unavailable(backend, device, False)
        lines.append(f"  {backend:14} {reason or 'runs here' + limits(backend, device)}")
    lines += ["", f"chosen for a stack of three rows, one the identity, {TOKENS} tokens"]
    lines += [f"  {model:14} {chosen(device, *shape)}" for model, shape in SHAPES.items()]
    return "\n".join(lines)


def installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def limits(backend: str, device: str) -> str:
    reason = backends.unavailable(backend, device, True)
    return f", but {reason}" if reason else ""


def chosen(device: str, heads: int, size: int) -> str:
    if device == "cpu":
        return "sdpa (on a CPU nothing is measured)"
    q, k, v = (torch.randn(3, TOKENS, heads, size, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in "qkv")
    call = backends.Call(q, k, v, (False, False, True), (0, 1, 2), (0, TOKENS), None, None, size**-0.5)
    choice = backends.choose(call)
    times = sorted(backends.choices[call.shape].milliseconds.items(), key=lambda pair: pair[1])
    return f"{choice} ({', '.join(f'{name} {milliseconds:.2f} ms' for name, milliseconds in times)})"


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """It has no arguments."""


def run_doctor(arguments: argparse.Namespace) -> int:
    sys.stdout.write(f"{report()}\n")
    return 0
