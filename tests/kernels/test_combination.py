"""The fused combination against float64, and what every implementation refuses."""

import math

import pytest
import torch
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

from stgfast.kernels import Projection, combination, combine, reference
from tests.kernels import interpreter  # noqa: F401  (repairs it)
from tests.kernels.test_reference import PROJECTIONS, WEIGHTS, exact, orthogonal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MORE_WEIGHTS = (-3.5, -1.0, 0.5, 0.25, -0.75, 1.5, -2.0)
plain_empty = torch.empty


def poisoned_empty(*shape, **options):
    made = plain_empty(*shape, **options)
    return made.fill_(math.nan) if made.is_floating_point() else made


@pytest.fixture(autouse=True)
def _small_cut(monkeypatch):
    """Small tiles and few parts, so that small tensors have several of both, and a tail."""
    monkeypatch.setattr(combination, "BLOCK", 64)
    monkeypatch.setattr(combination, "PARTS", 4)


def weights_of(count):
    return (1.0 - sum(MORE_WEIGHTS[: count - 1]), *MORE_WEIGHTS[: count - 1])


def branches(count, shape, dtype=torch.float32, mean=0.0, order="whole", seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(*shape, generator=generator)
    made = torch.stack([base + 0.1 * torch.randn(*shape, generator=generator) + mean for _ in range(count)])
    made = made.to(DEVICE, dtype)
    if order == "chunks":  # of one stack, as a denoiser returns them
        return list(made.flatten(0, 1).chunk(count))
    if order == "every other":
        return [torch.stack([branch, torch.full_like(branch, math.nan)], 1).flatten(0, 1)[::2] for branch in made]
    if order == "last first":
        return [branch.transpose(0, -1).contiguous().transpose(0, -1) for branch in made]
    return list(made)


def fused(monkeypatch, *args, **options):
    """Outputs start as NaN, so elements that are not written are noticed."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned_empty)
        return combine(*args, **options, impl="triton")


def check(monkeypatch, given, weights, dtype=None, **options):
    right = exact(given, weights, **options)
    expected = reference.combine(given, weights, dtype=dtype, **options)
    result = fused(monkeypatch, given, weights, dtype=dtype, **options)
    assert result.dtype == expected.dtype
    assert result.shape == given[0].shape
    assert result.is_contiguous()
    rounding = torch.finfo(result.dtype).eps * right.abs().max()
    budget = 2 * ((expected.double() - right).abs().max() + rounding)
    assert (result.double() - right).abs().max() <= budget
    return result


cases = st.fixed_dictionaries(
    {
        "count": st.integers(1, 8),
        "shape": st.sampled_from([(1, 2), (2, 7), (1, 64), (3, 5, 13), (2, 3, 7, 31), (1, 4, 5, 61), (5, 257)]),
        "dtype": st.sampled_from(sorted(DTYPES)),
        "out": st.sampled_from([None, *sorted(DTYPES)]),
        "mean": st.sampled_from([0.0, 10.0, 1000.0]),
        "order": st.sampled_from(["whole", "chunks", "every other", "last first"]),
        "rescale": st.sampled_from([0.0, 0.7, 1.0]),
        "of": st.integers(0, 7),  # 0: no projection
        "along": st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=8, max_size=8),
        "left": st.sampled_from([0.0, 0.25]),
        "seed": st.integers(0, 99),
    }
)
EVERYTHING = {
    "count": 8, "shape": (3, 5, 13), "dtype": "bf16", "out": "fp16", "mean": 10.0, "order": "chunks", "rescale": 0.7,
    "of": 3, "along": [1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], "left": 0.0, "seed": 1,
}  # fmt: skip


@given(case=cases)
@example(case=EVERYTHING)
@example(case=EVERYTHING | {"rescale": 0.0})
@example(case=EVERYTHING | {"of": 7, "along": [0.0] * 7 + [1.0], "left": 0.25})
@example(case=EVERYTHING | {"of": 0})
@settings(max_examples=15, phases=[Phase.explicit, Phase.generate])  # shrinking takes minutes in the interpreter
def test_against_float64(case):
    x = branches(
        case["count"], case["shape"], DTYPES[case["dtype"]], mean=case["mean"], order=case["order"], seed=case["seed"]
    )
    options = {"rescale": case["rescale"], "dtype": DTYPES.get(case["out"])}
    along = case["along"][: case["count"]]
    # With a large mean, the direction is the mean's, and the part along it is a difference of large numbers.
    if 0 < case["of"] < case["count"] and any(along) and case["mean"] < 1000.0:
        options["project"] = Projection(case["of"], tuple(along), case["left"])
    right = exact(x, weights_of(case["count"]), **{name: value for name, value in options.items() if name != "dtype"})
    assume(right.isfinite().all())  # a few numbers that are equal after rounding have no deviation for a rescale
    with pytest.MonkeyPatch.context() as patch:
        check(patch, x, weights_of(case["count"]), **options)


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_count_as_it_is_cut(monkeypatch, count, dtype):
    monkeypatch.undo()
    check(monkeypatch, branches(count, (2, 3, 1999), dtype), weights_of(count), rescale=0.7)


@pytest.mark.parametrize("project", [None, orthogonal(2, 1)], ids=["plain", "orthogonal"])
@pytest.mark.parametrize("mean", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_mean_does_not_disturb_the_factor(monkeypatch, dtype, mean, project):
    """The factor itself: with a rescale of 1, the result divided by the result without."""
    monkeypatch.setattr(combination, "BLOCK", 512)
    x = branches(3, (1, 8009), dtype, mean=mean)
    right = exact(x, WEIGHTS, 1.0, project) / exact(x, WEIGHTS, 0.0, project)
    plain, scaled = (fused(monkeypatch, x, WEIGHTS, rescale=r, project=project).double() for r in (0.0, 1.0))
    large = plain.abs() > plain.abs().median()
    assert abs(((scaled / plain)[large].mean() / right[large].mean()).item() - 1) < 2e-7


@pytest.mark.parametrize("numel", [1, 2, 63, 64, 65, 256, 257, 1025])
def test_sizes(monkeypatch, numel):
    x = branches(3, (2, numel))
    check(monkeypatch, x, WEIGHTS)
    check(monkeypatch, x, WEIGHTS, project=orthogonal(1, 2))
    if numel == 1:  # a single number has no deviation
        assert fused(monkeypatch, x, WEIGHTS, rescale=0.7).isnan().all()
        assert reference.combine(x, WEIGHTS, rescale=0.7).isnan().all()
    else:
        check(monkeypatch, x, WEIGHTS, rescale=0.7)


def test_prompts_of_one_number(monkeypatch):
    check(monkeypatch, branches(3, (5,)), WEIGHTS)


@pytest.mark.parametrize("project", [None, orthogonal(1, 2)], ids=["plain", "orthogonal"])
def test_a_prompt_does_not_know_its_neighbours(monkeypatch, project):
    x = branches(3, (4, 3, 111))
    options = {"rescale": 0.7, "project": project}
    alone = fused(monkeypatch, [branch[2:3] for branch in x], WEIGHTS, **options)
    for branch in x:
        branch[0], branch[3] = math.nan, math.inf
    assert torch.equal(fused(monkeypatch, x, WEIGHTS, **options)[2:3], alone)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("project", PROJECTIONS.values(), ids=PROJECTIONS)
def test_projected(monkeypatch, project, dtype, rescale):
    x = branches(3, (2, 3, 211), dtype, mean=0.5)
    check(monkeypatch, x, WEIGHTS, rescale=rescale, project=project)


def test_nothing_is_orthogonal_to_no_difference(monkeypatch):
    base, other = branches(2, (2, 200))
    result = fused(monkeypatch, [base, base, other], (2.0, 0.0, -1.0), project=orthogonal(1, 2))
    assert torch.equal(result, fused(monkeypatch, [base, base, other], (2.0, 0.0, -1.0)))


def test_inputs_are_left_alone(monkeypatch):
    x = branches(3, (2, 200))
    before = [tensor.clone() for tensor in x]
    fused(monkeypatch, x, WEIGHTS, rescale=0.7, project=orthogonal(1, 2))
    assert all(torch.equal(one, other) for one, other in zip(x, before, strict=True))


@pytest.mark.parametrize(
    ("options", "launches"), [({}, 1), ({"rescale": 0.5}, 2), ({"project": orthogonal(1, 2)}, 2)], ids=str
)
def test_launches(monkeypatch, options, launches):
    launched = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(grid)
            return self.kernel[grid]

    for name in ("sums_kernel", "combine_kernel"):
        monkeypatch.setattr(combination, name, Counted(getattr(combination, name)))
    x = branches(3, (2, 1000))
    combine(x, WEIGHTS, **options, impl="triton")
    assert len(launched) == launches


def test_stays_in_a_compiled_graph():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def step(x, scale):
        weights = (1.0 + scale, 0.5 - scale, -0.5)
        return combine(x, weights, rescale=0.7, project=orthogonal(2, 1), impl="triton") * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    x = branches(3, (2, 300), torch.bfloat16)
    for scale in (3.0, 3.0, 4.0):
        assert torch.equal(compiled(x, scale), step(x, scale))
    assert len(graphs) == 2  # torch makes one for every list of numbers
    calls = [node.target for node in graphs[-1].graph.nodes if node.op == "call_function"]
    assert torch.ops.stgfast.combine.default in calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operation_is_what_it_says(dtype):
    x = branches(3, (2, 3, 50), torch.float16)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        combination._combine,
        (x, list(WEIGHTS), 0.7, [1.0, -1.0, 0.0], -1.0, dtype),
        test_utils=checks,
    )


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"branches": []}, "branches: got 0, expected 1 to 8"),
        ({"branches": branches(9, (2, 3))}, "branches: got 9"),
        ({"branches": [torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 3)]}, r"shape of branches\[1\]"),
        ({"branches": [torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3).half()]}, r"dtype of branches\[2\]"),
        ({"branches": [torch.randn(2, 3), *[torch.randn(2, 3, device="meta")] * 2]}, r"device of branches\[1\]"),
        ({"branches": [torch.ones(2, 3, dtype=torch.int32)] * 3}, r"dtype of branches\[0\]"),
        ({"branches": [torch.randn(())] * 3}, r"shape of branches\[0\]"),
        ({"branches": [torch.randn(0, 3)] * 3}, r"shape of branches\[0\]"),
        ({"weights": (2.0, -1.0)}, "weights: got 2, expected 3"),
        ({"weights": (2.0, -1.0, 1.0)}, "weights: got a sum of 2.0, expected 1"),
        ({"weights": (2.0, -1.0, math.nan)}, "weights: got a sum of nan, expected 1"),
        ({"project": Projection(0, (1.0, 0.0, 0.0))}, "`of` of a projection: got 0, expected a branch from 1 to 2"),
        ({"project": Projection(3, (1.0, 0.0, 0.0))}, "`of` of a projection: got 3"),
        ({"project": Projection(1, (1.0, 0.0))}, "projection: got"),
        ({"project": Projection(1, (1.0, math.nan, 0.0))}, "projection: got"),
        ({"project": Projection(1, (1.0, 0.0, 0.0), math.inf)}, "projection: got"),
        ({"dtype": torch.int32}, "dtype: got"),
    ],
)
def test_refusals(impl, change, message):
    given = {"branches": [torch.randn(2, 3) for _ in range(3)], "weights": WEIGHTS} | change
    with pytest.raises(ValueError, match=message):
        combine(given.pop("branches"), given.pop("weights"), **given, impl=impl)


def test_float64_is_for_the_reference():
    x = [branch.double() for branch in branches(3, (2, 3))]
    assert combine(x, WEIGHTS).dtype == torch.float64
    with pytest.raises(ValueError, match=r"branches: got torch.float64, expected torch.float32, .* impl='reference'"):
        combine(x, WEIGHTS, impl="triton")
    with pytest.raises(ValueError, match=r"dtype: got torch.float64"):
        combine(branches(3, (2, 3)), WEIGHTS, dtype=torch.float64, impl="triton")


def test_implementations():
    with pytest.raises(ValueError, match="impl: got 'cuda', expected one of auto, reference, triton"):
        combine(branches(3, (2, 3)), WEIGHTS, impl="cuda")


@pytest.mark.skipif(DEVICE == "cuda", reason="this machine has a GPU")
def test_a_named_implementation_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    x = branches(3, (2, 3))
    assert torch.equal(combine(x, WEIGHTS), reference.combine(x, WEIGHTS))
    with pytest.raises(ValueError, match="impl: got 'triton', expected another implementation, since it needs a GPU"):
        combine(x, WEIGHTS, impl="triton")
