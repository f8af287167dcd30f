"""Who computes attention: what is measured, and what is never chosen."""

import torch

from stgfast.kernels import backends
from stgfast.kernels.backends import BOTH, Backend, Call


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
    monkeypatch.setattr(backends, "BACKENDS", {name: Backend(f, BOTH, takes_bias=True) for name, f in others.items()})
    times = iter([2.0, 3.0, 4.0, 1.0])
    monkeypatch.setattr(backends, "_milliseconds", lambda run: next(times))
    choice = backends._measured(call())
    assert choice.milliseconds == {"sdpa": 2.0, "triton": 3.0, "slower": 4.0, "faster": 1.0}
    assert choice.name == "faster"
    assert choice.failed["refusing"] == "no kernel for this shape"
    assert choice.failed["wrong"].startswith("differs from sdpa by 0.01")
    assert choice.failed["broken"].startswith("differs from sdpa by nan")
