"""`attention="auto"`: unperturbed layers use the fastest attention for their shape, and give the same result."""

import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation, SettingsError
from stgfast.batching import fastest
from stgfast.batching.fastest import Fastest
from stgfast.batching.one_call import Keys
from stgfast.batching.sdpa import Scores
from stgfast.explain import QUICK
from stgfast.integrations import ADAPTERS
from tests.integrations.test_families import FAMILIES
from tests.precision import distance, same

pytestmark = pytest.mark.usefixtures("float64")
ROWS, TOKENS = 2, 5
# Forms of masks: of keys, of keys for each query, additive, with a bias that is no mask of keys, and none.
SOME = {
    name: FAMILIES[name]
    for name in ("HunyuanVideo", "HunyuanVideo15", "Allegro", "LTX", "Mochi", "Wan", "Latte", "Stable Diffusion XL")
}


def first(*lengths):
    return torch.arange(TOKENS) < torch.tensor(lengths)[:, None]


def added(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, -10000.0)


HOLE = torch.tensor([[True, False, True, True, False], [True] * 5])
MASKS = {
    "of keys": (first(3, 5)[:, None, None], Keys((3, 5))),
    "the same for all rows": (first(3)[:, None, None], Keys((3, 3))),
    "of heads alike": (first(3, 5)[:, None, None].expand(-1, 4, -1, -1), Keys((3, 5))),
    "added": (added(first(3, 4)[:, None, None]), Keys((3, 4))),
    "of queries too": (first(3, 5)[:, None, None] & first(3, 5)[:, None, :, None], Keys((3, 5), queries=True)),
    "that leaves out nothing": (first(5, 5)[:, None, None], Keys(())),
    "none": (None, Keys(())),
    "with a hole": (HOLE[:, None, None], None),
    "of the last keys": (~first(2, 3)[:, None, None], None),
    "that leaves out all of a row": (first(0, 3)[:, None, None], None),
    "of queries otherwise": (first(3, 5)[:, None, None] & torch.ones(TOKENS, TOKENS).tril().bool(), None),
    "of heads apart": (torch.stack([first(3, 5), first(5, 5)], 1)[:, :, None], None),
    "numbers": (torch.randn(2, 1, 1, TOKENS, generator=torch.Generator().manual_seed(0)), None),
    "of two dimensions": (torch.ones(TOKENS, TOKENS).tril().bool(), None),
}


def scores(mask):
    """A call with four heads, or with the heads of the mask."""
    heads = 4 if mask is None or mask.ndim < 4 or mask.shape[1] == 1 else mask.shape[1]
    q, k, v = (torch.randn(ROWS, heads, TOKENS, 8) for _ in range(3))
    mask = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
    attend = torch.nn.functional.scaled_dot_product_attention
    return Scores(q, k, v, mask, None, None, lambda: attend(q, k, v, attn_mask=mask))


@pytest.mark.parametrize(("mask", "keys"), MASKS.values(), ids=MASKS)
def test_what_a_mask_says(mask, keys):
    call = scores(mask)
    assert Fastest(()).keys(call) == keys
    plain = call.plain()
    same(Fastest(()).attend(call), plain)


def test_a_mask_is_looked_at_once(monkeypatch):
    looks, look = [], fastest._keys
    monkeypatch.setattr(fastest, "_keys", lambda mask, rows: looks.append(mask.shape) or look(mask, rows))
    quick, call, other = Fastest(()), scores(MASKS["of keys"][0]), scores(first(3, 5)[:, None, None])
    assert [quick.keys(each) for each in (call, call, other, call)] == [Keys((3, 5))] * 4
    assert len(looks) == 2


@pytest.mark.parametrize("family", SOME.values(), ids=SOME)
def test_gives_the_same(family, monkeypatch):
    """Masks that were replaced by key counts are not passed on."""
    seen, attend = [], fastest.masked_attention

    def watched(*given, kv_len=None, bias=None, **others):
        seen.append((kv_len, bias))
        return attend(*given, kv_len=kv_len, bias=bias, **others)

    monkeypatch.setattr(fastest, "masked_attention", watched)
    guidance = Guidance([Perturbation([family.layers[1]], kind=kind) for kind in ("residual", "attention")])
    expected = family.plain(guidance, 2)
    pipe = stgfast.accelerate(family.pipe(), guidance, attention="auto", max_rows="all")
    explained = stgfast.explain(pipe, **family.arguments(2))
    made = family.run(pipe, 2)
    same(made, expected)
    assert distance(made, family.run(family.pipe(), 2)) > 1e-3
    assert seen
    (layout,) = ADAPTERS[type(pipe).__name__].layouts(pipe).values()
    assert explained.attention[QUICK] == [n for n, unit in enumerate(layout.units) if unit.layer is not None]
    if family.name in ("HunyuanVideo", "HunyuanVideo15"):
        assert any(lengths for lengths, _ in seen)
        assert not any(bias is not None for _, bias in seen)
    again = family.run(pipe, 2, stg_scale=0.0)
    same(again, family.run(family.pipe(), 2))
    stgfast.restore(pipe)
    assert all("_compiled_call_impl" not in vars(part) for model in family.denoisers(pipe) for part in model.modules())


def test_what_it_cannot_be():
    pipe = FAMILIES["Wan"].pipe()
    with pytest.raises(SettingsError, match="attention: got 'flash', expected 'auto', or None for the model's own"):
        stgfast.accelerate(pipe, attention="flash")
    with pytest.raises(SettingsError, match=r"attention and compile: got .* expected only one of them"):
        stgfast.accelerate(pipe, attention="auto", compile=True)
