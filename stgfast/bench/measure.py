"""Rounds in turns, agreement, arithmetic, the rates of a device, and results as rows of JSON."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
from torch import Tensor

from stgfast.kernels import backends
from stgfast.version import __version__

K = TypeVar("K")
T = TypeVar("T")

PACKAGES = ("torch", "diffusers", "triton")
MATRIX = {"cpu": 1024, "cuda": 8192}  # the size of the matrices for the matrix rate
COPIED = {"cpu": 1 << 27, "cuda": 1 << 30}  # bytes for the copy rate
# Options of the C library's allocator: free memory before any is released, memory per request, and
# the size from which one tensor gets memory of its own.
MALLOC = {-1: (1 << 31) - 1, -2: 1 << 28, -3: 1 << 30}


class Disagreement(RuntimeError):
    """Two ways to compute the same thing gave different results."""


def agreeing(
    what: str, results: Mapping[str, Tensor], exact: str, allowed: float, unlike: Sequence[str] = ()
) -> dict[str, float]:
    """The relative distance of results from the exact one. Raises if one that is not in `unlike` is too distances."""
    right = results[exact].double()
    distances = {name: float((result.double() - right).norm() / right.norm()) for name, result in results.items()}
    wrong = {name: distance for name, distance in distances.items() if name not in unlike and not distance <= allowed}
    if wrong:
        raise Disagreement(f"{what}: relative distances {wrong}, allowed {allowed:g}; nothing was timed")
    return distances


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """The seconds of each call in each round, without warm-up."""
    return rounds_of({name: partial(seconds, call, device) for name, call in calls.items()}, rounds)


def rounds_of(measures: Mapping[K, Callable[[], T]], rounds: int) -> dict[K, list[T]]:
    """Measurements in rounds in which all take turns, forward and backward, so that changes of the machine affect
    all alike.
    """
    taken: dict[K, list[T]] = {name: [] for name in measures}
    order = list(measures.items())
    for _ in range(rounds):
        for name, measure in order:
            taken[name].append(measure())
        order.reverse()
    return taken


def keep_memory() -> None:
    """Let the C library keep memory of tensors on a CPU, as torch does on a GPU.

    Releasing and reallocating it takes up to a tenth of a step, and would decide which of two variants is faster.
    """
    options: Any = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    for option, size in (MALLOC if options else {}).items():
        options(option, size)


class Stopwatch:
    """Times of a run. On a CPU this is processor time, so that other processes hardly count."""

    def __init__(self, device: str):
        self.device = device
        self.moments: list[Any] = []

    def mark(self) -> None:
        if self.device == "cpu":
            self.moments.append(time.process_time())
            return
        event = torch.cuda.Event(enable_timing=True)  # the host need not wait for it
        event.record()
        self.moments.append(event)

    def seconds(self) -> list[float]:
        """The seconds since the first time."""
        first, *_ = self.moments
        if self.device == "cpu":
            return [moment - first for moment in self.moments]
        torch.cuda.synchronize()
        return [first.elapsed_time(moment) / 1e3 for moment in self.moments]


def seconds(call: Callable[[], Any], device: str) -> float:
    watch = Stopwatch(device)
    watch.mark()
    call()
    watch.mark()
    return watch.seconds()[-1]


def medians(taken: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in taken.items()}


def peak_memory(call: Callable[[], Tensor], device: str) -> tuple[Tensor, int]:
    """The result of a call, and its peak memory on a GPU in bytes; 0 on a CPU, where only the peak of the process is
    known.
    """
    if device == "cpu":
        return call(), 0
    torch.cuda.reset_peak_memory_stats()
    return call(), torch.cuda.max_memory_allocated()


class Arithmetic(NamedTuple):
    """Floating point operations of matrix products, convolutions and attention, which dominate in these models."""

    total: int
    attention: int


def arithmetic(call: Callable[[], Any]) -> Arithmetic:
    """The operations of a call, counted while it runs. Rows with few valid keys count with all keys."""
    counts = _counted(call)["Global"]
    return Arithmetic(sum(counts.values()), sum(n for op, n in counts.items() if "attention" in str(op)))


def by_module(call: Callable[[], Any]) -> dict[str, int]:
    """The same for each module, with its parts."""
    return {name: sum(counts.values()) for name, counts in _counted(call).items()}


class Fit(NamedTuple):
    """A least-squares fit: one coefficient for each power of the variable, and the fraction of variance that it
    explains.
    """

    coefficients: tuple[float, ...]
    r2: float


def fitted(x: Sequence[float], y: Sequence[float], degree: int) -> Fit:
    values = torch.tensor(y, dtype=torch.float64)
    # Powers of numbers near 1, so that rounding does not decide.
    scale = max(map(abs, x)) or 1.0
    powers = torch.stack([(torch.tensor(x, dtype=torch.float64) / scale) ** n for n in range(degree + 1)], dim=1)
    found = torch.linalg.lstsq(powers, values).solution
    left, spread = (values - powers @ found).square().sum(), (values - values.mean()).square().sum()
    coefficients = tuple(significant(float(c) / scale**n) for n, c in enumerate(found))
    return Fit(coefficients, significant(float(1 - left / spread)))


def _counted(call: Callable[[], Any]) -> dict[str, dict[Any, int]]:
    from torch.utils.flop_counter import FlopCounterMode  # it imports Triton

    counter = FlopCounterMode(display=False, custom_mapping={FOR_CPU: _attention})
    # The counter does not know our attention kernels: torch's attention runs for the count.
    with mock.patch.object(backends, "choose", return_value=backends.YARDSTICK), counter:
        call()
    return counter.get_flop_counts()


FOR_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    from torch.utils.flop_counter import sdpa_flop_count

    return int(sdpa_flop_count(query, key, value))


class Rates(NamedTuple):
    """What a device can do: operations per second, and bytes per second, read and written."""

    matrix: float
    copy: float


def rates(device: str, dtype: torch.dtype, rounds: int = 7) -> Rates:
    side, size = MATRIX[device], COPIED[device]
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = {"matrix": lambda: one @ other, "copy": lambda: target.copy_(source)}
    in_turns(calls, 2, device)
    fastest = {name: min(taken) for name, taken in in_turns(calls, rounds, device).items()}
    return Rates(2 * side**3 / fastest["matrix"], 2 * size / fastest["copy"])


def result(bench: str, device: str, **figures: Any) -> dict[str, Any]:
    """One row: what was measured, and on what. Figures may override its fields."""
    on = torch.cuda.get_device_name() if device == "cuda" else _processor()
    clock = "wall" if device == "cuda" else "processor time"
    about = {"bench": bench, "device": on, "clock": clock, "threads": torch.get_num_threads()}
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    versions |= {"stgfast": __version__, "python": platform.python_version()}
    return {**about, **versions, "commit": commit(), **figures}


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    text = about.read_text() if about.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"CPU, {names[0] if names else platform.machine()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout with the package, with a mark if files have changed; None outside a checkout."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def saved(row: Mapping[str, Any], file: Path | None) -> str:
    """Append a row to a file as a line of JSON."""
    line = json.dumps(row)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as rows:
            rows.write(line + "\n")
    return line


def significant(number: float, digits: int = 4) -> float:
    """A number rounded to its significant digits."""
    return float(f"{number:.{digits}g}")
