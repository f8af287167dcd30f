"""Install and restore: nothing remains, and nothing else is changed."""

import filecmp
import inspect
import threading
from pathlib import Path

import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation
from tests import models

GUIDANCE = Guidance([Perturbation([2]), Perturbation([3], kind="attention")], rescale=0.5)


def arguments(family="mochi", **changes):
    return {
        **models.prompt(family, 2),
        **models.sizes(family, num_inference_steps=3),
        "generator": models.generators(2),
        **changes,
    }


def clip(pipe, family="mochi", **changes):
    return pipe(**arguments(family, **changes)).frames


def traces(pipe):
    """Everything about a pipeline and its components that installing could change."""
    modules = [(name, module) for name, module in pipe.transformer.named_modules()]
    return {
        "class": type(pipe),
        "call": type(pipe).__call__,
        "attributes": dict(pipe.__dict__),
        "modules": [(name, type(module), dict(module.__dict__)) for name, module in modules],
        "forwards": [module.forward for _, module in modules],
        "hooks": [(dict(module._forward_hooks), dict(module._forward_pre_hooks)) for _, module in modules],
        "keys": list(pipe.transformer.state_dict()),
    }


@pytest.mark.parametrize("family", models.FAMILIES)
def test_scale_0_is_the_stock_result_bit_for_bit(family):
    pipe = models.pipeline(family)
    stock = clip(pipe, family)
    stgfast.accelerate(pipe, GUIDANCE)
    assert torch.equal(clip(pipe, family, stg_scale=0), stock)
    assert torch.equal(clip(pipe, family, stg=Guidance()), stock)
    assert not torch.allclose(clip(pipe, family), stock)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_steps_out_of_range_are_the_stock_steps_bit_for_bit(family):
    def steps(pipe, **changes):
        seen = []

        def keep(pipe, step, time, tensors):
            seen.append(tensors["latents"].clone())
            return {}

        clip(pipe, family, callback_on_step_end=keep, **changes)
        return seen

    pipe = models.pipeline(family)
    stock = steps(pipe)
    guided = steps(stgfast.accelerate(pipe, Guidance(Perturbation([2]), rescale=0.5, start=0.5)))
    assert [torch.equal(one, other) for one, other in zip(stock, guided, strict=True)] == [True, True, False]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_restore_leaves_no_trace(family, tmp_path):
    pipe = models.pipeline(family)
    clip(pipe, family)  # a pipeline remembers its last call, and where it was saved
    pipe.save_pretrained(tmp_path / "before")
    before = traces(pipe)
    stgfast.accelerate(pipe, GUIDANCE)
    pipe.save_pretrained(tmp_path / "accelerated")
    clip(pipe, family)
    inside = traces(pipe)
    stgfast.restore(pipe)
    assert inside["modules"] == before["modules"]
    assert inside["forwards"] == before["forwards"]
    assert traces(pipe) == before
    pipe.save_pretrained(tmp_path / "after")
    for saved in ("accelerated", "after"):
        names = [str(p.relative_to(tmp_path / saved)) for p in Path(tmp_path / saved).rglob("*") if p.is_file()]
        assert sorted(names) == sorted(
            str(p.relative_to(tmp_path / "before")) for p in Path(tmp_path / "before").rglob("*") if p.is_file()
        )
        _, different, unreadable = filecmp.cmpfiles(tmp_path / "before", tmp_path / saved, names, shallow=False)
        assert not different
        assert not unreadable


def test_restore_of_a_pipeline_that_was_not_accelerated_does_nothing():
    pipe = models.pipeline("wan")
    before = traces(pipe)
    stgfast.restore(pipe)
    assert traces(pipe) == before


def test_accelerating_twice_is_the_same_as_once():
    once = stgfast.accelerate(models.pipeline("mochi"), GUIDANCE)
    twice = stgfast.accelerate(stgfast.accelerate(models.pipeline("mochi"), Guidance(Perturbation([1]))), GUIDANCE)
    assert type(once).__mro__[1:] == type(twice).__mro__[1:]
    assert torch.equal(clip(once), clip(twice))
    assert type(stgfast.restore(twice)) is type(models.pipeline("mochi"))


def test_an_accelerated_pipeline_is_still_what_it_was():
    pipe = models.pipeline("ltx")
    stock = type(pipe)
    stgfast.accelerate(pipe, GUIDANCE)
    assert isinstance(pipe, stock)
    assert type(pipe).__name__ == stock.__name__
    parameters = inspect.signature(pipe.__call__).parameters
    assert set(inspect.signature(stock.__call__).parameters) - {"self"} < set(parameters)
    assert "stg_scale" in parameters
    assert type(models.pipeline("ltx")) is stock


def test_two_pipelines_that_share_a_denoiser_do_not_disturb_one_another():
    model = models.transformer("mochi")
    guided, stock = models.pipeline("mochi", model), models.pipeline("mochi", model)
    expected = {"stock": clip(stock), "guided": clip(stgfast.accelerate(guided, GUIDANCE))}
    other = stgfast.accelerate(models.pipeline("mochi", model), Guidance(Perturbation([1])))
    expected["other"] = clip(other)
    assert torch.equal(clip(stock), expected["stock"])
    assert torch.equal(clip(guided), expected["guided"])

    inside = {}

    def run_others(pipe, step, time, tensors):
        inside.setdefault("stock", clip(stock))
        inside.setdefault("other", clip(other))
        return {}

    assert torch.equal(clip(guided, callback_on_step_end=run_others), expected["guided"])
    assert torch.equal(inside["stock"], expected["stock"])
    assert torch.equal(inside["other"], expected["other"])


def test_two_threads_that_share_a_denoiser_do_not_disturb_one_another():
    model = models.transformer("mochi")
    pipes = {"stock": models.pipeline("mochi", model)}
    pipes["guided"] = stgfast.accelerate(models.pipeline("mochi", model), GUIDANCE)
    pipes["other"] = stgfast.accelerate(models.pipeline("mochi", model), Guidance(Perturbation([1])))
    expected = {name: clip(pipe) for name, pipe in pipes.items()}
    clean = [dict(module.__dict__) for module in model.modules()]
    results = {name: [] for name in pipes}

    def run(name):
        for _ in range(4):
            results[name].append(clip(pipes[name]))

    threads = [threading.Thread(target=run, args=(name,)) for name in pipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, given in results.items():
        assert len(given) == 4
        assert all(torch.equal(one, expected[name]) for one in given)
    assert [dict(module.__dict__) for module in model.modules()] == clean


def test_an_exception_inside_a_call_leaves_the_pipeline_usable():
    pipe = stgfast.accelerate(models.pipeline("wan"), GUIDANCE)
    expected = clip(pipe, "wan")
    before = traces(pipe)

    def fail(pipe, step, time, tensors):
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        clip(pipe, "wan", callback_on_step_end=fail)
    calls = []

    def fail_inside(module, args):
        calls.append(module)
        if len(calls) == 4:
            raise RuntimeError("out of memory")

    hook = pipe.transformer.blocks[4].register_forward_pre_hook(fail_inside)
    with pytest.raises(RuntimeError, match="out of memory"):
        clip(pipe, "wan")
    hook.remove()
    after = traces(pipe)
    assert after["modules"] == before["modules"]
    assert torch.equal(clip(pipe, "wan"), expected)


def test_a_model_that_goes_around_its_blocks_is_found_out():
    pipe = stgfast.accelerate(models.pipeline("wan"), Guidance(Perturbation([2])))
    kept = pipe.transformer.blocks

    class Shortened(type(pipe.transformer)):
        def forward(self, *args, **kwargs):
            self.blocks = kept[:5]
            try:
                return super().forward(*args, **kwargs)
            finally:
                self.blocks = kept

    pipe.transformer.__class__ = Shortened
    with pytest.raises(stgfast.EngineError, match="got 5, expected 6"):
        clip(pipe, "wan")
