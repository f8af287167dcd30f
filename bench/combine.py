"""The cost of combining the branches: bytes on every machine, time on a GPU.

The floor is the memory traffic of the fused kernels: each branch is read once, or twice if a rescale or an orthogonal
part needs statistics first, and the result is written once. It is compared with the traffic of eager torch for the same
formula: all that its operations read and write, except views. *As written* is the formula of pipelines, in the dtype of
the branches; *reference* is the one of this library, in float32. Latents that fit into the L2 cache move fewer bytes
than counted on both sides.

    python bench/combine.py                         the table of bytes
    python bench/combine.py --device cuda           also the time of the fused kernels, eager and compiled torch
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stgfast.bench.measure import result, saved
from stgfast.kernels import Projection, combine, reference

DTYPE = torch.bfloat16
WEIGHTS = {2: (4.5, -3.5), 3: (5.5, -3.5, -1.0), 4: (6.0, -3.5, -1.0, -0.5)}
COPY_BYTES = 1 << 29
QUEUE_AHEAD = 4_000_000  # cycles that the GPU is kept busy, so that the host is done launching when the clock starts


@dataclass(frozen=True)
class Case:
    branches: int
    rescale: float = 0.0
    orthogonal: bool = False  # of the second difference, what the first one says already is lost

    def __str__(self) -> str:
        parts = (f"{self.branches} branches", self.rescale and "rescale", self.orthogonal and "orthogonal")
        return ", ".join(part for part in parts if part)

    def floor(self, branch: int) -> int:
        """Bytes for branches and a result of this size each; branches are read twice if statistics are needed."""
        first_pass = self.branches if self.rescale or self.orthogonal else 0
        return (first_pass + self.branches + 1) * branch

    def fused(self, given: list[Tensor]) -> Tensor:
        return self._by(combine, given, impl="triton")

    def reference(self, given: list[Tensor]) -> Tensor:
        return self._by(reference.combine, given)

    def _by(self, how: Callable[..., Tensor], given: list[Tensor], **options: Any) -> Tensor:
        along = (1.0, -1.0, *[0.0] * (self.branches - 2))
        options |= {"rescale": self.rescale, "project": Projection(2, along) if self.orthogonal else None}
        return how(given, WEIGHTS[self.branches], dtype=given[0].dtype, **options)

    def as_written(self, given: list[Tensor]) -> Tensor:
        base, *others = given
        distances = [base - other for other in others]
        dims = tuple(range(1, base.ndim))
        if self.orthogonal:
            i, j = distances[:2]
            along = (i * j).sum(dims, keepdim=True) / (i * i).sum(dims, keepdim=True)
            distances[1] = j - along * i
        guided = base
        for weight, distance in zip(WEIGHTS[self.branches][1:], distances, strict=True):
            guided = guided - weight * distance
        if self.rescale:
            scaled = guided * (base.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
            guided = self.rescale * scaled + (1 - self.rescale) * guided
        return guided


CASES = (Case(2), Case(3), Case(2, 0.7), Case(3, 0.7), Case(4, 0.7), Case(3, 0.0, True), Case(3, 0.7, True))


class Counting(TorchDispatchMode):
    """Counts bytes read and written by each operation that runs within it, and the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made, read = tensors(result), tensors((args, kwargs))
        places = {tensor.untyped_storage().data_ptr() for tensor in read}
        if any(
            tensor.untyped_storage().data_ptr() not in places for tensor in made
        ):  # not a view, nor a cast to itself
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in (*made, *read))
            self.operations += 1
        return result


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def counted(call: Callable[[list[Tensor]], Any], given: list[Tensor]) -> Counting:
    with Counting() as count:
        call(given)
    return count


def branches(count: int, numel: int, device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    base = torch.randn(1, numel, device=device, generator=generator)
    return [(base + 0.1 * torch.randn(1, numel, device=device, generator=generator)).to(DTYPE) for _ in range(count)]


def table(numel: int = 4096) -> list[dict[str, Any]]:
    """Bytes as multiples of one branch's bytes."""
    rows = []
    for case in CASES:
        given = branches(case.branches, numel, "cpu")
        size = given[0].nbytes
        row: dict[str, Any] = {"case": str(case), "floor": case.floor(size) / size}
        for name in ("as_written", "reference"):
            count = counted(getattr(case, name), given)
            row |= {name: round(count.bytes / size, 1), f"{name} operations": count.operations}
        rows.append(row)
    return rows


def copy_rate() -> float:
    """GB/s, counting what is read and what is written."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / microseconds({"copy": lambda: target.copy_(source)}, rounds=9)["copy"]["gpu"] / 1e3


def microseconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of interleaved rounds: of the GPU alone, and of the host while it launches."""
    gpu: dict[str, list[float]] = {name: [] for name in calls}
    host: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 3):
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(QUEUE_AHEAD)
            start.record()
            began = time.perf_counter()
            call()
            launched = time.perf_counter() - began
            stop.record()
            stop.synchronize()
            if number >= 3:  # the first three warm up
                gpu[name].append(1e3 * start.elapsed_time(stop))
                host[name].append(1e6 * launched)
    return {name: {"gpu": statistics.median(gpu[name]), "host": statistics.median(host[name])} for name in calls}


def disagreement(case: Case, given: list[Tensor]) -> float:
    """Errors of the fused result divided by the allowed error: twice torch's own in float32, and the rounding."""
    exact = case.reference([branch.double() for branch in given])
    error, own = ((call(given).double() - exact).abs().max() for call in (case.fused, case.reference))
    return float(error / (2 * (own + torch.finfo(DTYPE).eps * exact.abs().max())))


def timed(case: Case, megabytes: int, rounds: int, rate: float) -> dict[str, Any]:
    size = megabytes << 20
    given = branches(case.branches, size // DTYPE.itemsize, "cuda")
    beyond = disagreement(case, given)
    if not beyond <= 1:
        raise SystemExit(f"{case}, {megabytes} MB: {beyond:.2g} times the error it may have; nothing was timed")
    torch._dynamo.reset()
    compiled = torch.compile(case.as_written, dynamic=False)
    sides = {"fused": case.fused, "as written": case.as_written, "as written, compiled": compiled}
    times = microseconds({name: lambda call=call: call(given) for name, call in sides.items()}, rounds)
    achieved = case.floor(size) / times["fused"]["gpu"] / 1e3
    figures = {
        "case": str(case),
        "MB of a branch": megabytes,
        "microseconds": {name: round(time["gpu"], 1) for name, time in times.items()},
        "microseconds of the host": {name: round(time["host"], 1) for name, time in times.items()},
        "as written / fused": round(times["as written"]["gpu"] / times["fused"]["gpu"], 2),
        "compiled / fused": round(times["as written, compiled"]["gpu"] / times["fused"]["gpu"], 2),
        "GB/s": round(achieved),
        "GB/s of a copy": round(rate),
        "share of the copy rate": round(achieved / rate, 3),
    }
    return result("combine", "cuda", rounds=rounds, **figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 4, 8, 16, 64, 128], help="of one branch")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--save", type=Path, help="a file to add the results to, one line of JSON each")
    options = parser.parse_args()

    print(f"bytes, in multiples of one branch's ({str(DTYPE).removeprefix('torch.')}, the result as well)")
    print(f"{'':36}{'floor':>8}{'as written':>18}{'reference':>18}")
    for row in table():
        sides = (f"{row[name]:.1f} in {row[f'{name} operations']:2} ops" for name in ("as_written", "reference"))
        print(f"{row['case']:36}{row['floor']:8.1f}" + "".join(f"{side:>18}" for side in sides))
    if options.device == "cpu":
        return 0

    rate = copy_rate()
    for case in CASES:
        for megabytes in options.megabytes:
            print(saved(timed(case, megabytes, options.rounds, rate), options.save))
    return 0


if __name__ == "__main__":
    sys.exit(main())
