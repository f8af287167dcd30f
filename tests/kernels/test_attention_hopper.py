"""Attention with descriptors and warp specialisation: against float64, in the interpreter or on Hopper."""

import math

import pytest
import torch
import triton.language as tl
from hypothesis import example, given, settings

from stgfast.kernels import attention_hopper, layout
from stgfast.kernels.attention_hopper import masked_attention, unsuitable
from tests.kernels import interpreter  # noqa: F401  (repairs it)
from tests.kernels.test_attention import DEVICE, PLAIN, calls, exact, filled, made, tensor

NOTHING = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16, device=DEVICE)
REASON = unsuitable(NOTHING, NOTHING, NOTHING, None)
runs = pytest.mark.skipif(bool(REASON), reason=f"the kernel {REASON}")
descriptors = pytest.mark.skipif(not hasattr(tl, "make_tensor_descriptor"), reason="the kernel needs descriptors")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Outputs start as NaN, so elements that are not written are noticed."""
    plain = layout.empty_like_query
    monkeypatch.setattr(attention_hopper, "empty_like_query", lambda q, rows: plain(q, rows).fill_(math.nan))


def attended(q, k, v, identity=None, source=None, tokens=None, kv_len=None, scale=None):
    source = list(range(len(q))) if source is None else source
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    identity = [False] * len(source) if identity is None else identity
    return masked_attention(q, k, v, identity, source, tokens or (0, q.shape[2]), kv_len, None, scale)


def check(q, k, v, **options):
    """The error is at most twice torch's own in that dtype, and one rounding."""
    right = exact(q, k, v, **options)
    plain = filled(q, k, v, **options)
    allowed = 2 * ((plain.double() - right).abs().max() + torch.finfo(q.dtype).eps * right.abs().max())
    out = attended(q, k, v, **options)
    assert out.dtype == q.dtype
    assert out.shape == right.shape
    assert not out.isnan().any()
    assert (out.double() - right).abs().max() <= allowed
    source = options.get("source") or range(len(q))
    first, last = options.get("tokens") or (0, q.shape[2])
    for row, same in enumerate(options.get("identity") or []):
        if same:
            assert torch.equal(out[row, :, first:last], v[source[row], :, first:last])


def fitting(call):
    """A call for any implementation, changed to one that this implementation takes."""
    *sizes, size = call["shape"]
    dtype = "fp16" if call["dtype"] == "fp16" else "bf16"
    return {**call, "shape": (*sizes, min(size, 128)), "dtype": dtype, "bias": None}


THREE_TILES = {**PLAIN, "shape": (2, 1, 300, 300, 32), "tokens": (100, 270)}


@runs
@given(calls().map(fitting))
@settings(max_examples=12)
@example(PLAIN)
@example({**PLAIN, "shape": (2, 2, 256, 256, 128), "dtype": "fp16"})
@example({**PLAIN, "shape": (1, 1, 130, 130, 8), "source": [0, 0, 0]})
@example({**THREE_TILES, "identity": [True, False, True]})
@example({**THREE_TILES, "kv_len": [303, 0]})
@example({**THREE_TILES, "kv_len": [-1, 128], "orders": ["strided", "heads outside", "strided"]})
def test_every_option_against_float64(call):
    q, k, v, options = made(call)
    check(q, k, v, **options)


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_row_without_keys_gives_0(dtype):
    q, k, v = (tensor(2, 1, 140, 64, dtype=dtype, order="heads inside", seed=i) for i in range(3))
    out = attended(q, k, v, kv_len=torch.tensor([140, 0], dtype=torch.int32, device=DEVICE))
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out[0].abs().min() > 0


@runs
@pytest.mark.parametrize("reach", [50, 128])
def test_keys_beyond_kv_len_are_never_read(reach):
    q, k, v = (tensor(1, 1, 190, 32, dtype=torch.float16, order="heads outside", seed=i) for i in range(3))
    short = torch.tensor([reach], dtype=torch.int32, device=DEVICE)
    expected = attended(q, k, v, kv_len=short)
    k[:, :, reach:], v[:, :, reach:] = math.nan, math.nan
    assert torch.equal(attended(q, k, v, kv_len=short), expected)


@runs
def test_large_scores_do_not_overflow():
    check(*(30 * tensor(1, 2, 190, 64, dtype=torch.bfloat16, order="heads inside", seed=i) for i in range(3)))


@runs
def test_scores_far_below_0_are_not_lost_beside_the_tail():
    q, k, v = (tensor(1, 1, 70, 64, dtype=torch.float16, order="heads outside", seed=i).abs() for i in range(3))
    check(q, -30 * k, v)


@runs
@pytest.mark.parametrize("order", ["heads outside", "heads inside"])
def test_outputs_have_the_memory_order_of_queries(order):
    q, k, v = (tensor(2, 3, 20, 32, dtype=torch.bfloat16, order=order, seed=i) for i in range(3))
    assert attended(q, k, v, [False, True]).transpose(1, 2).is_contiguous() == (order == "heads inside")


@runs
def test_a_compiled_graph_keeps_the_operation_whole():
    q, k, v = (tensor(2, 2, 33, 32, dtype=torch.float16, order="heads inside", seed=i) for i in range(3))
    options = ([False, False, True], [0, 1, 1], [0, 33], None, None, 0.2)
    torch.library.opcheck(masked_attention, (q, k, v, *options))
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    def call(q, k, v):
        return masked_attention(q, k, v, *options) + 1

    compiled = torch.compile(call, fullgraph=True, backend=backend)(q, k, v)
    assert torch.equal(compiled, call(q, k, v))
    assert len(graphs) == 1
    assert any("stgfast.masked_attention_hopper" in target for target in graphs[0])


@runs
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a gpu: a host sync is found by CUDA's own debug mode")
def test_no_host_sync_on_a_gpu():
    q, k, v, options = made({**PLAIN, "kv_len": [100, 130]})
    attended(q, k, v, **options)  # moves the plan's numbers to the device, and compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        attended(q, k, v, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def heads_of(size, dtype=torch.bfloat16, shift=0, extra=0):
    """(1, 2, 5, size), with the memory `shift` elements later and `extra` elements between tokens."""
    step = size + extra
    return torch.zeros(10 * step + shift, dtype=dtype)[shift:].reshape(1, 2, 5, step)[..., :size]


FINE = heads_of(64)
COLUMNS = torch.zeros(1, 2, 64, 5, dtype=torch.bfloat16).mT
UNSUITABLE = {
    "bias": ((FINE, FINE, FINE, FINE), "takes no mask and no bias"),
    "float32": ((heads_of(64, torch.float32),) * 3, "takes torch.float16 and torch.bfloat16, not torch.float32"),
    "too large": ((heads_of(136),) * 3, "takes sizes of a head that are multiples of 8 up to 128, not 136"),
    "odd": ((heads_of(68),) * 3, "takes sizes of a head that are multiples of 8 up to 128, not 68"),
    "a base": ((FINE, heads_of(64, shift=4), FINE), "needs rows that begin at multiples of 16 bytes, unlike k"),
    "a stride": ((heads_of(64, extra=4), FINE, FINE), "needs rows that begin at multiples of 16 bytes, unlike q"),
    "columns": ((FINE, COLUMNS, COLUMNS), "needs rows that begin at multiples of 16 bytes, unlike k and v"),
}


@descriptors
@pytest.mark.parametrize("name", UNSUITABLE)
def test_what_it_cannot_compute_it_refuses(name):
    tensors, reason = UNSUITABLE[name]
    q, k, v, bias = (*tensors, None)[:4]
    assert unsuitable(q, k, v, bias) == reason
    with pytest.raises(ValueError, match=f"masked attention for Hopper {reason}"):
        masked_attention(q, k, v, [False], [0], [0, 5], None, bias, 0.1)


@descriptors
def test_what_it_can_compute_it_does_not_refuse():
    for size in (8, 40, 64, 72, 128):
        spaced = heads_of(size, shift=8, extra=16)
        assert not unsuitable(spaced, spaced, heads_of(size, torch.bfloat16).transpose(1, 2), None)


def test_another_chip_or_an_old_triton_is_refused(monkeypatch):
    monkeypatch.setattr(attention_hopper, "capability", lambda device: 10)
    monkeypatch.setattr(tl, "make_tensor_descriptor", None, raising=False)
    assert unsuitable(FINE, FINE, FINE, None) == "needs compute capability 9, not 10"
    monkeypatch.delattr(tl, "make_tensor_descriptor")
    assert unsuitable(FINE, FINE, FINE, None).startswith("needs triton 3.4 or later, not 3.")
