"""Prompts with choices and variables."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stgfast.errors import SettingsError
from stgfast.queue.job import MAX_PROMPT
from stgfast.queue.readers import Bad, read
from stgfast.queue.words import Words

COLOURS = ["red", "green", "blue"]


def lines(folder, *entries):
    path = folder / "jobs.jsonl"
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    return list(read(path))


def prompts(found):
    return [job.prompt for line in found for job in line.jobs]


def test_a_choice_is_made_by_the_seed(tmp_path):
    entry = {"prompt": "{red|green|blue} kite over {the sea|a {wide|narrow} field}", "seed": 3, "repeat": 60}
    first, again = prompts(lines(tmp_path, entry)), prompts(lines(tmp_path, entry))
    assert first == again
    kites = {
        f"{colour} kite over {place}" for colour in COLOURS for place in ("the sea", "a wide field", "a narrow field")
    }
    assert set(first) == kites  # the second choice is independent of the first
    assert first[5] == prompts(lines(tmp_path, {**entry, "seed": 8, "repeat": 1}))[0]
    # The choice of a seed must not change between versions, or folders would render everything again.
    assert first[:3] == FIRST


FIRST = ["green kite over the sea", "blue kite over the sea", "green kite over a wide field"]


def test_variables(tmp_path):
    (tmp_path / "animals.txt").write_text("# some\na cat\n\n  a dog \n")
    found = lines(
        tmp_path,
        {"prompt": "costs $5, $style"},  # none is known yet
        {"vars": {"style": "oil on {canvas|wood}", "colour": COLOURS, "animal": {"file": "animals.txt"}}},
        {"prompt": "${animal}s, $colour and $colour, $style", "negative_prompt": "$colour", "repeat": 20},
        {"vars": {"style": "ink"}},
        {"prompt": r"\$style is $style \{a\|b\} {c}"},
    )
    assert [line.number for line in found] == [1, 3, 5]
    first, *middle, last = [job for line in found for job in line.jobs]
    assert first.prompt == "costs $5, $style"
    assert last.prompt == "$style is ink {a|b} {c}"
    for job in middle:
        animal, colours, style = job.prompt.split(", ")
        assert animal in ("a cats", "a dogs")
        assert colours == f"{job.negative_prompt} and {job.negative_prompt}"
        assert style in ("oil on canvas", "oil on wood")
    assert len({job.prompt for job in middle}) > 6


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"prompt": "{a|b"}, "a } for every {"),
        ({"prompt": "$stile"}, r"prompt: got '$stile', expected a variable of the file: $style"),
        ({"prompt": "{|}"}, "one that is never empty"),
        ({"prompt": "{" * 300 + "a" + "}" * 300}, "fewer braces"),
        ({"vars": {"a": "$b", "b": "$a"}, "prompt": "a"}, "an entry of its own"),
        ({"vars": {"1a": "x"}}, "a name of letters"),
        ({"vars": {"a": []}}, "$a: got 'list', expected text, or a list of 1 to"),
        ({"vars": {"a": [1]}}, "$a: got 1, expected text"),
        ({"vars": {"a": {"file": "none.txt"}}}, "$a: got 'none.txt', expected a text file"),
        ({"vars": {"a": {"file": "../outside.txt"}}}, "$a: got '../outside.txt', expected a text file"),
        ({"vars": {"a": {"file": "/etc/hostname"}}}, "$a: got '/etc/hostname', expected a text file"),
        ({"vars": {"a": {"fle": "x"}}}, "$a: got 'dict', expected text, a list"),
        ({"vars": {"a": {}}}, "$a: got 'dict', expected text, a list"),
        ({"vars": 3}, "vars: got 'dict', expected an entry of its own"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, entry, why):
    (tmp_path.parent / "outside.txt").write_text("secret")
    bad = [
        line for line in lines(tmp_path, {"vars": {"style": "ink"}}, entry, {"prompt": "a"}) if isinstance(line, Bad)
    ]
    (only,) = bad
    assert only.number == 2
    assert why in only.why


def test_variables_of_themselves_end():
    circle = Words({"a": ["$b"], "b": ["x $a"]})
    with pytest.raises(SettingsError, match="not refer to themselves"):
        circle.chosen("$a", "0")
    many = Words({f"v{n}": [f"$v{n + 1} " * 10] for n in range(20)} | {"v20": ["word"]})
    with pytest.raises(SettingsError, match=f"{MAX_PROMPT} at most"):
        many.chosen("$v0", "0")


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet="ab{}|$\\ é", max_size=60), st.integers(0, 99))
def test_any_text_is_chosen_from_or_refused(text, seed):
    words = Words({"a": ["x", "{b|$b}"], "b": "yz"})
    try:
        made = words.chosen(text, f"{seed} prompt")
    except SettingsError:
        return
    assert made == words.chosen(text, f"{seed} prompt")
    if not set(text) & set("{}|$\\"):
        assert made == text
