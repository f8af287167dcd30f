"""Kernels compiled ahead of time, without a GPU: registers, shared memory and matrix instructions of three chips."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton.language as tl

BENCH = Path(__file__).parents[2] / "bench"
CODE = """
import sys
sys.path.insert(0, sys.argv[1])
import resources
for usage in resources.defaults(int(sys.argv[2])):
    print(usage.name, usage.registers, usage.spills, usage.shared, usage.matrix, int(usage.specialised), sep="|")
    assert usage.shared <= resources.SHARED[usage.arch]
"""


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_default_configurations_fit_the_chip(arch):
    """In a separate process, because triton is the interpreter in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CODE, str(BENCH), str(arch)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    rows = [line.split("|") for line in ran.stdout.splitlines()]
    assert len(rows) >= 6
    hopper = sum(" hopper" in name for name, *_ in rows)
    assert hopper == (4 if arch == 90 and hasattr(tl, "make_tensor_descriptor") else 0)
    for name, registers, spills, _, matrix, specialised in rows:
        assert int(spills) == 0, name
        assert 0 < int(registers) <= 255, name
        if name.startswith("attention bf16"):
            assert int(matrix) > 0, f"{name}: not the chip's own matrix instructions"
        assert int(specialised) == (" hopper" in name), f"{name}: has every group of warps code of its own?"
