"""Pipelines of diffusers that are not in the table: guided with found facts, or refused, as the README says of each."""

import pathlib

import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation, UnsupportedPipelineError
from stgfast.integrations import ADAPTERS
from tests.precision import distance, same
from tests.proof import untabled

pytestmark = pytest.mark.usefixtures("float64")

PAGE = pathlib.Path(stgfast.__file__).parent / "integrations" / "README.md"


@pytest.mark.parametrize("family", untabled.FOUND.values(), ids=untabled.FOUND)
def test_found(family):
    early, late = family.layers
    kind = family.kinds[-1]
    guidance = Guidance(
        [Perturbation([early, late], kind=kind, scale=1.5), Perturbation([late], scale=0.5)], rescale=0.5
    )
    stock = family.pipe()
    assert type(stock).__name__ not in ADAPTERS
    assert f"`{type(stock).__name__}`" in PAGE.read_text()
    plain = family.run(stock)
    pipe = stgfast.accelerate(family.pipe(), guidance)
    made = family.run(pipe)
    same(made, family.plain(guidance))
    assert distance(made, plain) > 1e-3
    assert torch.equal(family.run(pipe, stg_scale=0.0), plain)
    assert torch.equal(family.run(stgfast.restore(pipe)), plain)


@pytest.mark.float32
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", untabled.REFUSED)
def test_refused(name):
    build, arguments, message = untabled.REFUSED[name]
    assert f"| `{name}` |" in PAGE.read_text()
    pipe = stgfast.accelerate(build(), Guidance(Perturbation([1])))
    assert type(pipe).__name__ == name
    with pytest.raises(UnsupportedPipelineError, match=message), torch.no_grad():
        pipe(**arguments(1))
    with torch.no_grad():
        assert pipe(**arguments(1), stg_scale=0.0)[0].isfinite().all()  # the pipeline is left as it was


@pytest.mark.float32
def test_one_that_fails_itself():
    build, arguments = untabled.BROKEN
    with pytest.raises(TypeError, match="text_encoder_index"):
        build()(**arguments(1))
