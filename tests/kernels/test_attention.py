"""Attention over a stack of rows: each implementation against float64, Triton's kernel in its interpreter."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stgfast.kernels import attention, backends, layout, reference
from stgfast.kernels.backends import BACKENDS, NAMES, masked_attention, unavailable
from tests.kernels import interpreter  # noqa: F401  (repairs it)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Libraries for GPUs refuse some calls.
FOR_A_GPU = [name for name, backend in BACKENDS.items() if backend.devices]
IMPLS = [name for name in NAMES if name not in ("auto", "hopper", *FOR_A_GPU) and not unavailable(name, DEVICE, True)]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Outputs start as NaN, so elements that are not written are noticed."""

    def poisoned(q, rows):
        return plain(q, rows).fill_(math.nan)

    plain = layout.empty_like_query
    for module in (attention, backends):
        monkeypatch.setattr(module, "empty_like_query", poisoned)


def tensor(*shape, dtype, order, seed):
    rows, heads, tokens, size = shape
    generator = torch.Generator().manual_seed(seed)
    if order == "heads inside":
        made = torch.randn(rows, tokens, heads, size, generator=generator).transpose(1, 2)
    elif order == "strided":
        made = torch.randn(rows, heads, 2 * tokens, size + 8, generator=generator)[:, :, ::2, :size]
    else:
        made = torch.randn(rows, heads, tokens, size, generator=generator)
    made = made.to(DEVICE)
    low = torch.empty_strided(made.shape, made.stride(), dtype=dtype, device=DEVICE)
    return low.copy_(made)


def exact(q, k, v, **options):
    """The specification, which takes key counts as a tensor."""
    wide = {n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in options.items()}
    return filled(q.double(), k.double(), v.double(), **wide)


def filled(q, k, v, identity=None, source=None, tokens=None, scale=None, **options):
    source = list(range(len(q))) if source is None else source
    if isinstance(options.get("kv_len"), list):
        options["kv_len"] = torch.tensor(options["kv_len"], dtype=torch.int32, device=q.device)
    return reference.masked_attention(
        q, k, v, identity or [False] * len(source), source=source, tokens=tokens or (0, q.shape[2]),
        scale=q.shape[-1] ** -0.5 if scale is None else scale, **options,
    )  # fmt: skip


def check(impl, q, k, v, **options):
    """The error is at most twice torch's own in that dtype, and one rounding."""
    right = exact(q, k, v, **options)
    plain = filled(q, k, v, **options)
    allowed = 2 * ((plain.double() - right).abs().max() + torch.finfo(q.dtype).eps * right.abs().max())
    out = masked_attention(q, k, v, impl=impl, **options)
    assert out.dtype == q.dtype
    assert out.shape == right.shape
    assert not out.isnan().any()
    assert (out.double() - right).abs().max() <= allowed
    identity, source = options.get("identity"), options.get("source") or list(range(len(q)))
    first, last = options.get("tokens") or (0, q.shape[2])
    for row, same in enumerate(identity or []):
        if same:
            assert torch.equal(out[row, :, first:last], v[source[row], :, first:last])
    return out


@st.composite
def calls(draw):
    rows, heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    size = draw(st.sampled_from([32, 40, 64, 72, 80, 96, 128, 256]))
    queries = draw(st.sampled_from([1, 16, 63, 130, 200]))
    many = draw(st.integers(rows, rows + 2))
    source = draw(st.lists(st.integers(0, rows - 1), min_size=many, max_size=many))
    identity = draw(st.lists(st.booleans(), min_size=many, max_size=many))
    keys = queries if any(identity) else draw(st.sampled_from([1, 31, 64, 150]))
    first = draw(st.integers(0, queries - 1))
    return {
        "shape": (rows, heads, queries, keys, size),
        "dtype": draw(st.sampled_from(list(DTYPES))),
        "orders": draw(st.lists(st.sampled_from(["heads outside", "heads inside", "strided"]), min_size=3, max_size=3)),
        "source": source,
        "identity": identity,
        "tokens": draw(st.sampled_from([None, (first, queries), (0, first + 1)])),
        "kv_len": draw(st.one_of(st.none(), st.lists(st.integers(-1, keys + 3), min_size=rows, max_size=rows))),
        "bias": draw(st.sampled_from([None, "mask", "added"])),
        "wide": draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        "scale": draw(st.sampled_from([None, 0.3])),
    }


def made(call):
    rows, heads, queries, keys, size = call["shape"]
    dtype, (q_order, k_order, v_order) = DTYPES[call["dtype"]], call["orders"]
    q = tensor(rows, heads, queries, size, dtype=dtype, order=q_order, seed=1)
    k = tensor(rows, heads, keys, size, dtype=dtype, order=k_order, seed=2)
    v = tensor(rows, heads, keys, size, dtype=dtype, order=v_order, seed=3)
    options = {name: call[name] for name in ("source", "identity", "tokens", "scale")}
    if call["kv_len"] is not None:
        options["kv_len"] = torch.tensor(call["kv_len"], dtype=torch.int32, device=DEVICE)
    if call["bias"]:
        sizes = [size if wide else 1 for wide, size in zip(call["wide"], (rows, heads, queries), strict=True)]
        numbers = torch.randn(*sizes, keys, generator=torch.Generator().manual_seed(4)).to(DEVICE)
        options["bias"] = numbers > -0.5 if call["bias"] == "mask" else numbers.to(dtype)
    return q, k, v, options


PLAIN = {
    "shape": (2, 2, 130, 130, 64), "dtype": "bf16", "orders": ["heads inside"] * 3, "source": [0, 1, 1],
    "identity": [False, False, True], "tokens": None, "kv_len": None, "bias": None, "wide": (False,) * 3, "scale": None,
}  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@given(calls())
@settings(max_examples=12)
@example(PLAIN)
@example({**PLAIN, "dtype": "fp32", "kv_len": [130, 0], "tokens": (60, 130)})
@example({**PLAIN, "dtype": "fp16", "bias": "mask", "wide": (True, True, True)})
@example({**PLAIN, "identity": [True, True, True], "bias": "added"})
def test_every_option_against_float64(impl, call):
    q, k, v, options = made(call)
    check(impl, q, k, v, **options)
    if call["kv_len"] is not None and impl != "triton":  # which gets a tensor in any case
        check(impl, q, k, v, **{**options, "kv_len": [min(max(n, 0), k.shape[2]) for n in call["kv_len"]]})


@pytest.mark.parametrize("impl", FOR_A_GPU)
def test_those_for_a_gpu(impl):
    for bias in (None, "mask", "added") if BACKENDS[impl].takes_bias else (None,):
        reason = unavailable(impl, DEVICE, bias is not None)
        if reason:
            pytest.skip(f"needs a GPU: it {reason}")
        for keys in (130, 64):
            q, k, v, options = made({**PLAIN, "shape": (2, 2, 130, keys, 64), "identity": None, "bias": bias})
            check(impl, q, k, v, **options)
        q, k, v, options = made({**PLAIN, "bias": bias})
        check(impl, q, k, v, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_with_no_key_gives_0(impl, dtype):
    q, k, v = (tensor(2, 1, 40, 64, dtype=DTYPES[dtype], order="heads outside", seed=i) for i in range(3))
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool, device=DEVICE)
    mask[1, :, 3] = False
    out = masked_attention(q, k, v, bias=mask, impl=impl)
    assert torch.equal(out[1, :, 3], torch.zeros_like(out[1, :, 3]))
    out = masked_attention(q, k, v, kv_len=torch.tensor([40, 0], dtype=torch.int32, device=DEVICE), impl=impl)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out[0].abs().min() > 0
    assert torch.equal(masked_attention(q, k, v, kv_len=[40, 0], impl=impl)[1], torch.zeros_like(out[1]))


@pytest.mark.parametrize("impl", IMPLS)
def test_keys_beyond_kv_len_are_never_read(impl):
    q, k, v = (tensor(1, 1, 70, 32, dtype=torch.float32, order="heads outside", seed=i) for i in range(3))
    short = torch.tensor([50], dtype=torch.int32, device=DEVICE)
    expected = masked_attention(q, k, v, kv_len=short, impl=impl)
    k[:, :, 50:], v[:, :, 50:] = 1e4, -1e4
    assert torch.equal(masked_attention(q, k, v, kv_len=short, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_scores_do_not_overflow(impl):
    q, k, v = (30 * tensor(1, 2, 90, 64, dtype=torch.bfloat16, order="heads inside", seed=i) for i in range(3))
    check(impl, q, k, v)


def test_outputs_have_the_memory_order_of_queries():
    for order, impl in itertools.product(["heads outside", "heads inside"], IMPLS):
        q, k, v = (tensor(2, 3, 20, 32, dtype=torch.float32, order=order, seed=i) for i in range(3))
        out = masked_attention(q, k, v, [False, True], impl=impl)
        if impl != "reference":
            assert out.transpose(1, 2).is_contiguous() == (order == "heads inside"), impl


def test_a_compiled_graph_keeps_the_operation_whole():
    q, k, v = (tensor(2, 2, 33, 32, dtype=torch.float32, order="heads inside", seed=i) for i in range(3))
    options = ([False, False, True], [0, 1, 1], [0, 33], None, None, 0.2)
    torch.library.opcheck(attention.masked_attention, (q, k, v, *options))
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    def call(q, k, v):
        return masked_attention(q, k, v, options[0], source=options[1], scale=0.2, impl="triton") + 1

    compiled = torch.compile(call, fullgraph=True, backend=backend)(q, k, v)
    assert torch.equal(compiled, call(q, k, v))
    assert len(graphs) == 1
    assert any("stgfast.masked_attention" in target for target in graphs[0])


Q = torch.zeros(2, 3, 8, 32)
LONG = torch.zeros(2, 3, 9, 32)
WRONG = {
    "three dimensions": ((Q[0], Q, Q), {}, "shape of q: got (3, 8, 32), expected (rows, heads, tokens, size)"),
    "another dtype": ((Q, Q.half(), Q), {}, "dtype of k: got torch.float16, expected that of q"),
    "whole numbers": ((Q.int(), Q.int(), Q.int()), {}, "dtype of q: got torch.int32"),
    "another device": ((Q, Q, Q.to("meta")), {}, "device of v: got meta, expected cpu, as q"),
    "a last stride": ((Q, Q.mT.contiguous().mT, Q), {}, "last stride of k: got 8, expected 1"),
    "too large a head": ((torch.zeros(1, 1, 2, 264),) * 3, {}, "size of a head: got 264, expected 1 to 256"),
    "other heads": ((Q, Q[:, :1], Q[:, :1]), {}, "shape of k: got (2, 1, 8, 32), expected (2, 3, keys, 32), as q"),
    "other values": ((Q, LONG, Q), {}, "shape of v: got (2, 3, 8, 32), expected (2, 3, 9, 32), as k"),
    "a source beyond": ((Q, Q, Q), {"source": [0, 2]}, "source: got [0, 2], expected rows of q, from 0 to 1"),
    "a source below": ((Q, Q, Q), {"source": [-1]}, "source: got [-1], expected rows of q"),
    "no source": ((Q, Q, Q), {"source": []}, "source: got [], expected rows of q"),
    "too few flags": ((Q, Q, Q), {"identity": [True]}, "identity: got 1 flags, expected 2, one for every output row"),
    "tokens beyond": ((Q, Q, Q), {"tokens": (0, 9)}, "tokens: got (0, 9), expected first and one past last, within"),
    "no tokens": ((Q, Q, Q), {"tokens": (3, 3)}, "tokens: got (3, 3)"),
    "identity across": ((Q, LONG, LONG), {"identity": [True, False]}, "keys, where a row is the identity: got 9"),
    "kv_len of rows": ((Q, Q, Q), {"kv_len": torch.ones(3, dtype=torch.int32)}, "kv_len: got (3,), torch.int32, cpu"),
    "kv_len beyond the keys": ((Q, Q, Q), {"kv_len": [1, 99]}, "kv_len: got [1, 99], expected 2 numbers from 0 to"),
    "kv_len in int64": ((Q, Q, Q), {"kv_len": torch.ones(2, dtype=torch.int64)}, "kv_len: got (2,), torch.int64, cpu"),
    "bias of keys": (
        (Q, Q, Q),
        {"bias": torch.zeros(2, 1, 1, 7)},
        "shape of bias: got (2, 1, 1, 7), expected (2, 3, 8",
    ),
    "bias of rows": ((Q, Q, Q), {"bias": torch.zeros(3, 1, 1, 8)}, "shape of bias: got (3, 1, 1, 8)"),
    "whole bias": ((Q, Q, Q), {"bias": torch.zeros(1, 1, 1, 8).int()}, "dtype of bias: got torch.int32"),
    "a negative scale": ((Q, Q, Q), {"scale": -0.5}, "scale: got -0.5, expected a finite number above 0"),
    "an unknown name": ((Q, Q, Q), {"impl": "fast"}, "impl: got 'fast', expected one of auto, reference, triton, "),
    "a GPU's": (
        (Q, Q, Q),
        {"impl": "cudnn"},
        "impl: got 'cudnn', expected another implementation, since it runs on cuda, not on cpu",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_say_so(name):
    tensors, options, message = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        masked_attention(*tensors, **options)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a gpu: a host sync is found by CUDA's own debug mode")
@pytest.mark.parametrize("impl", [name for name in (*IMPLS[1:], *FOR_A_GPU) if not unavailable(name, DEVICE, True)])
def test_no_host_sync_on_a_gpu(impl):
    q, k, v, options = made({**PLAIN, "kv_len": [100, 130]})
    masked_attention(q, k, v, impl=impl, **options)  # moves the plan's numbers to the device, and compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        masked_attention(q, k, v, impl=impl, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
