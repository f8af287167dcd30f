"""What only a GPU can show, or a CPU only half: no step waits for the device, and no step compiles anew."""

import dataclasses
import functools

import pytest
import torch

from stgfast import Guidance, Perturbation
from stgfast.bench.models import MODELS
from stgfast.bench.steps import measured
from stgfast.bench.variants import Bench
from stgfast.engine import GuidedRun
from tests.bench.test_steps import shallow

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))
BACKEND = {"cpu": "eager", "cuda": "inductor"}
STEPS = 4


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", ["mochi", "wan-14b", "hunyuan-video"])
def test_no_host_sync_in_a_step(name, device, monkeypatch):
    """From the second step on, denoiser and combination ask the device for nothing. On a CPU: that it is looked at."""
    modes = []
    set_mode = torch.cuda.set_sync_debug_mode if device == "cuda" else modes.append
    denoise = GuidedRun._denoise

    def watched(self, *given):
        if self.step == 0:
            return denoise(self, *given)
        set_mode("error")
        try:
            return denoise(self, *given)
        finally:
            set_mode("default")

    bench = Bench(shallow(name), "tiny", device, STEPS)
    bench.stgfast()  # kernels are compiled, and chosen
    monkeypatch.setattr(GuidedRun, "_denoise", watched)
    bench.stgfast()
    calls = 2 if name == "wan-14b" else 1
    assert device == "cuda" or modes == ["error", "default"] * calls * (STEPS - 1)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", ["mochi", "wan-14b", "hunyuan-video"])
def test_neither_steps_nor_schedules_compile_anew(name, device):
    """Once all blocks have run with the rows of a weak branch, and without."""
    torch.compiler.reset()
    bench = Bench(shallow(name), "tiny", device, 2, backend=BACKEND[device])
    layers = [bench.model.layer("tiny")]
    bench.guidance = Guidance(Perturbation(layers, scale=[1.0, 0.0]))
    bench.compiled()
    bench.steps = STEPS
    with torch.compiler.set_stance("fail_on_recompile"):
        for scale in (functools.partial(round, ndigits=1), [0.0, 1.0] * (STEPS // 2), 2.0):
            bench.guidance = Guidance(Perturbation(layers, scale=scale), rescale=0.5)
            assert bench.compiled().isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("size", ["tiny", "full"])
def test_a_result_of_a_gpu(size, monkeypatch):
    model = shallow("mochi")
    narrow = dict.fromkeys(("tiny", "full"), model.narrow["tiny"])
    clips = dict.fromkeys(("tiny", "full"), model.clips["tiny"])
    monkeypatch.setitem(MODELS, "mochi", dataclasses.replace(model, narrow=narrow, clips=clips))
    row = measured("mochi", size=size, device="cuda", rounds=1, variants=("stock", "paper", "compiled", "fastest"))
    assert row["peak_memory"].keys() == row["seconds"].keys()
    assert row["clock"] == "wall"
    assert row["attention_backend"]
