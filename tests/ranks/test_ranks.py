"""The argument `branches`, in one process."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import stgfast
from stgfast import Guidance, Perturbation, SettingsError
from stgfast.batching.execution import Execution
from tests import models
from tests.integrations import test_ltx2 as ltx2
from tests.integrations.test_families import FAMILIES

LTX = FAMILIES["LTX"]


@pytest.fixture
def group(tmp_path):
    """A group with this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_without_a_group():
    with pytest.raises(
        SettingsError, match=r"branches: got no torch.distributed, expected its group: start with torchr"
    ):
        stgfast.accelerate(LTX.build(), branches="auto")


def test_what_is_no_group(group):
    with pytest.raises(SettingsError, match=r"branches: got 2, expected a torch.distributed group, such as"):
        stgfast.accelerate(LTX.build(), branches=2)
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("branches", "tokens"))
    with pytest.raises(
        SettingsError, match="branches: got 'a mesh of 2 dimensions', expected one of its dimensions, mesh"
    ):
        stgfast.accelerate(LTX.build(), branches=mesh)


def test_a_group_of_one(group):
    """The same clip, bit for bit; a group is registered once."""
    alone = LTX.run(stgfast.accelerate(LTX.pipe(), max_rows="all", guidance=Guidance(Perturbation([2]))))
    pipe = stgfast.accelerate(LTX.pipe(), Guidance(Perturbation([2])), max_rows="all", branches=group)
    assert torch.equal(LTX.run(pipe), alone)
    ranks = pipe._stgfast.execution.ranks
    mesh = init_device_mesh("cpu", (1,))
    assert stgfast.accelerate(pipe, Guidance(Perturbation([2])), branches=mesh)._stgfast.execution.ranks.size == 1
    assert copy.deepcopy(Execution(ranks=ranks)).ranks is ranks
    with pytest.raises(SettingsError, match="pickle: got a pipeline with branches=group"):
        pickle.dumps(pipe)
    pickle.dumps(stgfast.restore(pipe))


def test_who_computes_what_is_said():
    pipe = models.pipeline("mochi", models.transformer("mochi", seed=1, num_layers=48))
    stgfast.accelerate(pipe, Guidance(Perturbation([34])))
    said = str(stgfast.explain(pipe, ranks=2, num_inference_steps=10))
    assert "  rank 0 computes uncond: blocks 0 to 47: 1 row; 48 block-rows, and receives 2 predictions\n" in said
    second = "rank 1 computes cond, perturbed0: blocks 0 to 34: 1 row; blocks 35 to 47: 2 rows; 61 block-rows, and"
    assert f"  {second} receives 1 prediction\n" in said
    busiest = "over 2 ranks: 610 block-rows per prompt on the busiest one; 545 if the number of prompts is"
    assert busiest in said
    assert "rank" not in str(stgfast.explain(pipe, num_inference_steps=10))
    explained = stgfast.explain(pipe, ranks=5, num_inference_steps=10)
    assert "  ranks 3 to 4: no gain, repeat the work of the others\n" in str(explained)
    assert explained.longest == 480
    passes = stgfast.accelerate(ltx2.build(num_layers=48))
    explained = stgfast.explain(passes, ranks=3, spatio_temporal_guidance_blocks=[28], num_inference_steps=10)
    assert explained.longest == 680


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "2"])
def test_a_number_of_ranks_that_is_none(wrong):
    with pytest.raises(SettingsError, match=r"ranks: got .*, expected a number of processes, 1 or more"):
        stgfast.explain(stgfast.accelerate(LTX.pipe(), Guidance(Perturbation([2]))), ranks=wrong)
