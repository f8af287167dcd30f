"""Replacing scaled dot product attention: for every caller in one thread, and in no other thread."""

import threading

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from stgfast.batching.sdpa import answering

BACKENDS = attention_dispatch._AttentionBackendRegistry._backends
Q, K, V = (torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))  # as diffusers has it


class Processor:
    _attention_backend = None
    _parallel_config = None


class Attending(torch.nn.Module):
    """An attention that calls torch or diffusers."""

    def __init__(self, through, backend=None):
        super().__init__()
        self.processor, self.through = Processor(), through
        self.processor._attention_backend = backend

    def forward(self, mask=None):
        if self.through == "torch":
            heads = (x.transpose(1, 2) for x in (Q, K, V))
            return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)
        return dispatch_attention_fn(Q, K, V, attn_mask=mask, backend=self.processor._attention_backend)


WAYS = {
    "torch": Attending("torch"),
    "diffusers": Attending("diffusers"),
    "a backend of torch's": Attending("diffusers", "_native_math"),
    "another backend": Attending("diffusers", AttentionBackendName.FLEX),
}
every = pytest.mark.parametrize("attention", WAYS.values(), ids=WAYS)


def values(scores):
    return scores.v


@every
def test_a_call_is_answered(attention):
    before = dict(BACKENDS)
    with answering(attention, values):
        assert torch.equal(attention(), V)
    assert before == BACKENDS


@every
def test_what_was_chosen_can_be_called(attention, monkeypatch):
    name = AttentionBackendName(attention.processor._attention_backend or "native")
    called, stock = [], BACKENDS[name]

    def counted(query, **others):
        called.append(len(query))
        return V + 1 if name is AttentionBackendName.FLEX else stock(query=query, **others)

    def first_row(scores):
        attend = scores.attend or F.scaled_dot_product_attention
        given = (scores.q[:1], scores.k[:1], scores.v[:1], None if scores.mask is None else scores.mask[:1])
        return attend(*given, 0.5) if scores.attend else attend(*given, scale=0.5)  # 0.5: the usual scale

    monkeypatch.setitem(BACKENDS, name, counted)
    mask = torch.tensor([[True] * 4 + [False], [True] * 5])
    if attention is not WAYS["diffusers"]:  # the only one that takes a mask of keys in this form
        mask = mask[:, None, None]
    expected = stock(query=Q, key=K, value=V, attn_mask=mask) if name is not AttentionBackendName.FLEX else V + 1
    with answering(attention, first_row):
        made = attention(mask)
    torch.testing.assert_close(made, expected[: len(made)])
    if attention.processor._attention_backend:
        assert called == [1]
    assert BACKENDS[name] is counted


@every
def test_another_thread_attends_as_ever(attention):
    """One clip is decoded while the next one is denoised."""
    expected = {name: each() for name, each in WAYS.items() if "another" not in name}
    meanwhile = {}

    def decode():
        meanwhile.update({name: WAYS[name]() for name in expected})

    def wait(scores):
        thread = threading.Thread(target=decode)
        thread.start()
        thread.join()
        return scores.v

    with answering(attention, wait):
        attention()
    assert meanwhile.keys() == expected.keys()
    assert all(torch.equal(meanwhile[name], out) for name, out in expected.items())


def test_two_threads_that_stand_in_for_one_backend():
    """The first thread to leave keeps the replacement for the other."""
    attention, backend = WAYS["a backend of torch's"], AttentionBackendName._NATIVE_MATH
    before, inside, leave = BACKENDS[backend], threading.Event(), threading.Event()
    made = []

    def other():
        with answering(attention, values):
            inside.set()
            leave.wait(10)
            made.append(attention())

    thread = threading.Thread(target=other)
    with answering(attention, values):
        thread.start()
        inside.wait(10)
    assert BACKENDS[backend] is not before
    leave.set()
    thread.join()
    assert torch.equal(made[0], V)
    assert BACKENDS[backend] is before


def test_heads_that_share_keys():
    shared = K[:, :, :1], V[:, :, :1]

    class Grouped(Attending):
        def forward(self):
            q, k, v = (x.transpose(1, 2) for x in (Q, *shared))
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

    with answering(Grouped("torch"), values) as _:
        assert torch.equal(Grouped("torch")(), shared[1].expand_as(Q))
