"""The benchmark of steps: variants agree, or none is timed. No time is asserted."""

import dataclasses
import io
import json

import pytest
import torch

from stgfast import Guidance, Perturbation
from stgfast.bench import command, measure, steps
from stgfast.bench.measure import arithmetic
from stgfast.bench.models import MODELS
from stgfast.bench.variants import OTHER_RESULT, VARIANTS, Bench
from stgfast.cli import main
from tests.precision import NEAR, near

SMALL = {"num_attention_heads": 2, "attention_head_dim": 16}
SHALLOW = {  # one for each way in which pipelines call, of the size that is called tiny
    "mochi": {**SMALL, "num_layers": 4, "pooled_projection_dim": 16, "text_embed_dim": 32, "max_sequence_length": 16},
    "wan-14b": {**SMALL, "num_layers": 4, "text_dim": 32, "ffn_dim": 64},
    "hunyuan-video": {
        **{**SMALL, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "rope_axes_dim": (4, 6, 6)},
        **{"text_embed_dim": 32, "pooled_projection_dim": 16},
    },
}

# Clips of few tokens, for what is counted and not timed.
FEW = {"mochi": (64, 64, 7), "ltx": (128, 128, 17), "cogvideox": (64, 64, 5), "hunyuan": (64, 64, 5)}
FEW |= {"wan": (64, 64, 9), "svd": (64, 64, 2)}
TOKENS = {"mochi": 4 * 4 * 2, "ltx": 4 * 4 * 3, "cogvideox": 4 * 4 * 2, "hunyuan": 4 * 4 * 2, "wan": 4 * 4 * 3}
TOKENS |= {"svd": 8 * 8 * 2}


def shallow(name):
    clip = (32, 32, 7 if name == "mochi" else 9)
    return dataclasses.replace(MODELS[name], narrow={"tiny": SHALLOW[name]}, layers={"full": 2}, clips={"tiny": clip})


@pytest.fixture(params=SHALLOW)
def model(request, monkeypatch):
    monkeypatch.setitem(MODELS, request.param, shallow(request.param))
    monkeypatch.setattr(steps, "rates", lambda device, dtype: steps.Rates(1e9, 1e9))
    torch.compiler.reset()
    return request.param


def run(*arguments):
    """The exit code, the rows, and the text for the user."""
    arguments = (*arguments, "--backend", "eager")
    parser = command.argparse.ArgumentParser()
    command.add_bench(parser)
    out, said = io.StringIO(), io.StringIO()
    code = command.run_bench(parser.parse_args(arguments), out, said)
    return code, [json.loads(line) for line in out.getvalue().splitlines()], said.getvalue()


def test_all_variants(model, tmp_path):
    file = tmp_path / "results" / "rows.jsonl"
    code, (row,), said = run(
        "--models", model, "--size", "tiny", "--rounds", "1", "--variants", *VARIANTS, "--save", str(file)
    )
    assert code == 0
    absent = {"reference", "graphs"} | (set() if model == "wan-14b" else {"guiders"})
    there = [each for each in VARIANTS if each not in absent]
    assert list(row["seconds"]) == there
    assert max(far for each, far in row["distance"].items() if each not in OTHER_RESULT) <= NEAR
    assert min(row["distance"][variant] for variant in OTHER_RESULT) > NEAR
    # The perturbed branch is computed in one block of four, and in one step of two where it is reused.
    stock, unshared = (4, 8) if model == "hunyuan-video" else (8, 12)
    rows = {
        "stock": stock,
        "paper": unshared,
        "passes": unshared,
        "stgfast": stock + 1,
        "split": stock + 1,
        "auto": stock + 1,
        "reuse": stock + 0.5,
    }
    for variant, count in rows.items():
        assert row["block_rows"][variant] == count
    assert row["matrix_share"].keys() == {"stgfast", "split", "auto", "compiled", "fastest"}
    assert row["attention_backend"] in ("native", "_native_math")
    assert file.read_text() == json.dumps(row) + "\n"
    assert model in said


CHECKOUT = """
import stgfast
from diffusers import MochiPipeline

class MochiSTGPipeline(MochiPipeline):
    def __call__(self, *args, stg_applied_layers_idx, stg_scale, do_rescaling, **kwargs):
        assert do_rescaling is False
        part = stgfast.Perturbation(stg_applied_layers_idx, scale=stg_scale)
        made = stgfast.accelerate(MochiPipeline(**self.components), stgfast.Guidance(part))(*args, **kwargs)
        made.frames *= FACTOR
        for layer in stg_applied_layers_idx:
            self.transformer.transformer_blocks[layer].forward = None  # as the paper leaves its own
        return made
"""


@pytest.mark.parametrize("model", ["mochi"], indirect=True)
def test_the_code_of_a_checkout(model, tmp_path):
    """It agrees, or nothing is timed; its changes to the model's blocks are undone afterwards."""
    file = tmp_path / MODELS[model].reference[0]
    arguments = ("--models", model, "--size", "tiny", "--rounds", "1", "--reference", str(tmp_path))
    code, rows, said = run(*arguments, "--variants", "reference")
    assert (code, rows) == (2, [])
    assert "expected a checkout of the paper's repository, which has Mochi/" in said
    file.parent.mkdir()
    for factor, expected in (("1.0", 0), ("1.001", 1)):
        file.write_text(CHECKOUT.replace("FACTOR", factor))
        code, rows, said = run(*arguments)
        assert code == expected
        assert ["reference" in row["seconds"] for row in rows] == [True] * (1 - expected)
    assert "'reference'" in said


@pytest.mark.again
def test_attention_is_chosen_for_one_variant_alone():
    torch.compiler.reset()
    bench = Bench(shallow("wan-14b"), "tiny", steps=2, backend="eager")
    vars(bench)["attention"] = "_native_math"
    before, other = bench.stgfast(), bench.fastest()
    assert not torch.equal(other, before)
    near(other, before)
    assert torch.equal(bench.stgfast(), before)


def test_no_number_where_variants_disagree(model, monkeypatch):
    made = Bench.passes

    def wrong(self):
        return made(self) * 1.001

    monkeypatch.setattr(Bench, "passes", wrong)
    code, rows, said = run("--models", model, "--size", "tiny", "--rounds", "1", "--variants", "passes")
    assert (code, rows) == (1, [])
    assert "nothing was timed" in said


def test_a_time_that_is_not_predicted_fails_the_check(model, monkeypatch):
    arguments = ("--models", model, "--check", "--rounds", "1", "--variants", "stock", "passes")
    for found, rounds, right in (([True], 1, True), ([False, True], 2, True), ([False] * 4, 4, False)):
        asked = [*found, found[-1]]
        monkeypatch.setattr(steps, "as_predicted", lambda *_, asked=asked: asked.pop(0))
        code, (row,), said = run(*arguments)
        assert code == (0 if right else 1)
        assert ("not within 5%" in said) != right
        assert "3 variants agree" in said
        assert (row["size"], row["rounds"], row["right"]) == ("tiny", rounds, right)
        assert row["distance"].keys() == {"stock", "passes", "stgfast"}
        assert not asked


def test_what_is_predicted():
    for over, right in ((1.141, True), (1.259, True), (1.139, False), (1.261, False)):
        assert steps.as_predicted({"paper": over}, {"paper": 1.2}) is right


def test_nothing_is_checked_where_variants_disagree(model, monkeypatch):
    made = Bench.passes
    monkeypatch.setattr(Bench, "passes", lambda self: made(self) * 1.01)
    code, rows, said = run("--models", model, "--check", "--rounds", "1", "--variants", "passes")
    assert (code, rows) == (1, [])
    assert "nothing was timed" in said


def test_a_step_is_the_fastest_of_every_part_of_it():
    assert steps.undisturbed([[1.0, 5.0, 2.0], [3.0, 4.0, 1.0]]) == 6.0


def test_parts_of_a_step(model, monkeypatch):
    """With a clock that advances only in modules without children."""
    bench, calls = Bench(MODELS[model], "tiny", steps=3), []
    leaves = [module for module in bench.denoiser.modules() if not list(module.children())]
    monkeypatch.setattr(measure.time, "process_time", lambda: float(len(calls)))
    for leaf in leaves:
        leaf.register_forward_pre_hook(lambda *_: calls.append(1))
    for variant in ("stgfast", "paper"):
        hooked = [len(leaf._forward_pre_hooks) for leaf in leaves]
        calls.clear()
        one, other = bench.parts(variant)
        assert one == other
        assert sum(one) * 3 == len(calls)
        assert set(one) == {0.0, 1.0}
        assert [len(leaf._forward_pre_hooks) for leaf in leaves] == hooked


@pytest.mark.parametrize("name", ["mochi", "ltx-2"])
def test_a_step_is_the_mean_of_all_but_the_first(name, monkeypatch):
    """With a clock that advances by one in the first call of a denoiser, and by ten in the others."""
    calls, clip = [], FEW[name.split("-")[0]]
    bench = Bench(MODELS[name], "tiny", steps=4, clip=clip)
    bench.denoiser.register_forward_pre_hook(lambda *_: calls.append(1 if len(calls) < of_a_step else 10))
    monkeypatch.setattr(measure.time, "process_time", lambda: sum(calls))
    of_a_step = bench.passes_of_a_step()
    seconds = bench.timed("stgfast")
    assert len(calls) == 4 * of_a_step
    assert seconds == (of_a_step * (1 + 3 * 10), 10 * of_a_step)


def test_one_step_cannot_be_timed():
    assert run("--models", "mochi", "--steps", "1")[0] == 2


def test_wrong_arguments(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--models", "no-such-model"])
    assert stopped.value.code == 2
    if not torch.cuda.is_available():
        assert main(["bench", "--device", "cuda"]) == 2
        assert "expected a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_predict_the_arithmetic(name):
    """For every family, the arithmetic follows the plan, and all variants agree on the result."""
    bench = Bench(MODELS[name], "tiny", steps=2, clip=FEW[name.split("-")[0]])
    variants = ("stock", "paper", "stgfast")
    made = {}
    counts = {each: arithmetic(lambda each=each: made.update({each: bench.make(each)})).total for each in variants}
    assert steps.agreeing(name, made, "stgfast", NEAR, OTHER_RESULT)["stock"] > NEAR
    rows = {each: bench.block_rows(each) for each in variants}
    costs, tokens = bench.costs()
    assert tokens == TOKENS[name.split("-")[0]]
    predicted = steps.predictions(rows, costs)
    for each in variants:
        assert counts[each] / counts["stgfast"] == pytest.approx(predicted[each], rel=0.05)
    if name != "svd":  # whose blocks are not alike; Mochi's last one of eight leaves half of its work out
        assert predicted["paper"] == pytest.approx(sum(rows["paper"]) / sum(rows["stgfast"]), rel=0.03)


def test_prompts_and_branches_agree_too():
    guidance = Guidance([Perturbation([2]), Perturbation([1], kind="attention", scale=0.5)])
    for name in SHALLOW:
        bench = Bench(shallow(name), "tiny", prompts=2, guidance=guidance)
        made = {each: bench.make(each) for each in ("stock", "stgfast", "paper", "passes")}
        assert steps.agreeing(name, made, "stgfast", NEAR, OTHER_RESULT)["stock"] > NEAR


def test_full_sizes_are_those_of_the_released_models():
    """Counted on the meta device, where weights take no memory."""
    billions = {
        **{"mochi": 10.0, "ltx-2b": 1.9, "ltx-13b": 13.0, "ltx-2": 18.9, "cogvideox-2b": 1.7, "cogvideox-5b": 5.6},
        **{"hunyuan-video": 12.8, "wan-1.3b": 1.4, "wan-14b": 14.3, "svd": 1.5},
    }
    for name, model in MODELS.items():
        denoiser = getattr(model.build("full", "meta"), model.part)
        count = sum(parameter.numel() for parameter in denoiser.parameters())
        assert round(count / 1e9, 1) == billions[name], name
        assert {parameter.dtype for parameter in denoiser.parameters()} <= {torch.bfloat16, torch.float32}
