"""Functions that the processes of these tests run."""

import os
import signal
import time
from contextlib import nullcontext
from unittest import mock

import diffusers
import torch
import torch.distributed as dist
from diffusers import hooks
from torch.distributed.device_mesh import init_device_mesh

import stgfast
from stgfast import Guidance, Perturbation
from stgfast.errors import SettingsError
from stgfast.ranks import wire
from tests import models
from tests.integrations import test_ltx2 as ltx2
from tests.integrations.test_families import FAMILIES as KNOWN
from tests.precision import computing_in
from tests.proof import untabled

FAMILIES = {**KNOWN, **untabled.FOUND}


def guidance_of(family, scale=0.5, **settings):
    """Two perturbed branches that fork at different depths; the scale of the second one may be a schedule."""
    late_then_early = family.layers[::-1]
    kinds = (family.kinds * 2)[:2]
    scales = 1.5, tuple(scale) if isinstance(scale, list) else scale
    parts = [Perturbation([late_then_early[n]], kind=kind, scale=scales[n]) for n, kind in enumerate(kinds)]
    return Guidance(parts, **settings)


def clips(names, prompts=1, dtype="float64", settings=None, call=None, **accelerated):
    """Clips whose branches are split over the processes, by family."""
    made = {}
    with computing_in(getattr(torch, dtype)):
        for name in names:
            family = FAMILIES[name]
            pipe = family.pipe()
            guidance = guidance_of(family, **(settings or {}))
            stgfast.accelerate(pipe, guidance, branches=dist.group.WORLD, **accelerated)
            made[name] = family.run(pipe, prompts, **(call or {}))
    return made


def many_clips(cases):
    return [clips(**case) for case in cases]


def four_passes(version, prompts):
    """The four passes of LTX-2, video and audio."""
    with computing_in(torch.float64):
        pipe = stgfast.accelerate(ltx2.build(version=version), branches=dist.group.WORLD)
        return ltx2.call(pipe, prompts)


def loads_of_mochi():
    """Block-rows of a step of a model with the released number of blocks, with the released perturbed layer, and the
    predictions received in it.
    """
    pipe = models.pipeline("mochi", models.transformer("mochi", seed=1, num_layers=48))
    stgfast.accelerate(pipe, Guidance(Perturbation([34])), branches=dist.group.WORLD)
    mochi = FAMILIES["Mochi"]
    with mochi.counted(pipe) as rows:
        clip = mochi.run(pipe)
    return sum(rows) / 2, received(pipe) / 2 / clip.nbytes


def loads_of_ltx2():
    pipe = stgfast.accelerate(ltx2.build(num_layers=48), branches=dist.group.WORLD)
    rows = []
    for block in pipe.transformer.transformer_blocks:
        hook = lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"]))  # noqa: E731
        block.register_forward_pre_hook(hook, with_kwargs=True)
    clip = ltx2.call(pipe, spatio_temporal_guidance_blocks=[28], num_inference_steps=1)
    return sum(rows), received(pipe) / sum(latents.nbytes for latents in clip)


def received(pipe):
    """The number of bytes that this process got from others."""
    return pipe._stgfast.execution.ranks.received


STOPS_AT = 1


def ending(how):
    """How a guided call ends in which rank 1 diverges, after how many seconds; and the next clip."""
    wire.LIMIT = 2.0
    rank = dist.get_rank()
    family = FAMILIES["LTX"]
    pipe = stgfast.accelerate(family.pipe(), guidance_of(family), branches=dist.group.WORLD)
    changed = {"num_inference_steps": 4}

    def callback(pipe, step, timestep, kept):
        if rank == 1 and step == STOPS_AT:
            if how == "stops":
                pipe._interrupt = True
            elif how == "raises":
                raise ValueError("a sentence of the callback")
            elif how == "is interrupted":
                signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has none
                signal.raise_signal(signal.SIGINT)
            elif how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "exits":
                raise SystemExit(3)
            elif how == "hangs":
                time.sleep(6)
        return kept

    changed["callback_on_step_end"] = callback
    if rank == 1 and how == "is killed as it sends":
        sent, spread = [], pipe._stgfast.execution.ranks.spread

        def sending(tensors):
            sent.append(tensors)
            if len(sent) > STOPS_AT:
                os.kill(os.getpid(), signal.SIGKILL)
            spread(tensors)

        pipe._stgfast.execution.ranks.spread = sending
    if rank == 1 and how == "has another seed":
        changed["generator"] = torch.Generator().manual_seed(99)
    if rank == 1 and how == "has other steps":
        changed["num_inference_steps"] = 5
    if rank == 1 and how == "has bad settings":
        changed["stg_layers"] = [99]
    if how == "draws noise":
        pipe.scheduler = Noisy.from_config(pipe.scheduler.config)
        torch.manual_seed(rank)
    began = time.monotonic()
    try:
        family.run(pipe, **changed)
        said = "nothing"
    except BaseException as error:  # what is asked about
        said = f"{type(error).__name__}: {error}"
    took = time.monotonic() - began
    if how in ("is killed", "is killed as it sends", "exits", "hangs", "draws noise"):
        return said, took, None
    return said, took, family.run(pipe)


def endings(ways):
    return [ending(how) for how in ways]


class Noisy(diffusers.FlowMatchEulerDiscreteScheduler):
    """Steps with noise of their own, without a generator from the pipeline."""

    def step(self, *args, **kwargs):
        (sample,) = super().step(*args, **kwargs)
        return (sample + torch.randn(sample.shape, generator=torch.Generator().manual_seed(dist.get_rank())),)


def in_context(pipe, size, mesh=None):
    """The pipeline with context parallelism of diffusers, which counts GPUs."""
    config = diffusers.ContextParallelConfig(ulysses_degree=size, mesh=mesh)
    with mock.patch("torch.accelerator.device_count", return_value=dist.get_world_size()):
        for name in ("transformer", "transformer_2"):
            if getattr(pipe, name, None) is not None:
                getattr(pipe, name).enable_parallelism(config=config)
    return pipe


def in_tensors(pipe, size):
    """The pipeline with tensor parallelism of diffusers, which is for GPUs only."""
    devices = mock.patch.object(hooks.tensor_parallel, "_SUPPORTED_TP_DEVICES", ("cpu",))
    with devices, mock.patch("torch.accelerator.device_count", return_value=size):
        pipe.transformer.enable_parallelism(config=diffusers.TensorParallelConfig(tp_degree=size))
    return pipe


# Each kind, at the block that splits the tokens and after it.
GUIDED = {
    "attention": Guidance([Perturbation([3], kind="attention"), Perturbation([1, 3], kind="attention")], rescale=0.5),
    "residual": Guidance([Perturbation([0]), Perturbation([2])]),
    "blur": Guidance([Perturbation([1], kind="blur", sigma=1.0), Perturbation([0], kind="blur")]),
    "carried on": Guidance([Perturbation([1])], reuse_blocks=2),
    "compiled": Guidance([Perturbation([0])]),
}


def call_of(family, guided):
    if guided == "compiled":
        return {"cfg": False}  # fewer shapes to compile for
    return family.facts.oblong if guided == "blur" else {}


def spread(cases):
    """Clips of families whose model diffusers splits over processes, or the error, by name and guidance."""
    size, made = dist.get_world_size(), {}
    for name, how, guided in cases:
        family, settings, given = FAMILIES[name], {}, GUIDED[guided]
        compiled = guided == "compiled"  # which cannot be traced in float64
        with nullcontext() if compiled else computing_in(torch.float64):
            pipe = family.build()
            if how == "context":
                in_context(pipe, size)
            elif how == "tensors":
                in_tensors(pipe, size)
            else:
                names = ("branches", "ring", "ulysses")
                mesh = init_device_mesh("cpu", (2, 1, size // 2), mesh_dim_names=names)
                in_context(pipe, size // 2, mesh["ring", "ulysses"])
                settings["branches"] = mesh["branches"]
            if compiled:
                settings["compile"] = {"backend": "eager", "dynamic": False}
            try:
                stgfast.accelerate(pipe, given, max_rows="all", **settings)
                made[name, how, guided] = family.run(pipe, **call_of(family, guided))
            except SettingsError as error:
                made[name, how, guided] = str(error)
            if (name, how, guided) == ("Wan", "context", "attention"):
                ways = stgfast.explain(pipe, **family.arguments(1)).attention
                made["ways"] = {tuple(blocks) for way, blocks in ways.items() if "all rows" in way}
    return made


def stock_in_context(name):
    family = FAMILIES[name]
    try:
        return family.run(in_context(family.build(), dist.get_world_size()))
    except RuntimeError as error:
        return str(error)
