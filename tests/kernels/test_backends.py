"""The choice of an attention backend: what is measured, and what is never chosen."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stgfast.kernels import backends
from stgfast.kernels.backends import ANY, Backend, Call
from tests.conftest import switches


def call():
    q, k, v = (torch.randn(3, 2, 20, 16) for _ in range(3))
    return Call(q, k, v, (False, False, True), (0, 1, 2), (0, 20), None, None, 0.25)


def refusing(q, k, v, bias, scale):
    raise RuntimeError("no kernel for this shape\nand more about it")


def not_a_number(q, k, v, bias, scale):
    return torch.full_like(q, torch.nan)


def test_the_fastest_right_one_is_chosen(monkeypatch):
    right = backends.BACKENDS["sdpa"].attend
    others = {
        "sdpa": right,
        "slower": right,
        "faster": right,
        "wrong": lambda *given: right(*given) + 0.01,
        "broken": not_a_number,
        "refusing": refusing,
    }
    monkeypatch.setattr(backends, "BACKENDS", {name: Backend(f, ANY, takes_bias=True) for name, f in others.items()})
    times = iter([2.0, 3.0, 4.0, 1.0])
    monkeypatch.setattr(backends, "_milliseconds", lambda run: next(times))
    choice = backends._measured(call())
    assert choice.milliseconds == {"sdpa": 2.0, "triton": 3.0, "slower": 4.0, "faster": 1.0}
    assert choice.name == "faster"
    assert choice.failed["refusing"] == "no kernel for this shape"
    assert choice.failed["wrong"].startswith("differs from sdpa by 0.01")
    assert choice.failed["broken"].startswith("differs from sdpa by nan")


class Switches(TorchDispatchMode):
    """Which of torch's own backends may be chosen, at each operation. These switches are the same for all threads."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen.add(tuple(switches()["torch's"]))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["math", "flash", "efficient", "cudnn"])
def test_what_another_thread_attends_with_is_its_own_choice(name):
    """One clip is decoded while the next one is denoised."""
    backend = backends.BACKENDS[name]
    q, k, v = (torch.empty(2, 3, tokens, 64, device="meta", dtype=torch.bfloat16) for tokens in (50, 43, 43))
    mask = torch.empty(1, 1, 1, 43, device="meta", dtype=torch.bool)
    for bias in (None, mask, mask.to(q.dtype)) if backend.takes_bias else (None,):
        with Switches() as others:
            out = backend.attend(q, k, v, bias, 0.125)
        assert out.shape == q.shape
        assert others.seen == {(True,) * 4}


@pytest.mark.parametrize("identity", [None, [False, True, False]])
def test_a_kind_of_device_that_nothing_was_written_for(identity):
    """For example on a Mac: torch's own attention runs there."""
    q, k, v = (torch.empty(3, 2, 20, 16, device="meta") for _ in range(3))
    assert backends.masked_attention(q, k, v, identity, kv_len=[20, 3, 20]).shape == q.shape


@pytest.mark.parametrize("impl", ["auto", "sdpa", "reference"])
def test_under_autocast_as_torchs_own(impl):
    """Norms return float32, projections do not."""
    q, k, v = (torch.randn(2, 2, 20, 16) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v.bfloat16())
        made = backends.masked_attention(q, k, v.bfloat16(), [False, True], impl=impl)
        assert backends.masked_attention(q.double(), k.double(), v.double(), impl=impl).dtype == torch.float64
    assert made.dtype == expected.dtype == torch.bfloat16
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())[0]
    allowed = 2 * ((expected[0] - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max())
    assert (made[0] - exact).abs().max() <= allowed
    assert torch.equal(made[1], v[1].bfloat16())
