"""What can be shown on a GPU only, or partly on a CPU: no step waits for the device, and no step compiles again."""

import contextlib
import dataclasses
import functools
import inspect

import diffusers
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from stgfast import Guidance, Perturbation
from stgfast.bench.models import MODELS
from stgfast.bench.steps import measured
from stgfast.bench.variants import Bench
from stgfast.engine import Run
from stgfast.integrations import ADAPTERS
from stgfast.kernels import backends
from tests.bench.test_steps import shallow

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))
BACKEND = {"cpu": "eager", "cuda": "inductor"}
STEPS = 4


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", ["mochi", "wan-14b", "hunyuan-video"])
def test_no_host_sync_in_a_step(name, device, monkeypatch):
    """From the second step on, denoiser and combination do not read from the device. On a CPU, only the check itself is
    tested.
    """
    modes = []
    set_mode = torch.cuda.set_sync_debug_mode if device == "cuda" else modes.append
    denoise = Run._denoise

    def watched(self, *given):
        if self.steps_done == 0:
            return denoise(self, *given)
        set_mode("error")
        try:
            return denoise(self, *given)
        finally:
            set_mode("default")

    bench = Bench(shallow(name), "tiny", device, STEPS)
    bench.stgfast()  # kernels are compiled, and chosen
    monkeypatch.setattr(Run, "_denoise", watched)
    bench.stgfast()
    calls = 2 if name == "wan-14b" else 1
    assert device == "cuda" or modes == ["error", "default"] * calls * (STEPS - 1)


class OneDevice(TorchDispatchMode):
    """Within it no operation involves the host: its tensors are all on the meta device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        tensors = [each for each in pytree.tree_leaves((args, kwargs, output)) if isinstance(each, torch.Tensor)]
        assert {tensor.device.type for tensor in tensors} <= {"meta"}, operation
        return output


def few_blocks(model):
    """Blocks of the released width, few and identical."""
    takes = inspect.signature(getattr(diffusers, model.denoiser)).parameters
    few = {name: count for name, count in (("num_layers", 4), ("num_single_layers", 2)) if name in takes}
    if not few:
        return model
    return dataclasses.replace(model, config={**model.config, **few}, layers={"full": 2})


@pytest.mark.parametrize("name", MODELS)
def test_steps_of_the_released_sizes_stay_on_the_device(name, monkeypatch):
    """The pipeline and its scheduler compute on the host, the denoiser where reading a number is an error."""

    def moved(device, values):
        return pytree.tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, values)

    def apart(denoise):
        def elsewhere(self, part, plain, arguments):
            arguments = arguments.changed(lambda _, value: moved("meta", value))
            scales.append(moved("meta", adapter.live(self.pipe, self.call, part)))
            with OneDevice():
                output = denoise(self, part, plain, arguments)
            steps.append(self.steps_done)
            return pytree.tree_map(lambda part: torch.zeros_like(part, device="cpu"), output)

        return elsewhere

    steps, scales, autocast, adapter = [], [], torch.autocast, ADAPTERS[MODELS[name].pipeline]
    bench = Bench(few_blocks(MODELS[name]), "full", "meta", 2)
    monkeypatch.setattr(Run, "_denoise", apart(Run._denoise))
    for owner, prop in ((bench.denoiser, "device"), (bench.pipe, "_execution_device")):
        monkeypatch.setattr(type(owner), prop, torch.device("cpu"))
    blocks = dataclasses.replace(adapter.blocks, attend_on=("meta",))
    changed = {"blocks": blocks, "live": lambda *_: scales[-1]}
    monkeypatch.setitem(ADAPTERS, adapter.pipeline, dataclasses.replace(adapter, **changed))
    monkeypatch.setattr(backends, "choose", lambda call: "triton")
    monkeypatch.setattr(backends, "triton_runs", lambda device: True)
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *a: contextlib.nullcontext() if kind == "meta" else autocast(kind, *a)
    )
    bench.stgfast()
    assert steps[-1] == 2


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", ["mochi", "wan-14b", "hunyuan-video"])
def test_neither_steps_nor_schedules_compile_anew(name, device):
    """After all blocks have run with the rows of a perturbed branch, and without."""
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
    row = measured(
        "mochi", size=size, device="cuda", rounds=1, variants=("stock", "paper", "compiled", "graphs", "fastest")
    )
    assert row["peak_memory"].keys() == row["seconds"].keys()
    assert row["clock"] == "wall"
    assert row["attention_backend"]
