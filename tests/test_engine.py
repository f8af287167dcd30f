"""The engine against the plain method: the same clip, and one block-row for each history."""

from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import diffusers
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import stgfast
from stgfast import Guidance, Perturbation
from stgfast.integrations import ADAPTERS
from tests import models
from tests.integrations.family import with_blocks
from tests.oracle import Facts, Perturbed, Plainly, blocks_of, first, first_two, plain_method
from tests.precision import same

pytestmark = pytest.mark.usefixtures("float64")

DEPTHS = {"mochi": 6, "ltx": 6, "cogvideox": 6, "hunyuan": 12, "wan": 6}
STACKED = ("mochi", "ltx", "cogvideox")
JOINT = ("mochi", "cogvideox", "hunyuan")


@dataclass(frozen=True)
class Case:
    family: str
    guidance: Guidance
    prompts: int = 1
    videos: int = 1
    cfg: float | None = 4.0
    steps: int = 2
    max_rows: int | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0
    scheduler: str = ""

    @property
    def moments(self):
        """The steps of the scheduler."""
        return 2 * self.steps - 1 if "Heun" in self.scheduler else self.steps

    @property
    def arguments(self):
        steps = {"num_inference_steps": self.steps}
        count = self.prompts * self.videos
        if self.family != "cogvideox":
            steps["num_videos_per_prompt"] = self.videos
        given = models.prompt(self.family, self.prompts, seed=self.seed, dtype=self.dtype)
        if self.family == "hunyuan":
            scale = {"guidance_scale": 4.5, "true_cfg_scale": self.cfg or 1.0}
        else:
            scale = {"guidance_scale": self.cfg or 1.0}
        generators = models.generators(count, seed=self.seed)
        return {**models.sizes(self.family, **steps, **scale), **given, "generator": generators}

    def pipe(self):
        scheduler = getattr(diffusers, self.scheduler)() if self.scheduler else None
        pipe = models.pipeline(self.family, models.transformer(self.family, seed=7 + self.seed), self.dtype, scheduler)
        if self.videos > 1:  # pipelines repeat encoded prompts, but not given embeddings
            encode = pipe.encode_prompt
            pipe.encode_prompt = lambda **kwargs: [
                tensor if tensor is None else tensor.repeat_interleave(self.videos, dim=0)
                for tensor in encode(**kwargs)
            ]
        return pipe

    def plainly(self):
        def at(schedule):
            if callable(schedule):
                return [schedule(step / self.moments) for step in range(self.moments)]
            return list(schedule) if isinstance(schedule, tuple) else [schedule] * self.moments

        guidance = self.guidance
        perturbed = [Perturbed(p.layers, p.kind, at(p.scale), p.of, p.base) for p in guidance.perturbations]
        acts = [guidance.start <= step / self.moments < guidance.stop for step in range(self.moments)]
        return Plainly(perturbed, self.cfg, at(guidance.rescale), acts)


def run_plain(case):
    pipe = case.pipe()
    facts = Facts(stacked=case.family in STACKED, unchanged=first_two if case.family in JOINT else first)
    with plain_method(pipe, case.plainly(), facts):
        return pipe(**case.arguments).frames


def run_fast(case):
    pipe = stgfast.accelerate(case.pipe(), case.guidance, max_rows=case.max_rows)
    return pipe(**case.arguments).frames


@st.composite
def cases(draw):
    family = draw(st.sampled_from(models.FAMILIES))
    steps = draw(st.integers(2, 3))
    cfg = draw(st.sampled_from([None, 1.5, 4.0]))
    number = st.sampled_from([0.0, 0.5, 1.0, 2.5])
    schedule = st.one_of(number, st.lists(number, min_size=steps, max_size=steps), st.just(lambda p: 1.0 + p))
    sides = ["cond"] if cfg is None else ["cond", "uncond"]
    perturbation = st.builds(
        Perturbation,
        layers=st.lists(st.integers(0, DEPTHS[family] - 1), min_size=1, max_size=3),
        kind=st.sampled_from(["residual", "attention"]),
        scale=schedule,
        of=st.sampled_from(sides),
        base=st.sampled_from(["cond", "guided", *sides]),
    )
    phi = st.sampled_from([0.0, 0.0, 0.4, 1.0])
    guidance = Guidance(
        draw(st.lists(perturbation, min_size=0, max_size=3)),
        rescale=draw(st.one_of(phi, st.lists(phi, min_size=steps, max_size=steps))),
        start=draw(st.sampled_from([0.0, 0.0, 0.5])),
        stop=draw(st.sampled_from([1.0, 1.0, 0.7])),
    )
    return Case(
        family,
        guidance,
        prompts=draw(st.integers(1, 4)),
        videos=1 if family == "cogvideox" else draw(st.integers(1, 2)),
        cfg=cfg,
        steps=steps,
        max_rows=draw(st.sampled_from([None, None, 1, 2, 3, 5])),
        seed=draw(st.integers(0, 3)),
    )


@contextmanager
def counted_attention(pipe, family):
    """The rows whose self-attention is computed, block by block, observed at torch's attention."""
    blocks = blocks_of(pipe.transformer)
    rows, now, within = [0] * len(blocks), [], []
    attend = torch.nn.functional.scaled_dot_product_attention

    def count(query, key, value, *args, **kwargs):
        within[-1:] = [True] * len(within[-1:])
        within.append(False)
        out = attend(query, key, value, *args, **kwargs)
        # Not attention to the text, and not a call of the model that is replaced by one with fewer rows.
        if not within.pop() and now and query.shape[-2] == key.shape[-2]:
            rows[now[-1]] += query.shape[0]
        return out

    hooks = []
    for number, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(lambda *_, number=number: now.append(number)))
        hooks.append(block.register_forward_hook(lambda *_: now.clear()))
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", count):
        yield rows
    for hook in hooks:
        hook.remove()


def histories(case, layer, step):
    """The different computations of block `layer` in a step, for one prompt, from the settings alone."""
    plainly = case.plainly()
    marks = {(source,): {} for source in (["cond"] if case.cfg is None else ["cond", "uncond"])}
    if plainly.acts[step]:
        for number, part in enumerate(plainly.perturbed):
            if part.scales[step]:
                marks[part.of, number] = dict.fromkeys(part.layers, part.kind)
    different = {
        (branch[0], tuple(mark.get(k) for k in range(layer + 1)))
        for branch, mark in marks.items()
        if mark.get(layer) != "residual"
    }
    return different


def identities(case, layer, step):
    """The number of them that have the identity instead of self-attention."""
    return sum(marks[layer] == "attention" for _, marks in histories(case, layer, step))


@given(cases())
@settings(max_examples=5)
@example(Case("mochi", Guidance(Perturbation([0]))))
@example(Case("mochi", Guidance(Perturbation([5]))))
@example(Case("ltx", Guidance([Perturbation([2]), Perturbation([2, 4])], rescale=0.7), prompts=3))
@example(Case("hunyuan", Guidance([Perturbation([5, 6], kind="attention"), Perturbation([11])]), cfg=None))
@example(Case("wan", Guidance(Perturbation(range(6), of="uncond", base="guided")), prompts=2, videos=2, max_rows=1))
@example(Case("cogvideox", Guidance([Perturbation([0, 5], kind="attention"), Perturbation([0, 5])]), prompts=2))
@example(Case("mochi", Guidance([Perturbation([1, 3]), Perturbation([1, 4]), Perturbation([1, 3])]), prompts=2))
@example(Case("ltx", Guidance([Perturbation([2], kind="attention"), Perturbation([1])]), prompts=2, max_rows=8))
@example(Case("ltx", Guidance([Perturbation([1, 3], kind="attention"), Perturbation([1])]), max_rows=8))
def test_equals_branch_by_branch_and_computes_every_history_once(case):
    pipe = stgfast.accelerate(case.pipe(), case.guidance, max_rows=case.max_rows)
    rows = [0] * DEPTHS[case.family]
    for number, block in enumerate(blocks_of(pipe.transformer)):

        def count(module, args, kwargs, number=number):
            some = (*args, *kwargs.values())[0].shape[0]
            assert case.max_rows is None or some <= case.max_rows
            rows[number] += some

        block.register_forward_pre_hook(count, with_kwargs=True)
    with counted_attention(pipe, case.family) as attended:
        made = pipe(**case.arguments).frames
    same(made, run_plain(case))
    count = case.prompts * case.videos
    expected = [sum(len(histories(case, k, step)) for step in range(case.steps)) * count for k in range(len(rows))]
    assert rows == expected
    masked = [sum(identities(case, k, step) for step in range(case.steps)) * count for k in range(len(rows))]
    assert attended == [all_rows - without for all_rows, without in zip(rows, masked, strict=True)]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_masked_rows_run_no_attention(family):
    case = Case(family, Guidance(Perturbation([1, 3], kind="attention")), prompts=2, cfg=None)
    pipe = stgfast.accelerate(case.pipe(), case.guidance)
    with counted_attention(pipe, family) as rows:
        pipe(**case.arguments)
    assert rows[:5] == [case.steps * count for count in (2, 2, 4, 2, 4)]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_prompt_does_not_know_its_neighbours(family):
    guidance = Guidance([Perturbation([2]), Perturbation([3], kind="attention")], rescale=0.8)
    together = run_fast(Case(family, guidance, prompts=3))
    alone = run_fast(Case(family, guidance, prompts=1))
    same(together[:1], alone)


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [
        ("wan", "FlowMatchHeunDiscreteScheduler"),
        ("cogvideox", "CogVideoXDPMScheduler"),
        ("wan", "FlowMatchEulerDiscreteScheduler"),
        ("hunyuan", "FlowMatchLCMScheduler"),
    ],
)
def test_other_schedulers(family, scheduler):
    """Heun's calls the denoiser twice in most steps; the DPM of CogVideoX draws noise."""
    case = Case(family, Guidance(Perturbation([2], scale=1.5), rescale=0.3), steps=4, scheduler=scheduler)
    same(run_fast(case), run_plain(case))


@pytest.mark.parametrize("max_rows", [None, 2])
def test_attention_of_all_rows_at_once(monkeypatch, max_rows):
    """Mochi's attention is replaced on a GPU only; here it is replaced on a CPU too."""
    adapter = with_blocks(ADAPTERS["MochiPipeline"], attend_on=("cpu", "cuda"))
    monkeypatch.setitem(ADAPTERS, "MochiPipeline", adapter)
    guidance = Guidance([Perturbation([1, 3], kind="attention"), Perturbation([2])], rescale=0.5)
    case = Case("mochi", guidance, prompts=2, videos=2, max_rows=max_rows)
    own = []
    pipe = stgfast.accelerate(case.pipe(), guidance, max_rows=max_rows)
    for block in pipe.transformer.transformer_blocks:
        block.attn1.register_forward_pre_hook(lambda *_: own.append(True))
    with counted_attention(pipe, "mochi") as rows:
        fast = pipe(**case.arguments).frames
    same(fast, run_plain(case))
    assert not own
    assert rows == [case.steps * count for count in (8, 8, 12, 12, 16, 16)]
