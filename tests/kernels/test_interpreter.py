"""The repair of Triton's interpreter: bfloat16 behaves there as elsewhere."""

import torch
import triton
import triton.language as tl

from tests.kernels import interpreter  # noqa: F401  (repairs it)


@triton.jit
def _arithmetic(x, y, total, product, wide, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i[:, None] * N + i[None, :])
    b = tl.load(y + i[:, None] * N + i[None, :])
    where = i[:, None] * N + i[None, :]
    tl.store(total + where, a + b)
    tl.store(product + where, tl.dot(a, b).to(tl.bfloat16))
    tl.store(wide + where, a.to(tl.float32))


def test_bfloat16():
    x, y = (torch.randn(16, 16).bfloat16() for _ in range(2))
    total, product = torch.empty_like(x), torch.empty_like(x)
    wide = torch.empty(16, 16)
    _arithmetic[(1,)](x, y, total, product, wide, N=16)
    assert torch.equal(total, x + y)
    assert torch.equal(product, (x.float() @ y.float()).bfloat16())
    assert torch.equal(wide, x.float())
