"""The READMEs are true: tables match plans and measurements, settings exist, examples run."""

import json
import re
import sys
from pathlib import Path

import diffusers
import pytest

import stgfast
from stgfast import Guidance, Perturbation, cli
from stgfast.batching.plan import branches_for, make_plan
from stgfast.call import SETTINGS
from stgfast.integrations import ADAPTERS
from stgfast.kinds import Mark
from stgfast.queue.readers import checked
from tests.precision import distance, same
from tests.proof import untabled

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import fronts
import measured
import pipelines
import readme
import studied

pytestmark = pytest.mark.usefixtures("float64")

ROOT = readme.README.parent
README = readme.README.read_text()
PAGES = [
    readme.README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "stgfast").glob("*/README.md")),
    ROOT / "bench/README.md",
    ROOT / "tests/README.md",
]


def test_every_pipeline_is_in_the_table():
    assert {name for model in pipelines.MODELS for name in model.pipelines} == set(ADAPTERS | pipelines.OPEN_SORA)


MADE = {
    "pipelines.py": (pipelines, {"README.md": ("+14%", "+13%"), "page.md": ("144, 109, 96", "144, 108, 96")}),
    "fronts.py": (fronts, {"page.md": ("| way | cost |", "| way | price |")}),
    "measured.py": (measured, {"page.md": ("| SVD |", "| other |")}),
    "studied.py": (studied, {"README.md": ("| CFG 4 |", "| CFG 5 |"), "page.md": ("| CFG 4 |", "| CFG 5 |")}),
}


# The tests of one script share its imports.
FILES = [
    pytest.param(script, file, marks=pytest.mark.xdist_group(script))
    for script, (_, files) in MADE.items()
    for file in files
]


@pytest.mark.parametrize(("script", "file"), FILES)
def test_the_tables_are_what_they_are_made_of(script, file, monkeypatch, capsys, tmp_path):
    made, wrong = MADE[script]
    texts = {"README.md": README, "page.md": made.PAGE.read_text()}
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    assert made.main() == 0
    for name, text in texts.items():
        (tmp_path / name).write_text(text.replace(*wrong[file]) if name == file else text)
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    monkeypatch.setattr(made, "PAGE", tmp_path / "page.md")
    assert made.main() == 1
    assert f"{script} --write" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [script, "--write"])
    assert made.main() == 0
    assert {name: (tmp_path / name).read_text() for name in texts} == texts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_linked_is_there(page):
    linked = re.findall(r"\]\(([^)]+)\)", page.read_text())
    assert [link for link in linked if "://" not in link and not (page.parent / link.partition("#")[0]).exists()] == []


def test_every_page_is_linked():
    linked = {ROOT / link for link in re.findall(r"\]\(([^)]+\.md)\)", README)}
    assert linked == set(PAGES[1:])


TORCHRUN = {"--standalone", "--nproc-per-node", "--max-restarts"}


def test_the_job_that_is_shown(tmp_path):
    (line,) = re.findall(r"```json\n(.*?)\n```", (ROOT / "stgfast" / "render" / "README.md").read_text())
    (job,) = checked(1, json.loads(line), base=tmp_path).jobs
    assert job.guidance == Guidance(Perturbation([30]))


@pytest.mark.parametrize(
    ("page", "commands"),
    [
        ("stgfast/render", ("render", "sweep", "status", "add", "cancel", "priority", "serve")),
        ("bench", ("bench",)),
        ("stgfast/tune", ("tune", "render")),
    ],
)
def test_the_options_that_are_named(page, commands, capsys):
    for command in commands:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
    options = re.compile(r"(?<![-\w])--[a-z][a-z-]*")
    named = set(options.findall((ROOT / page / "README.md").read_text())) - TORCHRUN
    assert named <= set(options.findall(capsys.readouterr().out))


def test_wan_at_a_late_layer():
    late = Guidance(Perturbation([30], of="uncond", base="guided"))

    def every_block(part):
        return {layer: Mark(part.kind) for layer in part.layers}

    plans = [
        make_plan(branches_for(late, (source,), {"uncond", "perturbed0"}, every_block), 40)
        for source in ("cond", "uncond")
    ]
    assert sum(sum(plan.computed) for plan in plans) == 89
    assert "Wan 14B at layer 30\ntakes 89 block-rows in place of 120" in pipelines.PAGE.read_text()
    assert f"Wan 14B at layer 30 costs {89 / 80 - 1:.0%} more than CFG alone" in README


def test_the_explanation_is_what_is_printed():
    widths = {"pooled_projection_dim": 16, "text_embed_dim": 16, "time_embed_dim": 16}
    transformer = diffusers.MochiTransformer3DModel(num_attention_heads=2, attention_head_dim=8, **widths)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = stgfast.accelerate(diffusers.MochiPipeline(scheduler, None, None, None, transformer))
    assert str(stgfast.explain(pipe)) in README


def test_every_setting_is_named():
    for name in SETTINGS:
        assert f"`{name}`" in README
    for name in ("make demo", "make test", "stgfast.accelerate", "restore", "explain", "max_rows"):
        assert name in README


def test_a_pipeline_that_is_not_in_the_table():
    (code,) = re.findall(r"```python\n(import stgfast\n.*?)```", pipelines.PAGE.read_text(), re.DOTALL)
    family = untabled.FOUND["AnimateDiff"]
    expected = family.plain(Guidance(Perturbation([4])), 2)
    assert family.pipe().__class__.__name__ not in ADAPTERS
    pipe = family.pipe()
    exec(code.replace("num_frames=16", "num_frames=4, height=16, width=16, guidance_scale=4.0"), {"pipe": pipe})
    same(family.run(pipe, 2), expected)
    assert distance(family.run(family.pipe(), 2), expected) > 1e-3
