"""Job files: what is read, and what is refused with its line and the reason."""

import json
import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stgfast import Guidance, Perturbation
from stgfast.errors import SettingsError
from stgfast.queue import job as jobs
from stgfast.queue import readers
from stgfast.queue.job import Job, safe_name
from stgfast.queue.readers import Bad, Line, read


def lines(tmp_path, text, ending=".jsonl", **more):
    path = tmp_path / f"jobs{ending}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read(path, **more))


def only(found):
    (line,) = found
    return line


def test_four_formats_say_the_same(tmp_path):
    expected = [
        Job(prompt="a red kite", seed=3, width=64, steps=4, guidance=Guidance(Perturbation([2], scale=2.0))),
        Job(prompt="the sea, grey", negative_prompt="bad", pipeline={"guidance_scale": 4.5}, name="sea"),
    ]
    given = [job.to_dict() for job in expected]
    guidance = json.dumps(given[0]["guidance"]).replace('"', '""')
    table = (
        "prompt,negative_prompt,seed,width,steps,guidance,pipeline,name\r\n"
        f'a red kite,,3,64,4,"{guidance}",,\r\n"the sea, grey",bad,,,,,"{{""guidance_scale"": 4.5}}",sea\r\n'
    )
    written = {
        ".jsonl": "\ufeff" + "\n\n".join(map(json.dumps, given)),
        ".csv": table,
        ".yaml": json.dumps(given, indent=1),  # which YAML is a superset of
    }
    for ending, text in written.items():
        found = lines(tmp_path, text, ending)
        assert [job for line in found for job in line.jobs] == expected, ending
    assert [line.number for line in lines(tmp_path, written[".jsonl"])] == [1, 3]
    prompts = lines(tmp_path, "# tonight\na red kite\n\nthe sea, grey\n", ".txt", defaults={"steps": 4})
    assert prompts == [Line(2, (Job(prompt="a red kite", steps=4),)), Line(4, (Job(prompt="the sea, grey", steps=4),))]


def test_yaml_as_people_write_it(tmp_path):
    text = "- a red kite\n- prompt: |\n    a dog\n    runs\n  guidance: {perturbations: [{layers: [1]}]}\n- 7\n"
    kite, dog, seven = lines(tmp_path, text, ".yaml")
    assert kite.jobs[0].prompt == "a red kite"
    assert (dog.number, dog.jobs[0].prompt) == (2, "a dog\nruns\n")
    assert seven == Bad(6, "an entry: got 7, expected an object such as " + jobs.EXAMPLE)


def test_repeat_counts_seeds(tmp_path):
    line = only(lines(tmp_path, '{"prompt": "a", "seed": 5, "repeat": 3, "name": "k"}'))
    assert [(job.seed, job.name) for job in line.jobs] == [(5, "k-0"), (6, "k-1"), (7, "k-2")]


BAD = {
    "{": "invalid JSON",
    "[1]": "expected an object",
    '{"prompt": "a", "prompt": "b"}': "'prompt' twice",
    '{"prompt": "a", "pipeline": {"x": NaN}}': "no number in JSON",
    '{"prompt": "a", "stepps": 3}': "expected 'steps';",
    '{"prompt": "a", "num_inference_steps": 3}': "'steps'",
    '{"prompt": ""}': "what to render, in words",
    '{"prompt": 7}': "prompt: got 7, expected text",
    '{"prompt": "a\\u0000"}': "control character U+0000",
    '{"prompt": "\\ud800"}': "control character U+D800",
    '{"prompt": "a", "seed": -1}': "whole number from 0",
    '{"prompt": "a", "seed": 1.5}': "whole number from 0",
    '{"prompt": "a", "seed": true}': "whole number from 0",
    '{"prompt": "a", "seed": 9223372036854775807, "repeat": 2}': "whole number from 0",
    '{"prompt": "a", "width": 100}': "a multiple of 8, such as 96",
    '{"prompt": "a", "height": 100000}': "from 16 to 8192",
    '{"prompt": "a", "steps": 0}': "from 1 to 1000",
    '{"prompt": "a", "repeat": 1000000}': "from 1 to 10000",
    '{"prompt": "a", "guidance": "mocha"}': "preset",
    '{"prompt": "a", "guidance": {"perturbations": [{"layers": [-1]}]}}': "layer numbers such as",
    '{"prompt": "a", "guidance": {"perturbation": []}}': "fields of Guidance",
    '{"prompt": "a", "guidance": {"perturbations": 3}}': "guidance",
    '{"prompt": "a", "pipeline": {"width": 64}}': "own field 'width'",
    '{"prompt": "a", "pipeline": {"callback_on_step_end": "x"}}': "that a job may set",
    '{"prompt": "a", "pipeline": {"stg_scale": 1}}': "that a job may set",
    '{"prompt": "a", "pipeline": []}': "an object with arguments",
    '{"prompt": "a", "image": "https://x.org/a.png"}': "expected a file",
    '{"prompt": "a", "image": "none.png"}': "a file that can be read",
    '{"prompt": "a", "image": "/dev/zero"}': "a regular file",
    '{"prompt": "a", "name": 1}': "name: got 1, expected text",
    '{"prompt": "a", "image_sha256": "00"}': "an image with it",
    '{"prompt": "a", "seed": 1' + "0" * 5000 + "}": "invalid JSON",
    '{"prompt": "a", "seed": 1' + "0" * 400 + "}": "more than 30 digits",
    "[" * 100_000: "too many nested brackets",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:60])
def test_bad_lines(tmp_path, text):
    good = '{"prompt": "a red kite"}'
    first, bad, last = lines(tmp_path, f"{good}\n{text}\n{good}\n")
    assert isinstance(first, Line)
    assert isinstance(last, Line)
    assert isinstance(bad, Bad), bad
    assert bad.number == 2
    assert BAD[text] in bad.why
    assert len(bad.why) < 1000


def test_long_lines_and_bytes_that_are_no_text(tmp_path):
    huge = json.dumps({"prompt": "x" * (10 << 20)})
    long = json.dumps({"prompt": "x" * 20_000})
    text = f"{huge}\n{long}\n".encode() + b'{"prompt": "\xff"}\n{"prompt": "a"}\n' + huge.encode()
    first, second, third, fourth, fifth = lines(tmp_path, text)
    assert first.why == f"a line: got {len(huge) + 1} bytes, expected {readers.MAX_LINE} at most"
    assert second.why == "prompt: got '20000 characters', expected 10000 at most"
    assert third.why.startswith("text: got bytes that are not UTF-8 at column 13")
    assert fourth == Line(4, (Job(prompt="a"),))
    assert fifth.number == 5


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../up",
            "a/b",
            "a\\b",
            "/etc/passwd",
            "..",
            ".",
            ".hidden",
            "-rf",
            "con",
            "NUL.mp4",
            "com1",
            "a.",
            "a ",
            "a:b",
        ),
        *("a\nb", "a\x00b", "x" * 200, "é" * 100, "index.html", "INDEX", "a*", "$(x)", "\u202egpj", "<b>", ""),
    ],
)
def test_names_that_leave_or_mislead(name):
    if name:
        with pytest.raises(SettingsError, match="name: got"):
            Job(prompt="a", name=name)
    with pytest.raises(SettingsError, match="name: got"):
        safe_name(name)


@pytest.mark.parametrize("name", ["kite-01", "Ein Drachen (rot)", "шар", "a.b_c", "e\u0301te"])
def test_names_that_are_fine(name):
    assert safe_name(safe_name(name)) == safe_name(name)
    assert safe_name("e\u0301") == "é"


def test_made_names_tell_recipes_apart():
    job = Job(prompt="A red kite, über  the sea/../" + "x" * 100, seed=1)
    name = job.named("m").name
    assert name.startswith("a-red-kite-uber-the-sea-xxx")
    assert safe_name(name) == name
    assert job.named("m").name == name
    others = [Job(prompt=job.prompt, seed=2).named("m").name, job.named("other").name]
    assert len({name, *others}) == 3
    assert Job(prompt="<script>", name="mine").named("m").name == "mine"


def test_csv_says_which_line(tmp_path):
    text = 'prompt,seed\n"two\nlines",1\na,b\na,1,2\n"a"b,1\nc,3\n'
    two, number, cells, quote, last = lines(tmp_path, text, ".csv")
    assert two.jobs[0].prompt == "two\nlines"
    assert number == Bad(4, "seed: got 'b', expected a whole number")
    assert cells == Bad(5, "a line: got 3 cells, expected 2 as in the header")
    assert quote.number == 6
    assert last.jobs[0].seed == 3
    assert "header: got" in only(lines(tmp_path, "prompt,colour\na,b\n", ".csv")).why
    assert "header: got" in only(lines(tmp_path, "prompt,prompt\na,b\n", ".csv")).why
    opened = lines(tmp_path, 'prompt\na\n"b\n' + "c" * 140_000 + "\nd\n", ".csv")
    assert [type(line) for line in opened] == [Line, Bad, Line]
    assert (opened[1].number, opened[2].jobs[0].prompt) == (4, "d")
    assert "begun in line 3" in opened[1].why


def test_yaml_remembers_nothing_of_an_entry(tmp_path, monkeypatch):
    import yaml

    loaders = []
    made = yaml.SafeLoader.__init__
    monkeypatch.setattr(yaml.SafeLoader, "__init__", lambda self, text: made(self, loaders.append(self) or text))
    assert len(lines(tmp_path, "".join(f"- &a{n} a\n" for n in range(50)), ".yaml")) == 50
    assert loaders[0].anchors == {}


def test_yaml_that_is_hostile_or_wrong(tmp_path):
    nested = "- &a [x, x]\n- &b [*a, *a]\n"
    assert "an alias" in lines(tmp_path, nested, ".yaml")[-1].why
    made = lines(tmp_path, "- !!python/object/apply:os.system ['true']\n- a\n", ".yaml")
    assert [line.number for line in made] == [1, 2]
    assert "invalid YAML" in made[0].why
    assert "expected one, each entry" in only(lines(tmp_path, "prompt: a\n", ".yaml")).why
    good, broken = lines(tmp_path, "- a\n- {b\n- c\n", ".yaml")
    assert isinstance(good, Line)
    assert "the rest was not read" in broken.why
    huge = lines(tmp_path, "- a\n- " + "x" * (3 << 20), ".yaml")
    assert f"more than {readers.MAX_LINE} bytes in one entry" in huge[-1].why
    twice = lines(tmp_path, "- {prompt: a, seed: 1, seed: 2}\n- {prompt: b, pipeline: {x: 1, x: 2}}\n- c\n", ".yaml")
    assert ["'seed' twice" in twice[0].why, "'x' twice" in twice[1].why] == [True, True]
    assert twice[2].jobs[0].prompt == "c"


def test_every_document_of_a_yaml_file_is_read(tmp_path):
    made = lines(tmp_path, "---\n- a\n- b\n---\n- prompt: c\n...\n---\n", ".yaml")
    assert [(line.number, line.jobs[0].prompt) for line in made] == [(2, "a"), (3, "b"), (5, "c")]
    first, second = lines(tmp_path, "- a\n---\nprompt: b\n", ".yaml")
    assert first.jobs[0].prompt == "a"
    assert second == Bad(
        3, "the file: got no list, expected one, each entry beginning with `- `; the rest was not read"
    )


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ("", ".jsonl"),
        ("\n\n", ".jsonl"),
        ("prompt,seed\n", ".csv"),
        ("# none\n", ".txt"),
        ("", ".yaml"),
        ("[]", ".yml"),
        ('{"vars": {"a": "b"}}', ".jsonl"),
    ],
)
def test_a_file_without_jobs_is_wrong(tmp_path, text, ending):
    with pytest.raises(SettingsError, match=rf"job file: got '.*jobs\{ending}', expected one with a job in it"):
        lines(tmp_path, text, ending)


def test_what_is_null(tmp_path):
    """`- prompt:` in YAML, and the null of JSON writers."""
    (empty,) = lines(tmp_path, "- prompt:\n", ".yaml")
    assert empty == Bad(1, "prompt: got 'NoneType', expected text")
    for field in ("prompt", "name", "seed", "pipeline", "repeat", "priority"):
        made = only(lines(tmp_path, json.dumps({"prompt": "a", field: None})))
        assert isinstance(made, Bad), field
        assert made.why.startswith(f"{field}: got "), made.why
    for field in ("negative_prompt", "width", "num_frames", "guidance", "image"):
        assert only(lines(tmp_path, json.dumps({"prompt": "a", field: None}))).jobs == (Job(prompt="a"),)


def test_unknown_ending(tmp_path):
    with pytest.raises(SettingsError, match=r"job file: got 'jobs.xls', expected a name that ends in \.jsonl"):
        lines(tmp_path, "", ".xls")


def test_images(tmp_path):
    Image.new("RGBA", (32, 16), "red").save(tmp_path / "fine.png")
    image = only(lines(tmp_path, '{"image": "fine.png"}')).jobs[0]
    assert image.image == str(tmp_path / "fine.png")
    assert len(image.image_sha256) == 64
    assert jobs.read_image(image.image).mode == "RGB"
    assert Job.from_dict(image.to_dict()) == image
    Image.new("RGB", (32, 16), "blue").save(tmp_path / "fine.png")
    with pytest.raises(SettingsError, match="as when the job was made"):
        Job.from_dict(image.to_dict())

    whole = (tmp_path / "fine.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    for side in (9000, 60_000):  # the size in the header of a small file
        header = b"IHDR" + side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
        bomb = whole[:8] + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:]
        (tmp_path / f"{side}.png").write_bytes(bomb)
    (tmp_path / "vector.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    with (tmp_path / "large.png").open("wb") as large:
        large.truncate(jobs.MAX_IMAGE + 1)
    for name in ("cut", "text", "vector"):
        ending = "svg" if name == "vector" else "png"
        assert "a whole image" in only(lines(tmp_path, json.dumps({"image": f"{name}.{ending}"}))).why
    assert f"9000 x 9000', expected {jobs.MAX_PIXELS} pixels" in only(lines(tmp_path, '{"image": "9000.png"}')).why
    assert "DecompressionBombError" in only(lines(tmp_path, '{"image": "60000.png"}')).why
    assert "bytes at most" in only(lines(tmp_path, '{"image": "large.png"}')).why


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "jobs.jsonl"
    with path.open("w") as file:
        for number in range(3000):
            file.write(json.dumps({"prompt": f"a kite {number} " + "x" * 1000, "seed": number}) + "\n")
    tracemalloc.start()
    try:
        assert sum(len(line.jobs) for line in read(path)) == 3000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20 < path.stat().st_size


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([*sorted(jobs.FIELDS), "vars", "modell"]) | st.text(max_size=8)
PATHS = st.sampled_from(["../x", "/etc/passwd", "a/b", "..", "con", "index", "x\x00y", "a\\b", "~", "é" * 70, "k.mp4"])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.dictionaries(NAMES, VALUES | PATHS, max_size=5), max_size=3))
def test_any_entry_is_a_job_or_a_bad_line(tmp_path_factory, entries):
    folder = tmp_path_factory.getbasetemp()
    text = "\n".join([json.dumps(entry) for entry in entries] + ['{"prompt": "a"}'])
    for line in lines(folder, text):
        assert isinstance(line, (Bad, Line))
        for job in line.jobs if isinstance(line, Line) else ():
            assert Job.from_dict(job.to_dict()) == job
            name = job.named("m").name
            assert (folder / name).resolve().parent == folder.resolve(), name
            assert name == safe_name(name)


SIGNS = "-: {}[],\"'\n\t &*!|>%@#aé\x00\\$0"


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet=st.sampled_from(SIGNS), max_size=80), st.sampled_from(sorted(readers.FORMATS)))
def test_any_file_is_read_to_its_end(tmp_path_factory, text, ending):
    found = lines(tmp_path_factory.getbasetemp(), '"a"\n' + text, ending)
    assert found
    assert all(isinstance(line, (Bad, Line)) for line in found)
