"""Requests to a folder from outside of its runs, and its status."""

import json
import sqlite3
from functools import partial

import pytest

from stgfast.cli import main
from stgfast.errors import SettingsError
from stgfast.queue import state
from stgfast.queue.desk import Choice, Desk
from stgfast.queue.job import Job
from stgfast.queue.state import CANCELLED, CLAIMED, DONE, FAILED, PENDING, StoreError
from stgfast.queue.status import status_of
from stgfast.queue.store import Store
from tests.queue.test_store import finish, jobs, statuses, take_up


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path) as found:
        take_up(found, [*jobs(4), Job(prompt="The grey sea", name="sea")])
        yield found


def check(entry, line, **made):
    job = Job.from_dict(json.loads(entry))
    if job.steps == 13:
        raise SettingsError("steps: got 13, expected another")
    return job.named("m"), f"{job.named('m').name}.mp4", line, "", "m", made


def claimed(store, size=1):
    batch = store.claim(size, "cpu")
    return [task.job.name for task in batch.tasks] if batch else []


def test_added_jobs_are_taken_up_by_the_run_that_is_on(tmp_path, store):
    with Desk(tmp_path) as desk:
        given = [
            {"prompt": "a dog", "name": "dog"},
            {"prompt": "no", "steps": 13},
            {"prompt": "a kite", "seed": 1, "name": "k1"},
        ]
        assert desk.add(given, priority=3) == (3, [])
        assert status_of(desk).inbox == 3
    new, refused = store.take_in({"m": {}}, check)
    assert new == 1
    assert [line for line, _ in refused] == [2, 3]
    assert "steps: got 13" in refused[0][1]
    assert "the same clip as line 2" in refused[1][1]
    assert claimed(store) == ["dog"]
    assert store.take_in({"m": {}}, check) == (0, [])  # an entry is refused once
    with Desk(tmp_path) as desk:
        found = status_of(desk)
    assert (found.inbox, [name for name, _ in found.refused]) == (0, ["no", "k1"])


def test_added_jobs_are_any_run_s_of_the_same_model(tmp_path):
    with Desk(tmp_path, create=True) as desk:
        desk.add([{"prompt": "a dog", "name": "dog"}])
    with Store(tmp_path) as store:
        assert store.take_in({"m": {"dtype": "float32"}}, partial(check, dtype="float32"))[0] == 1
    with Store(tmp_path) as other, Store(tmp_path) as store:
        assert other.take_in({"n": {"dtype": "float32"}}, partial(check, dtype="float32"))[0] == 0
        assert other.take_in({"m": {"dtype": "bfloat16"}}, partial(check, dtype="float32"))[0] == 0
        assert claimed(other) == []
        assert store.take_in({"m": {"dtype": "float32"}}, partial(check, dtype="float32"))[0] == 1
        assert claimed(store) == ["dog"]


def test_what_is_wrong_is_not_added(tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    with Desk(tmp_path, create=True) as desk:
        count, bad = desk.add(path)
        assert (count, [line.number for line in bad]) == (0, [2])
        assert status_of(desk).inbox == 0
        with pytest.raises(SettingsError, match="priority: got 1001"):
            desk.add([{"prompt": "a"}], priority=1001)


def test_cancelled_jobs_are_not_rendered(tmp_path, store):
    batch = store.claim(2, "cpu")
    first, second = batch.tasks
    with Desk(tmp_path) as desk:
        assert desk.cancel(Choice(names=["k0", "k2.mp4", "none"])) == ["k0.mp4", "k2.mp4"]
    assert store.cancelled([first.id, second.id]) == {first.id}
    aside = store.scratch / first.file
    aside.write_text("whole")
    assert store.finish(first, aside, {"denoise": 1.0}) == (CANCELLED, "it was cancelled")
    assert not aside.exists()
    assert not (tmp_path / first.file).exists()
    finish(store, second)
    store.give_back([first])
    store.fail(first, "no", {})
    assert store.died([first], "killed") == []
    assert statuses(store) == {
        **{"k0.mp4": CANCELLED, "k1.mp4": DONE, "k2.mp4": CANCELLED, "k3.mp4": PENDING, "sea.mp4": PENDING}
    }
    with Desk(tmp_path) as desk:
        assert desk.cancel(Choice(names=["k1"])) == []  # finished clips stay
        assert desk.retry(Choice(statuses=[CANCELLED])) == ["k0.mp4", "k2.mp4"]
    assert claimed(store, 9) == ["k0", "k2", "k3", "sea"]


def test_a_job_that_is_cancelled_and_planned_again_stays_cancelled(tmp_path, store):
    with Desk(tmp_path) as desk:
        desk.cancel(Choice(names=["k0"]))
    with Store(tmp_path) as later:
        take_up(later, jobs(2))
        assert statuses(later) == {"k0.mp4": CANCELLED, "k1.mp4": PENDING}


def test_pauses(tmp_path, store):
    with Desk(tmp_path) as desk:
        assert desk.pause() == []
        assert status_of(desk).paused
        assert claimed(store) == []
        desk.resume()
        assert desk.pause(Choice(words="KITE a")) == ["k0.mp4", "k1.mp4", "k2.mp4", "k3.mp4"]
        assert (status_of(desk).paused, status_of(desk).held) == (False, 4)
        assert store.waiting() == 1
        assert claimed(store, 9) == ["sea"]
        assert claimed(store, 9) == []
        desk.resume(Choice(names=["k[12]"]))
        assert claimed(store, 9) == ["k1", "k2"]


def test_priorities(tmp_path, store):
    with Desk(tmp_path) as desk:
        desk.prioritise(Choice(names=["sea"]), 2)
        desk.prioritise(Choice(names=["k3", "k2"]), 1)
        desk.add([{"prompt": "low", "name": "low"}])
        desk.prioritise(Choice(words="low"), -1)
    store.take_in({"m": {}}, check)
    assert [claimed(store, 9) for _ in range(4)] == [["sea"], ["k2", "k3"], ["k0", "k1"], ["low"]]


def test_what_a_run_died_of_comes_last_whatever_its_priority(tmp_path, store):
    with Desk(tmp_path) as desk:
        desk.prioritise(Choice(names=["k0"]), 9)
    store.died(store.claim(1, "cpu").tasks, "killed")
    assert [claimed(store, 9) for _ in range(2)] == [["k1", "k2", "k3", "sea"], ["k0"]]


def test_an_inbox_is_told_by_names_and_words(tmp_path):
    with Desk(tmp_path, create=True) as desk:
        desk.add([{"prompt": "a red kite", "name": "kite"}, {"prompt": "the grey sea"}, {"prompt": "a dog"}])
        assert desk.cancel(Choice(names=["kit*"])) == ["kite"]
        assert desk.cancel(Choice(words="sea grey")) == ["the grey sea"]
        assert desk.pause(Choice(every=True)) == ["a dog"]
    with Store(tmp_path) as store:
        assert store.take_in({"m": {}}, check)[0] == 1
        assert claimed(store) == []


def test_a_choice_is_of_something(tmp_path):
    with pytest.raises(SettingsError, match="jobs: got none, expected names of clips, --words, --status or --all"):
        Choice(words="  ")
    with pytest.raises(StoreError, match="expected one of stgfast render"):
        Desk(tmp_path / "none").__enter__()
    assert not (tmp_path / "none").exists()


def test_how_it_stands(tmp_path, store):
    store.begin("m")
    batch = store.claim(2, "cpu")
    store.record([(batch.tasks[0].id, "denoise", 3, 12, 4.5, "H100")])
    finish(store, store.claim(1, "cpu").tasks[0])
    store.fail(store.claim(1, "cpu").tasks[0], "ValueError: why", {})
    with Desk(tmp_path) as desk:
        found = status_of(desk)
    assert found.counts == {**dict.fromkeys(state.STATUSES, 0), PENDING: 1, CLAIMED: 2, DONE: 1, FAILED: 1}
    one, other = found.running
    assert (one.file, one.stage, one.step, one.steps, one.seconds, one.place) == (
        "k0.mp4",
        "denoise",
        3,
        12,
        4.5,
        "H100",
    )
    assert (other.file, other.stage) == ("k1.mp4", "begins")
    assert found.failures == [("k3.mp4", "ValueError: why")]
    assert found.runs[0]["model"] == "m"
    assert found.rate > 0
    assert found.seconds == pytest.approx(3 / found.rate * 3600)
    json.dumps(found.to_dict())
    store.record([])
    with Desk(tmp_path) as desk:
        assert {job.stage for job in status_of(desk).running} == {"begins"}


def test_a_run_that_is_gone_is_not_on(tmp_path):
    with Store(tmp_path) as store:
        store.begin("m")
        with Desk(tmp_path) as desk:
            assert len(status_of(desk).runs) == 1
    with Desk(tmp_path) as desk:
        desk.connection.execute("INSERT INTO runs VALUES ('dead', 1, 'h', 'm', 0.0)")
        assert status_of(desk).runs == []


@pytest.mark.parametrize("version", [1, 2])
def test_a_state_of_an_older_version_is_used(tmp_path, version):
    (tmp_path / state.FOLDER).mkdir()
    with sqlite3.connect(tmp_path / state.FOLDER / "jobs.db") as old:
        more = [f"ALTER TABLE jobs ADD COLUMN {name} {kind}" for name, kind in state.COLUMNS.items()]
        more = {
            1: ["CREATE INDEX waiting ON jobs (status, deaths, apart, stack, id)"],
            2: more + state.MORE.split(";\n"),
        }
        for statement in (state.JOBS.replace("identity", "recipe"), *state.REST.split(";\n"), *more[version]):
            old.execute(statement)
        old.execute("INSERT INTO stacks VALUES (1, 'k', 's')")
        values = "(1, 'k0.mp4', 'k0.mp4', ?, ?, 'm', 1, 1)"
        job = jobs(1)[0]
        old.execute(
            f"INSERT INTO jobs (id, file, folded, recipe, job, model, line, stack) VALUES {values}",
            (job.identity("m"), json.dumps(job.to_dict())),
        )
        old.execute(f"PRAGMA user_version={version}")
    with Store(tmp_path) as store:
        assert take_up(store, jobs(2)) == []
        assert [claimed(store, 9) for _ in range(2)] == [["k0"], ["k1"]]
    with Store(tmp_path) as store:  # and once more, as one of this version
        assert take_up(store, jobs(2)) == []


def test_links_are_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for name in ("jobs.db", "lock"):
        out = tmp_path / name.replace(".", "-")
        (out / state.FOLDER).mkdir(parents=True)
        (out / state.FOLDER / name).symlink_to(elsewhere)
        with pytest.raises(StoreError, match=r"got a link|Too many levels of symbolic links"):
            Store(out).__enter__()
        assert not elsewhere.exists()


def told(capsys, *arguments):
    code = main([str(part) for part in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_commands(tmp_path, store, capsys):
    path = tmp_path / "more.txt"
    path.write_text("a dog\na \x1bcat\n")
    out = ("--out", tmp_path)
    code, said, err = told(capsys, "add", path, *out)
    assert (code, said) == (2, "")
    assert err == "line 2: prompt: got 'the control character U+001B', expected text without\n" + (
        "stgfast add: 1 bad line; nothing was added\n"
    )
    path.write_text("a dog\n")
    assert told(capsys, "add", path, *out) == (0, "1 job added\n", "")
    assert told(capsys, "add", tmp_path / "none.txt", *out)[0] == 2
    assert told(capsys, "cancel", "k0", "k1", *out) == (0, "2 jobs cancelled: k0.mp4, k1.mp4\n", "")
    assert told(capsys, "cancel", "none", *out) == (1, "0 jobs cancelled\n", "")
    assert told(capsys, "cancel", *out)[0] == 2
    assert told(capsys, "retry", "--status", "cancelled", *out)[1] == "2 jobs to be retried: k0.mp4, k1.mp4\n"
    assert told(capsys, "priority", "5", "sea", *out) == (0, "1 job with priority 5: sea.mp4\n", "")
    assert told(capsys, "priority", "5000", "sea", *out)[0] == 2
    assert told(capsys, "pause", "--words", "kite", *out)[1].startswith("4 jobs paused: k0.mp4")
    assert told(capsys, "pause", *out) == (0, f"{tmp_path} paused\n", "")
    code, said, _ = told(capsys, "status", *out)
    assert code == 0
    assert said.splitlines()[:4] == ["5 pending", "1 added, not yet read by a run", "paused", "no active run"]
    assert told(capsys, "resume", *out)[0] == 0
    found = json.loads(told(capsys, "status", "--json", *out)[1])
    assert (found["paused"], found["held"], found["inbox"]) == (False, 4, 1)
    for command in (["status"], ["cancel", "a"], ["pause"], ["resume"]):
        code, _, err = told(capsys, *command, "--out", tmp_path / "none")
        assert code == 3
        assert err.startswith(f"stgfast {command[0]}: output folder ")
