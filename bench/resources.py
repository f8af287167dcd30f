"""What the kernels need from a chip: compiled ahead of time, without a GPU, for the shapes of the supported models.

Registers and spills are what `ptxas` reports, shared memory is what the compiler asks for, matrix instructions are
counted in the PTX.

    python bench/resources.py [--save bench/results/resources.txt]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stgfast.kernels import attention, attention_hopper, combination

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program may have
MATRIX = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}  # the chip's own matrix instructions
HEADS = {"Mochi": 128, "LTX-Video": 64, "CogVideoX": 64, "Wan": 128, "HunyuanVideo": 128}  # size of a head
ODD_HEADS = (40, 72, 80, 96, 256)


@dataclass(frozen=True)
class Usage:
    name: str
    arch: int
    registers: int
    spills: int  # bytes
    shared: int  # bytes
    matrix: int  # matrix instructions of the chip's own kind
    warps: int  # those the compiler adds for groups of their own are counted
    specialised: bool  # does each group of warps have code of its own?

    def __str__(self) -> str:
        return (
            f"sm_{self.arch:<4} {self.name:52} {self.registers:9} {self.spills:7} {self.shared / 1024:10.1f} "
            f"{self.matrix:7} {self.warps:6} {'yes' if self.specialised else 'no':>11}"
        )


HEADER = (
    f"{'chip':7} {'kernel':52} {'registers':>9} {'spills':>7} {'shared KB':>10} {'matrix':>7} {'warps':>6} "
    f"{'specialised':>11}"
)


def compiled(
    name: str, kernel: Any, arch: int, types: dict[str, str], constants: dict[str, Any], *, warps: int, stages: int
) -> Usage:
    """A kernel's use of a chip. `types` has each run-time argument; pointers and strides are multiples of 16."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if _aligned(n, types)}
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()}, attrs=aligned
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills = assembled(made.asm["ptx"], arch)
    matrix = len(re.findall(MATRIX[arch], made.asm["ptx"]))
    specialised = "ttg.warp_specialize" in made.asm["ttgir"]
    return Usage(name, arch, registers, spills, made.metadata.shared, matrix, made.metadata.num_warps, specialised)


def _aligned(name: str, types: dict[str, str]) -> bool:
    return name in types and (
        types[name].startswith("*") or re.fullmatch(r"s[qkvo][bhn]|(sample_)?stride|chunk", name) is not None
    )


def assembled(ptx: str, arch: int) -> tuple[int, int]:
    """Registers, and spilled bytes."""
    new = arch >= 100 or tuple(map(int, re.search(r"\.version (\d+)\.(\d+)", ptx).groups())) > (8, 8)
    target = f"sm_{arch}" + ("a" if arch >= 90 else "")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        blackwell = TOOLS / "ptxas-blackwell"  # of triton 3.6 and later; before, one served all chips
        tool = blackwell if new and blackwell.exists() else TOOLS / "ptxas"
        command = [tool, "-v", f"--gpu-name={target}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups())
    return int(re.search(r"Used (\d+) registers", said)[1]), stores + loads


def attention_types(dtype: str) -> dict[str, str]:
    types = {f"{n}_ptr": f"*{dtype}" for n in ("q", "k", "v", "out")}
    types |= {"source_ptr": "*i32", "identity_ptr": "*i8", "kv_len_ptr": "*i32"}
    types |= {f"s{t}{a}": "i32" for t in "qkvo" for a in "bhn"}
    return types | dict.fromkeys(("heads", "queries", "all_keys", "first", "last"), "i32") | {"scale": "fp32"}


def attention_usage(arch: int, size: int, dtype: str = "bf16", bias: int = 0, *, per_query: bool = False) -> Usage:
    dim = attention.padded(size)
    cut = attention.config(dim, 32 if dtype == "fp32" else 16, bias, per_query, arch // 10)
    types = attention_types(dtype) | {"bias_ptr": "*u8" if bias == attention.MASK else f"*{dtype}"}
    types |= {f"sb{a}": "i32" for a in "bhmn"}
    constants = {"D": size, "DIM": dim, "M": cut.m, "N": cut.n, "BIAS": bias, "PER_QUERY": per_query}
    constants |= {"LAST_APART": cut.last_apart, "HAS_IDENTITY": True, "HAS_KV_LEN": True}
    what = ("", " mask", " bias")[bias] + (" per query" if per_query else "")
    name = f"attention {dtype} D {size}{what}, {cut.m}x{cut.n}, {cut.stages} stages"
    return compiled(name, attention.attention_kernel, arch, types, constants, warps=cut.warps, stages=cut.stages)


def hopper_usage(size: int, dtype: str = "bf16", *, kv_len: bool = True) -> Usage:
    """With `kv_len` its last tile of keys is partial; without, all tiles are complete."""
    dim = attention.padded(size)
    cut = attention_hopper.config(dim)
    constants = {"D": size, "DIM": dim, "M": cut.m, "N": cut.n, "TAIL": kv_len, "HAS_KV_LEN": kv_len}
    constants |= {"HAS_IDENTITY": True}
    what = "hopper, kv_len" if kv_len else "hopper"
    name = f"attention {dtype} D {size} {what}, {cut.m}x{cut.n}, {cut.stages} stages"
    kernel, types = attention_hopper.attention_hopper_kernel, attention_types(dtype)
    return compiled(name, kernel, 90, types, constants, warps=cut.warps, stages=cut.stages)


def hopper_usages(arch: int, sizes: Sequence[int], *, kv_len: bool = True) -> list[Usage]:
    """Nothing for other chips, or if this triton has no descriptors."""
    runs = arch == 90 and hasattr(tl, "make_tensor_descriptor")
    return [hopper_usage(size, kv_len=kv_len) for size in sizes if size <= attention_hopper.MAX_SIZE] if runs else []


def combine_usage(
    arch: int, count: int, dtype: str = "bf16", *, rescale: bool = True, project: bool = False
) -> list[Usage]:
    """Both launches, or the only one."""
    types = {f"x{i}_ptr": f"*{dtype}" for i in range(combination.MOST_BRANCHES)}
    types |= {f"w{i}": "fp32" for i in range(1, combination.MOST_BRANCHES)}
    types |= {f"a{i}": "fp32" for i in range(combination.MOST_BRANCHES)}
    types |= dict.fromkeys(("phi", "taken"), "fp32") | {"sums_ptr": "*fp32", "out_ptr": "*fp32"}
    types |= dict.fromkeys(("stride", "numel", "chunk", "parts"), "i32")
    constants = {"COUNT": count, "RESCALE": rescale, "PROJECT": project, "SUMS": combination.SUMS}
    constants |= {"BLOCK": combination.BLOCK}
    kernels = {"combine": (combination.combine_kernel, {**constants, "PARTS": combination.PARTS})}
    if rescale or project:
        kernels["sums of"] = (combination.sums_kernel, constants)
    what = f" {count} branches {dtype}{', rescale' if rescale else ''}{', projection' if project else ''}"
    return [
        compiled(name + what, kernel, arch, types, values, warps=combination.WARPS, stages=3)
        for name, (kernel, values) in kernels.items()
    ]


def defaults(arch: int) -> list[Usage]:
    """The kernels as the supported models launch them: plain, and with masked keys or scores."""
    sizes = sorted(set(HEADS.values()))
    rows = [attention_usage(arch, size) for size in sizes]
    rows += [attention_usage(arch, size, bias=bias) for size in sizes for bias in (attention.MASK, attention.ADDED)]
    rows += hopper_usages(arch, sizes) + hopper_usages(arch, sizes, kv_len=False)
    for count in (2, 3, 4):
        rows += combine_usage(arch, count) + combine_usage(arch, count, rescale=False)
    return rows


def others(arch: int) -> list[Usage]:
    """All other options of the kernels."""
    sizes = (*sorted(set(HEADS.values())), 256)
    rows = [attention_usage(arch, size) for size in ODD_HEADS] + hopper_usages(arch, ODD_HEADS)
    rows += [attention_usage(arch, 256, bias=bias) for bias in (attention.MASK, attention.ADDED)]
    rows += [
        attention_usage(arch, size, bias=bias, per_query=True)
        for size in sizes
        for bias in (attention.MASK, attention.ADDED)
    ]
    rows += combine_usage(arch, 8) + combine_usage(arch, 8, dtype="fp32")
    rows += combine_usage(arch, 4, project=True)
    return rows + [attention_usage(arch, size, dtype="fp32") for size in sizes]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="a file to write the table to")
    options = parser.parse_args()
    usual = {arch: defaults(arch) for arch in SHARED}
    rows = [row for arch in SHARED for row in usual[arch] + others(arch)]
    text = "\n".join([f"triton {triton.__version__}", HEADER, *map(str, rows)])
    print(text)
    if options.save:
        options.save.write_text(text + "\n")
    spilled = any(row.spills for rows in usual.values() for row in rows)
    return 1 if spilled or any(row.shared > SHARED[row.arch] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
