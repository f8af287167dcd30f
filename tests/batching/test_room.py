"""What fits into memory without guidance fits with it: rows at once, peak bytes, and the room on a GPU."""

import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation, SettingsError
from stgfast.batching.room import SPARE, Room
from stgfast.bench.memory import peak_of
from tests import models
from tests.integrations.families import hunyuan_video, ltx, mochi, wan

FAMILIES = {module.FAMILIES[0].name: module.FAMILIES[0] for module in (mochi, ltx, wan, hunyuan_video)}
every = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def most_rows(family, pipe, prompts):
    rows = []
    for part in family.facts.parts(pipe.transformer):
        part.module.register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(len(args[0] if args else kwargs["hidden_states"])),
            with_kwargs=True,
        )
    family.run(pipe, prompts, cfg=family.cfg is not None)
    return max(rows)


@every
@pytest.mark.parametrize("prompts", [1, 2])
def test_no_more_rows_at_once_than_the_pipeline_has(family, prompts):
    guidance = Guidance([Perturbation([2]), Perturbation([1], kind="attention")])
    own = most_rows(family, family.build(), prompts)
    assert most_rows(family, stgfast.accelerate(family.build(), guidance), prompts) <= own
    assert most_rows(family, stgfast.accelerate(family.build(), guidance, max_rows="all"), prompts) > own


def test_bytes_at_the_peak():
    """Bytes are counted, so they are the same on every machine. Sharing keeps one more row of hidden states."""

    def build():
        return models.pipeline("wan", wan.transformer(1, num_attention_heads=4, attention_head_dim=64, ffn_dim=1024))

    call = {**FAMILIES["Wan"].arguments(1), "width": 256, "height": 256, "num_inference_steps": 1}
    stock = build()
    alone = peak_of(lambda: stock(**call))
    found = {}
    for max_rows in (None, 1, "all"):
        pipe = stgfast.accelerate(build(), Guidance(Perturbation([2])), max_rows=max_rows)
        found[max_rows] = peak_of(lambda pipe=pipe: pipe(**call)) / alone
    assert found[None] <= 1.25
    assert found[1] <= 1.25
    assert found["all"] > 1.5


def test_bytes_are_counted():
    def call():
        kept = torch.ones(1000)
        gone = torch.ones(500) + 1  # two tensors for a moment
        del gone
        return kept.view(10, 100) + torch.ones(1)

    assert peak_of(call) == 4 * (1000 + 1000 + 1)
    assert peak_of(lambda: torch.ones(10).view(5, 2)[1:]) == 40


def test_a_bound_that_is_asked_for_is_kept():
    assert Room(3).rows(2, 6, CPU) == 3
    assert Room("all").rows(2, 6, CPU) is None
    assert Room(None).rows(2, 6, CPU) == 2
    for wrong in (0, True, "every", 1.5):
        with pytest.raises(SettingsError, match="max_rows: got"):
            stgfast.accelerate(models.pipeline("wan"), max_rows=wrong)


@pytest.mark.parametrize(("free", "limit"), [(499, 2), (500, None)])
def test_a_gpu_with_room_takes_all_rows(monkeypatch, free, limit):
    """Two rows took 200 bytes in the first call, so four more need 400, and a quarter as a reserve."""
    allocated = 1000
    figures = {
        "memory_allocated": allocated,
        "max_memory_allocated": allocated + 200,
        "memory_reserved": allocated + 50,
    }
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 50, 10_000))
    room = Room(None)
    assert room.rows(2, 6, GPU) == 2  # nothing is known yet
    with room.watched(GPU):
        pass
    assert room.rows(2, 6, GPU) == limit
    assert SPARE == 1.25
