"""One call of an attention module for all rows: with any processor, it gives the plain result or is refused."""

import dataclasses

import diffusers
import pytest
import torch
import torch.nn.functional as F

import stgfast
from stgfast import Guidance, Perturbation
from stgfast.errors import EngineError
from tests import precision
from tests.integrations.test_families import FAMILIES
from tests.precision import distance, same

pytestmark = pytest.mark.usefixtures("float64")
LTX, SDXL, KANDINSKY = FAMILIES["LTX"], FAMILIES["Stable Diffusion XL"], FAMILIES["Kandinsky 5"]
ONE = "all rows in one call of the module"
APART = "attending rows in one call of the module, only values for the others"


def guidance(family):
    early, late = family.layers
    return Guidance([Perturbation([late], kind="attention"), Perturbation([early, late], kind="attention")])


class Own:
    """The attention of LTX in other code; `attend` is the function to vary."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

        other = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(other)), attn.to_v(other)
        if image_rotary_emb is not None:
            q, k = apply_rotary_emb(q, image_rotary_emb), apply_rotary_emb(k, image_rotary_emb)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = self.attend(q, k, v, attention_mask).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


class RowByRow(Own):
    def attend(self, q, k, v, mask):
        rows = [F.scaled_dot_product_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(len(q))]
        return torch.cat(rows) if mask is None else F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class ByItself(Own):
    """An attention that does not call torch's."""

    def attend(self, q, k, v, mask):
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return torch.softmax(scores if mask is None else scores + mask, -1) @ v


class KeepsRows(Own):
    """An attention that remembers its rows, so that it cannot return more of them."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        rows = len(hidden_states)
        out = super().__call__(attn, hidden_states, *args, **kwargs)
        F.scaled_dot_product_attention  # noqa: B018  as the code of the library's processors has it
        return out.flatten(0, 1).unflatten(0, (rows, -1))

    def attend(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Causal(RowByRow):
    def attend(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class AddsInPlace(KeepsRows):
    """An attention that adds its input to its output in place, and divides it by earlier values."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        out = Own.__call__(self, attn, hidden_states, *args, **kwargs)
        F.scaled_dot_product_attention  # noqa: B018  as the code of the library's processors has it
        out += hidden_states * 0.1
        return out / hidden_states.norm(dim=-1, keepdim=True)


def with_processor(processor):
    """LTX with another processor for its self-attention."""

    def build(other=False):
        pipe = LTX.build(other=other)
        for block in pipe.transformer.transformer_blocks:
            block.attn1.set_processor(processor())
        return pipe

    return dataclasses.replace(LTX, build=build)


def ways(pipe, family):
    explained = stgfast.explain(pipe, **family.arguments(1))
    assert all(
        f"attention of block{'s' if len(b) > 1 else ''} " in str(explained) for b in explained.attention.values()
    )
    return explained.attention


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("processor", "before", "after"),
    [
        (RowByRow, {ONE: [1, 3]}, {f"{APART}, as RowByRow attends row by row": [1, 3]}),
        (ByItself, {ONE: [1, 3]}, {f"{APART}, as ByItself does not call torch's attention": [1, 3]}),
        (KeepsRows, {ONE: [1, 3]}, None),
    ],
)
def test_a_processor_of_ones_own(processor, before, after):
    expected = LTX.plain(guidance(LTX), prompts=2)
    pipe = stgfast.accelerate(with_processor(processor).build(), guidance(LTX), max_rows="all")
    assert ways(pipe, LTX) == before
    same(LTX.run(pipe, prompts=2), expected)
    assert ways(pipe, LTX) == (before if after is None else after)


@pytest.mark.interpreted
def test_a_causal_attention_goes_apart():
    family = with_processor(Causal)
    expected = family.plain(guidance(LTX))
    pipe = stgfast.accelerate(family.build(), guidance(LTX), max_rows="all")
    same(LTX.run(pipe), expected)
    assert f"{APART}, as Causal is causal" in ways(pipe, LTX)


@pytest.mark.parametrize("of_library", [True, False])
def test_what_a_processor_does_afterwards_it_does_to_identity_rows_too(monkeypatch, of_library):
    """Also with rows that a processor of the library kept, and with a single row."""
    if of_library:
        monkeypatch.setattr(AddsInPlace, "__module__", "diffusers.models.another")
    family, perturbed = with_processor(AddsInPlace), Guidance(Perturbation([1], kind="attention"))
    expected = family.plain(perturbed, prompts=2)
    for max_rows in ("all",) if of_library else ("all", 1):
        pipe = stgfast.accelerate(family.build(), perturbed, max_rows=max_rows)
        same(LTX.run(pipe, prompts=2), expected)
        assert ways(pipe, LTX) == {ONE if of_library else APART: [1]}


@pytest.mark.interpreted
def test_a_processor_of_the_library_that_keeps_its_rows_is_refused(monkeypatch):
    monkeypatch.setattr(KeepsRows, "__module__", "diffusers.models.another")
    pipe = stgfast.accelerate(with_processor(KeepsRows).build(), guidance(LTX), max_rows="all")
    with pytest.raises(EngineError, match="rows of LTXAttention: got 2, expected 3"):
        LTX.run(pipe)


def test_an_older_processor():
    expected = SDXL.plain(guidance(SDXL))
    pipe = SDXL.build()
    pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    stgfast.accelerate(pipe, guidance(SDXL), max_rows="all")
    (way,) = ways(pipe, SDXL)
    assert way == f"{APART}, as AttnProcessor does not call torch's attention"
    same(SDXL.run(pipe), expected)


@pytest.mark.interpreted
def test_a_function_in_place_of_torchs(monkeypatch):
    """A replaced function, as users of SageAttention have it."""
    expected = LTX.plain(guidance(LTX))

    def attend(query, key, value, attn_mask=None, scale=None, **others):
        return ByItself().attend(query, key, value, attn_mask)

    pipe = stgfast.accelerate(LTX.pipe(), guidance(LTX), max_rows="all")
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    same(LTX.run(pipe), expected)
    (way,) = ways(pipe, LTX)
    assert way == f"{APART}, as LTXVideoAttnProcessor does not call torch's attention"


def test_values_that_nobody_asks_for_are_not_made_up():
    """If the identity returns torch's values, torch's attention is not called."""

    class Silent(type(KANDINSKY.build().transformer.visual_transformer_blocks[0].self_attention.processor)):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return attn.out_layer(attn.to_value(hidden_states) * 2)

    pipe = KANDINSKY.build()
    for block in pipe.transformer.visual_transformer_blocks:
        block.self_attention.set_processor(Silent())
    stgfast.accelerate(pipe, guidance(KANDINSKY))
    with pytest.raises(EngineError, match="attention processor of Kandinsky5Attention: got Silent"):
        KANDINSKY.run(pipe)


@pytest.mark.interpreted
@pytest.mark.parametrize("backend", ["_native_math", "flex"])
def test_a_backend_that_was_chosen_computes_rows_that_attend(backend, monkeypatch):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    expected, stock = LTX.plain(guidance(LTX), prompts=2), LTX.run(LTX.pipe(), prompts=2)
    name, rows = AttentionBackendName(backend), []
    native = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]

    def counted(query, key, value, attn_mask=None, **others):
        if query.shape[1] == key.shape[1]:
            rows.append(len(query))
        return native(query, key, value, attn_mask=attn_mask)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, counted)
    pipe = LTX.build()
    for block in pipe.transformer.transformer_blocks:
        block.attn1.processor._attention_backend = name
    made = LTX.run(stgfast.accelerate(pipe, guidance(LTX), max_rows="all"), prompts=2)
    same(made, expected)
    assert distance(made, stock) > 1e-3
    # Two prompts, uncond and cond of each; two branches perturbed from layers 1 and 3 on.
    assert rows == 2 * [4, 4, 6, 4, 8, 8]
    assert ways(pipe, LTX) == {ONE: [1, 3]}


@pytest.mark.float32
@pytest.mark.parametrize("attention", [None, "auto"])
def test_under_autocast(attention):
    with precision.computing_in(torch.float64):
        exact = LTX.plain(guidance(LTX))
    with torch.autocast("cpu", torch.bfloat16):
        plain = LTX.plain(guidance(LTX))
        pipe = stgfast.accelerate(LTX.pipe(), guidance(LTX), max_rows="all", attention=attention)
        made = LTX.run(pipe)
    assert ONE in ways(pipe, LTX)
    precision.no_worse(made, plain, exact)


@pytest.mark.interpreted
def test_the_module_runs_once_for_rows_of_one_input():
    """At the first marked layer two rows have the same input, and are projected once."""
    pipe, rows = LTX.build(), []
    for block in pipe.transformer.transformer_blocks:
        block.attn1.to_k.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    stgfast.accelerate(pipe, guidance(LTX), max_rows="all")
    LTX.run(pipe)
    assert rows == 2 * [2, 2, 3, 3, 4, 4]


def test_on_a_cpu_whichever_projects_less():
    pipe, keys, values = LTX.build(), [], []
    for block in pipe.transformer.transformer_blocks:
        block.attn1.to_k.register_forward_pre_hook(lambda module, args: keys.append(len(args[0])))
        block.attn1.to_v.register_forward_pre_hook(lambda module, args: values.append(len(args[0])))
    stgfast.accelerate(pipe, guidance(LTX), max_rows="all")
    assert ways(pipe, LTX) == {ONE: [1], APART: [3]}
    LTX.run(pipe)
    assert keys == 2 * [2, 2, 3, 2, 4, 4]
    assert values == 2 * [2, 2, 3, 2, 2, 4, 4]
