"""Models of Open-Sora, guided within the loops of its samplers, against each branch alone."""

import contextlib

import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation
from stgfast.integrations import open_sora as adapters
from tests import open_sora
from tests.integrations.family import with_blocks
from tests.oracle import Facts, Part, perturbing
from tests.precision import distance, same

pytestmark = pytest.mark.usefixtures("float64")

STEPS, SCALE, IMAGE_SCALE = 3, 4.0, 2.5


def stdit3_parts(model):
    pairs = enumerate(zip(model.spatial_blocks, model.temporal_blocks, strict=True))
    axes = ("spatial", "temporal")
    return [
        Part(block, layer, {axis: block.attn}) for layer, pair in pairs for axis, block in zip(axes, pair, strict=True)
    ]


def mmdit_parts(model):
    return [Part(block, layer, {"": block}) for layer, block in enumerate([*model.double_blocks, *model.single_blocks])]


class Version12:
    cls, sources, parts, layers = open_sora.STDiT3, ("cond", "uncond"), stdit3_parts, 4
    facts = Facts(stacked=True, parts=stdit3_parts, passed=())
    once = ("mask", "fps", "height", "width")  # for every prompt, and not for every row

    @staticmethod
    def sample(model, prompts, given_frames=False):
        generator = torch.Generator().manual_seed(7)
        lengths = torch.randint(2, 6, (prompts, 1), generator=generator)
        text = {
            "y": torch.randn(prompts, 1, 6, 8, generator=generator),
            "y_null": torch.randn(1, 6, 8, generator=generator).repeat(prompts, 1, 1)[:, None],
            "mask": (torch.arange(6) < lengths).long(),
            "fps": torch.arange(prompts) * 6.0 + 24.0,
            "height": torch.full((prompts,), 240.0),
            "width": torch.full((prompts,), 426.0),
            "num_frames": torch.full((prompts,), 3.0),
        }
        z = torch.randn(prompts, 4, 3, 2, 2, generator=generator)
        mask = torch.tensor([[0.2, 0.7, 1.0]]).repeat(prompts, 1) if given_frames else None
        with torch.no_grad():
            return open_sora.rflow(model, z, text, STEPS, SCALE, mask)

    @staticmethod
    def cfg(step, of):
        return of["uncond"] + SCALE * (of["cond"] - of["uncond"])


class Version20:
    cls, sources, parts, layers = open_sora.MMDiTModel, ("cond", "uncond", "nothing"), mmdit_parts, 7
    facts = Facts(
        stacked=True,
        parts=mmdit_parts,
        passed=(),
        unchanged=lambda given: (given[0], given[1]) if len(given) == 4 else given[0],
    )
    once = ()

    @staticmethod
    def sample(model, prompts):
        generator = torch.Generator().manual_seed(7)
        rows, tokens = 3 * prompts, 5
        text = torch.randn(2, prompts, 4, 8, generator=generator)
        pooled = torch.randn(2, prompts, 6, generator=generator)
        conditions = {
            "txt": torch.cat([text[0], text[1], text[1]]),
            "y_vec": torch.cat([pooled[0], pooled[1], pooled[1]]),
            "txt_ids": torch.zeros(rows, 4, 3),
            "img_ids": torch.arange(tokens).float()[None, :, None].repeat(rows, 1, 3),
        }
        noise = torch.randn(prompts, tokens, 8, generator=generator)
        given = torch.randn(prompts, tokens, 10, generator=generator)
        with torch.no_grad():
            return open_sora.image_to_video(model, noise, given, conditions, STEPS, SCALE, IMAGE_SCALE)

    @staticmethod
    def cfg(step, of):
        image = torch.linspace(1.0, open_sora.oscillating(IMAGE_SCALE, step), 5)[None, :, None]
        text = open_sora.oscillating(SCALE, step)
        return of["nothing"] + image * (of["uncond"] - of["nothing"]) + text * (of["cond"] - of["uncond"])


VERSIONS = {"1.2": Version12, "2.0": Version20}
every = pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS)
# layers of the early and the late perturbation, kind, axis
CASES = {
    "1.2": {
        "residual": [([2], "residual", "")],
        "attention": [([1, 3], "attention", "")],
        "spatial": [([2], "attention", "spatial")],
        "temporal": [([2], "attention", "temporal")],
        "spatial and temporal": [([2], "attention", "spatial"), ([2], "attention", "temporal")],
        "residual along an axis": [([1], "residual", "temporal"), ([3], "attention", "")],
    },
    "2.0": {
        "two streams": [([1], "residual", "")],
        "one stream": [([5], "residual", "")],
        "both, and the last": [([2, 6], "residual", ""), ([0], "residual", "")],
    },
}
case = pytest.mark.parametrize(
    ("version", "parts"),
    [(VERSIONS[version], parts) for version, cases in CASES.items() for parts in cases.values()],
    ids=[f"{version}, {name}" for version, cases in CASES.items() for name in cases],
)


def guidance_of(parts, **others):
    return Guidance(
        [
            Perturbation(layers, kind=kind, axis=axis, scale=1.5 - number)
            for number, (layers, kind, axis) in enumerate(parts)
        ],
        **others,
    )


def plain(version, model, guidance, scales, rescale=0.0, orthogonal=False):
    """Replaces the model of a sampler: each branch alone, then the formula."""
    step = iter(range(STEPS))

    def rows(value, name, half, count):
        if not isinstance(value, torch.Tensor) or name in version.once:
            return value
        assert len(value) == count
        return value[half]

    def call(*args, **kwargs):
        now = next(step)
        count = len(args[0] if args else kwargs["img"])
        each = count // len(version.sources)

        def predict(source, part=None):
            number = version.sources.index(source)
            half = slice(number * each, (number + 1) * each)
            mine = [rows(value, "", half, count) for value in args]
            named = {name: rows(value, name, half, count) for name, value in kwargs.items() if name != "num_frames"}
            perturbed = perturbing(version.facts, model, part.layers, part.kind, part.axis) if part else None
            with perturbed or contextlib.nullcontext():
                return model(*mine, **named).double()

        of = {source: predict(source) for source in version.sources}
        result = version.cfg(now, of)
        changes = [of[part.of] - predict(part.of, part) for part in guidance.perturbations]
        noise = [tensor.chunk(2, dim=1)[0] if version is Version12 else tensor for tensor in (*changes, of["cond"])]
        if orthogonal:
            first, second, _ = noise
            for one, other in zip(first, second, strict=True):
                other.sub_((one * other).sum() / (one * one).sum() * one)
        for change, scale in zip(changes, scales, strict=True):
            result = result + scale * change
        if rescale:
            half = result.chunk(2, dim=1)[0] if version is Version12 else result
            for c, g in zip(noise[-1], half, strict=True):
                g.mul_(rescale * c.std() / g.std() + 1 - rescale)
        return torch.cat([result.float()] * len(version.sources))

    return call


@contextlib.contextmanager
def counted(version, model):
    """The number of rows that each block runs on."""
    counts = [0] * len(version.facts.parts(model))
    handles = []
    for number, part in enumerate(version.facts.parts(model)):

        def hook(module, args, number=number):
            counts[number] += len(args[0])

        handles.append(part.module.register_forward_pre_hook(hook))
    yield counts
    for handle in handles:
        handle.remove()


@case
@pytest.mark.parametrize("prompts", [1, 2])
def test_equals_the_plain_method(version, parts, prompts):
    guidance, model = guidance_of(parts), open_sora.built(version.cls)
    scales = [1.5 - number for number in range(len(parts))]
    expected = version.sample(plain(version, model, guidance, scales), prompts)
    for limit in (None, 1):
        with stgfast.guided(model, guidance, steps=STEPS, max_rows=limit):
            made = version.sample(model, prompts)
        same(made, expected)
    assert distance(version.sample(model, prompts), expected) > 1e-3


@case
def test_no_history_runs_twice(version, parts):
    guidance, model = guidance_of(parts), open_sora.built(version.cls)
    wanted, started = [], set()
    for part in version.facts.parts(model):
        touched = [
            number
            for number, (layers, kind, axis) in enumerate(parts)
            if part.layer in layers and axis in ("", *part.attentions)
        ]
        skipped = [number for number in touched if parts[number][1] == "residual"]
        started |= set(touched)
        wanted.append(len(version.sources) + len(started - set(skipped)))
    with stgfast.guided(model, guidance, steps=STEPS), counted(version, model) as counts:
        version.sample(model, 2)
    assert counts == [2 * STEPS * rows for rows in wanted]


@every
def test_without_scale_nothing_changes(version):
    model = open_sora.built(version.cls)
    expected = version.sample(model, 2)
    with stgfast.guided(model, guidance_of([([1], "residual", "")]).with_perturbation(scale=0.0), steps=STEPS):
        assert torch.equal(version.sample(model, 2), expected)
    with stgfast.guided(model, Guidance(Perturbation([1], scale=[0.0] * STEPS)), steps=STEPS):
        assert torch.equal(version.sample(model, 2), expected)
    assert all("_compiled_call_impl" not in vars(module) for module in model.modules())


@every
def test_steps_without_guidance_are_the_samplers_own(version):
    model = open_sora.built(version.cls)
    guidance = Guidance(Perturbation([1], scale=[1.5, 0.0, 2.0]))
    expected = version.sample(_at_steps(version, model, guidance, [1.5, 0.0, 2.0]), 1)
    with stgfast.guided(model, guidance, steps=STEPS), counted(version, model) as counts:
        made = version.sample(model, 1)
    same(made, expected)
    assert counts[-1] == len(version.sources) * STEPS + 2


def _at_steps(version, model, guidance, scales):
    """The plain method with a scale for each step."""
    calls = [plain(version, model, guidance, [scale]) for scale in scales]
    step = iter(range(STEPS))

    def call(*args, **kwargs):
        now = next(step)
        for _ in range(now):  # the scales of the sampler depend on the step
            calls[now](*args, **kwargs)
        return calls[now](*args, **kwargs)

    return call


@every
def test_a_weak_copy_of_the_unconditional_branch(version):
    model = open_sora.built(version.cls)
    guidance = Guidance(Perturbation([2], of="uncond"))
    expected = version.sample(plain(version, model, guidance, [1.0]), 2)
    with stgfast.guided(model, guidance, steps=STEPS):
        same(version.sample(model, 2), expected)


def test_a_scale_in_place_of_the_samplers():
    """A rescale needs it."""
    model = open_sora.built(Version12.cls)
    guidance = Guidance(Perturbation([2], kind="attention", axis="temporal"), rescale=0.7, cfg=SCALE)
    expected = Version12.sample(plain(Version12, model, guidance, [1.0], rescale=0.7), 2)
    with stgfast.guided(model, guidance, steps=STEPS):
        same(Version12.sample(model, 2), expected)


def test_the_temporal_term_orthogonal_to_the_spatial_one():
    model = open_sora.built(Version12.cls)
    parts = CASES["1.2"]["spatial and temporal"]
    guidance = guidance_of(parts, project="orthogonal", rescale=0.7, cfg=SCALE)
    expected = Version12.sample(plain(Version12, model, guidance, [1.5, 0.5], rescale=0.7, orthogonal=True), 2)
    with stgfast.guided(model, guidance, steps=STEPS):
        made = Version12.sample(model, 2)
    same(made, expected)
    with stgfast.guided(model, guidance_of(parts, rescale=0.7, cfg=SCALE), steps=STEPS):
        assert distance(Version12.sample(model, 2), expected) > 1e-4


@every
def test_reuse(version):
    """The differences of rows are kept; the sampler combines them with its own scales."""
    model = open_sora.built(version.cls)
    guidance = Guidance(Perturbation([2]), reuse=2, reuse_cfg=2, reuse_order=0)
    with counted(version, model) as exact, stgfast.guided(model, Guidance(Perturbation([2])), steps=STEPS):
        expected = version.sample(model, 1)
    with counted(version, model) as rows, stgfast.guided(model, guidance, steps=STEPS):
        made = version.sample(model, 1)
    assert sum(rows) < 0.9 * sum(exact)
    assert 1e-4 < distance(made, expected) < 1


@pytest.mark.parametrize("prompts", [1, 2])
def test_frames_that_are_given(prompts):
    """They have a timestep of their own, for each frame and sample."""
    model = open_sora.built(Version12.cls)
    guidance = guidance_of(CASES["1.2"]["spatial and temporal"])
    expected = Version12.sample(plain(Version12, model, guidance, [1.5, 0.5]), prompts, given_frames=True)
    with stgfast.guided(model, guidance, steps=STEPS):
        made = Version12.sample(model, prompts, given_frames=True)
    same(made, expected)
    assert distance(Version12.sample(model, prompts), expected) > 1e-3


def test_defaults_are_layers_of_the_real_models():
    for adapter, depth in ((adapters.STDIT3, 28), (adapters.MMDIT, 19 + 38)):
        assert all(layer < depth for part in adapter.defaults.perturbations for layer in part.layers)
    (spatial, temporal) = adapters.STDIT3.defaults.perturbations
    assert (spatial.axis, temporal.axis, *spatial.layers, spatial.scale) == ("spatial", "temporal", 12, 2.0)
    model = open_sora.built(open_sora.STDiT3, depth=13)
    with stgfast.guided(model, steps=STEPS), counted(Version12, model) as counts:
        Version12.sample(model, 1)
    assert counts == [2 * STEPS] * 24 + [3 * STEPS] + [4 * STEPS]


def test_what_is_given_once_for_every_prompt_may_be_given_for_every_row():
    model, arguments = open_sora.built(Version12.cls), []
    model.register_forward_pre_hook(lambda module, args, kwargs: arguments.append((args, kwargs)), with_kwargs=True)
    Version12.sample(model, 2)
    args, kwargs = arguments[0]
    rows = {**kwargs, **{name: torch.cat([kwargs[name]] * 2) for name in Version12.once}}
    guidance, made = guidance_of(CASES["1.2"]["spatial and temporal"]), []
    for given in (kwargs, rows):
        with torch.no_grad(), stgfast.guided(model, guidance, steps=1):
            made.append(model(*args, **given))
    assert torch.equal(*made)


LISTED = [
    (Version12, adapters.STDIT3, name) for name in sorted(adapters.STDIT3.blocks.rows - {"fps", "height", "width"})
]
LISTED += [(Version20, adapters.MMDIT, name) for name in sorted(adapters.MMDIT.blocks.rows)]


@pytest.mark.parametrize(
    ("version", "adapter", "name"), LISTED, ids=[f"{one.pipeline} {name}" for _, one, name in LISTED]
)
def test_no_row_is_listed_for_nothing(monkeypatch, version, adapter, name):
    """Without any one of them, two prompts are wrong or refused. (Arguments that 1.2 repeats, or reads once, are
    excluded.)
    """
    special = {"given_frames": True} if version is Version12 else {}
    parts = [([1], "residual", ""), ([2], "residual", "")]
    model, guidance = open_sora.built(version.cls), guidance_of(parts)
    expected = version.sample(plain(version, model, guidance, [1.5, 0.5]), 2, **special)
    without = with_blocks(adapter, rows=adapter.blocks.rows - {name})
    monkeypatch.setitem(adapters.MODELS, adapter.pipeline, without)
    try:
        with stgfast.guided(model, guidance, steps=STEPS, max_rows=3):
            made = version.sample(model, 2, **special)
    except (RuntimeError, AssertionError, IndexError):
        return
    assert distance(made, expected) > 1e-3
