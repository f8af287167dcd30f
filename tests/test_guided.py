"""Guidance within a sampler that is not a pipeline: what is refused, and what is required."""

import pytest
import torch

import stgfast
from stgfast import EngineError, Guidance, Perturbation, SettingsError, UnsupportedPipelineError
from tests import open_sora
from tests.precision import same

pytestmark = pytest.mark.usefixtures("float64")

GUIDANCE = Guidance(Perturbation([1]))


def call(model, rows=2, alike=True):
    """One call of the model of Open-Sora 2.0."""
    generator = torch.Generator().manual_seed(0)
    img = torch.randn(1 if alike else rows, 5, 8, generator=generator).expand(rows, -1, -1)
    ids = torch.zeros(rows, 9, 3)
    text, pooled = torch.randn(rows, 4, 8, generator=generator), torch.randn(rows, 6, generator=generator)
    with torch.no_grad():
        return model(
            img=img,
            img_ids=ids[:, :5],
            txt=text,
            txt_ids=ids[:, :4],
            timesteps=torch.ones(rows),
            y_vec=pooled,
        )


@pytest.fixture
def model():
    return open_sora.built(open_sora.MMDiTModel)


def test_the_block_is_all_that_is_guided(model):
    before = call(model, 3)
    with stgfast.guided(model, GUIDANCE, steps=1):
        inside = call(model, 3)
    assert not torch.allclose(inside, before)
    assert torch.equal(call(model, 3), before)
    added = inside - before
    same(added, added[:1].expand_as(added))


def test_a_model_without_cfg(model):
    """One row for each prompt; a rescale then needs no scale."""
    guidance = Guidance(Perturbation([1], scale=2.0), rescale=1.0)
    before = call(model, 2, alike=False)
    with stgfast.guided(model, guidance, steps=1, cfg=False):
        made = call(model, 2, alike=False)
    assert not torch.allclose(made, before)
    same(made.flatten(1).std(dim=1), before.flatten(1).std(dim=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": GUIDANCE, "steps": 0}, "steps: got 0"),
        ({"guidance": "strong", "steps": 3}, "guidance: got 'strong'"),
        ({"guidance": GUIDANCE, "steps": 3, "max_rows": 0}, "max_rows: got 0"),
        ({"steps": 3}, r"layers.*got \[13\]"),
        ({"guidance": Guidance(Perturbation([9])), "steps": 3}, r"layers.*got \[9\].*numbers from 0 to 6"),
        ({"guidance": Guidance(Perturbation([1], kind="attention")), "steps": 3}, "expected 'residual'"),
        ({"guidance": Guidance(Perturbation([1], axis="spatial")), "steps": 3}, "expected none for this model"),
        ({"guidance": Guidance(Perturbation([1], scale=[1.0, 2.0])), "steps": 3}, "got 2 numbers, expected 3"),
        ({"guidance": Guidance(Perturbation([1]), rescale=0.7), "steps": 3}, "it has two"),
        ({"guidance": Guidance(Perturbation([1]), cfg=3.0), "steps": 3}, "it has two"),
        ({"guidance": Guidance(Perturbation([1], base="guided")), "steps": 3}, "it has two"),
        (
            {"guidance": Guidance(Perturbation([1], of="uncond")), "steps": 3, "cfg": False},
            "leaves out the rows of CFG",
        ),
    ],
)
def test_what_cannot_be_is_said_at_once(model, settings, message):
    with pytest.raises(SettingsError, match=message), stgfast.guided(model, **settings):
        raise AssertionError("the block was entered")


def test_in_1_2_a_rescale_needs_the_scale():
    model = open_sora.built(open_sora.STDiT3)
    guidance = Guidance(Perturbation([1]), rescale=0.7)
    with pytest.raises(SettingsError, match=r"Guidance\(\.\.\., cfg=7\.0\)"), stgfast.guided(model, guidance, steps=3):
        pass


def test_models_that_are_not_known():
    class STDiT3(open_sora.STDiT3):
        def forward(self, x, timestep, y, mask=None, x_mask=None, fps=None, height=None, width=None, y_null=None):
            raise NotImplementedError

    spread = open_sora.built(open_sora.STDiT3)
    spread.enable_sequence_parallelism = True
    for model, message in (
        (torch.nn.Linear(1, 1), "got Linear, expected one of MMDiTModel, STDiT3"),
        (STDiT3(), "another version than 1.2, with y_null"),
        (spread, "split over processes"),
    ):
        with pytest.raises(UnsupportedPipelineError, match=message), stgfast.guided(model, GUIDANCE, steps=3):
            pass


def test_a_model_compiled_as_a_whole_is_refused(model):
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(SettingsError, match="compiled as a whole"), stgfast.guided(compiled, GUIDANCE, steps=3):
        pass


def test_rows_that_are_not_those_of_cfg_are_refused(model):
    for rows, alike in ((2, True), (3, False)):
        with (
            pytest.raises(EngineError, match=r"guided\(\.\.\., cfg=False\)"),
            stgfast.guided(model, GUIDANCE, steps=1),
        ):
            call(model, rows, alike)


@pytest.mark.parametrize("made", [0, 1, 3])
def test_other_steps_than_were_said(model, made):
    def run():
        with stgfast.guided(model, GUIDANCE, steps=2):
            for _ in range(made):
                call(model, 3)

    with pytest.raises(EngineError, match="denoising steps"):
        run()
    assert all("_compiled_call_impl" not in vars(module) for module in model.modules())


def test_an_error_inside_is_the_samplers(model):
    with pytest.raises(KeyError, match="its own"), stgfast.guided(model, GUIDANCE, steps=2):
        raise KeyError("its own")
    assert all("_compiled_call_impl" not in vars(module) for module in model.modules())
