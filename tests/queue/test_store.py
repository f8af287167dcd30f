"""The state of an output folder: claims, deaths, interrupted renames, and unusual folders."""

import json
import os
import signal
import sqlite3
import time

import pytest

from stgfast import Guidance, Perturbation
from stgfast.errors import SettingsError
from stgfast.queue import state
from stgfast.queue import store as stores
from stgfast.queue.job import Job
from stgfast.queue.state import CANCELLED, CLAIMED, DONE, FAILED, FOLDER, PENDING, StoreError
from stgfast.queue.store import Store
from stgfast.queue.taking import trusted


def jobs(count, **more):
    return [Job(prompt="a kite", seed=seed, name=f"k{seed}", **more) for seed in range(count)]


def take_up(store, some, model="m", ending=".mp4"):
    for number, job in enumerate(some, 1):
        store.stage(job, job.name + ending, number, "", model)
    with store.taking_up([]) as bad:
        return list(bad)


def statuses(store):
    return {row.file: row.status for row in store.rows()}


def finish(store, task, text="whole"):
    aside = store.scratch / task.file
    aside.write_text(text)
    assert store.finish(task, aside, {"denoise": 1.5}) == (DONE, "")


def test_from_claim_to_done(tmp_path):
    with Store(tmp_path / "new" / "out") as store:
        assert take_up(store, jobs(3)) == []
        batch = store.claim(2, "cpu")
        assert [task.file for task in batch.tasks] == ["k0.mp4", "k1.mp4"]
        assert store.counts() == {**dict.fromkeys(state.STATUSES, 0), "pending": 1, "claimed": 2}
        finish(store, batch.tasks[0])
        store.fail(batch.tasks[1], "ValueError: why", {"text": 0.5})
        done, failed, waiting = store.rows()
        assert (done.status, done.seconds, done.attempts, done.error) == (DONE, {"denoise": 1.5}, 1, None)
        assert (failed.status, failed.error, failed.line) == (FAILED, "ValueError: why", 2)
        assert (waiting.status, waiting.job) == (PENDING, jobs(3)[2])
        assert store.claim(2, "cpu").tasks[0].file == "k2.mp4"
        assert store.claim(2, "cpu") is None
    out = tmp_path / "new" / "out"
    assert sorted(path.name for path in out.iterdir()) == [FOLDER, "k0.mp4"]
    assert sorted(path.name for path in (out / FOLDER).iterdir()) == ["jobs.db", "lock"]


def test_a_second_start_goes_on(tmp_path):
    with Store(tmp_path) as store:
        take_up(store, jobs(3))
        first, second, third = store.claim(3, "cpu").tasks
        finish(store, first)
        store.fail(second, "no", {})
    with Store(tmp_path) as store:  # the third was claimed when the first run ended
        assert take_up(store, jobs(4)) == []
        assert list(statuses(store).values()) == [DONE, FAILED, PENDING, PENDING]
        assert store.retry_failed() == 1
        assert [task.file for task in store.claim(9, "cpu").tasks] == ["k1.mp4", "k2.mp4", "k3.mp4"]
    (tmp_path / "k0.mp4").unlink()
    with Store(tmp_path) as store:  # a deleted clip is rendered again
        take_up(store, jobs(1))
        assert statuses(store) == {"k0.mp4": PENDING}  # and a run renders its own jobs only
        assert third.file == "k2.mp4"


def test_jobs_that_do_not_fit_together(tmp_path):
    guided = {"guidance": Guidance(Perturbation([1]))}
    kinds = [{}, {"width": 64}, guided, {"pipeline": {"x": 1}}, {"steps": 3}, {"negative_prompt": "bad"}, {}]
    some = [Job(prompt=f"p{n}", seed=n, name=f"k{n}", **kind) for n, kind in enumerate(kinds)]
    with Store(tmp_path) as store:
        take_up(store, some)
        batches = []
        while batch := store.claim(8, "cpu"):
            batches.append([task.job.seed for task in batch.tasks])
            assert all(task.job == some[task.job.seed] for task in batch.tasks)
    assert batches == [[0, 6], [1], [2], [3], [4], [5]]


def test_memory_is_remembered_by_shape_and_device(tmp_path):
    with Store(tmp_path) as store:
        take_up(store, [*jobs(9, width=64), Job(prompt="a", width=32, name="small")])
        batch = store.claim(8, "card")
        store.bound(batch.shape, 4)
        store.bound(batch.shape, 6)  # which was in flight meanwhile
        store.give_back(batch.tasks)
    with Store(tmp_path) as store:
        take_up(store, [*jobs(9, width=64), Job(prompt="a", width=32, name="small")])
        assert len(store.claim(8, "card")) == 4
        assert len(store.claim(8, "larger card")) == 5


def test_jobs_set_apart(tmp_path):
    with Store(tmp_path) as store:
        take_up(store, jobs(4))
        store.give_back(store.claim(2, "cpu").tasks, apart=True, error="why")
        assert [len(store.claim(8, "cpu")) for _ in range(3)] == [2, 1, 1]
        assert [row.error for row in store.rows()] == ["why", "why", None, None]


def test_names_taken(tmp_path):
    (tmp_path / "k2.mp4").write_text("mine")
    (tmp_path / "k3.mp4").symlink_to("/etc/passwd")
    with Store(tmp_path) as store:
        some = [*jobs(4), Job(prompt="b", name="K0"), Job(prompt="a kite", seed=1, name="k1")]
        found = {bad.number: bad.why for bad in take_up(store, some)}
    assert set(found) == {3, 4, 5, 6}
    assert "not on its list" in found[3]
    assert "not on its list" in found[4]
    assert "the same name as line 1, expected" in found[5]
    assert "the same clip as line 2, expected" in found[6]
    with Store(tmp_path) as store:
        batch = store.claim(1, "cpu") or take_up(store, jobs(1)) or store.claim(1, "cpu")
        finish(store, batch.tasks[0])
    with Store(tmp_path) as store:
        bad = take_up(store, [Job(prompt="a kite", seed=8, steps=3, name="k0")], model="n")
    assert "with other settings (model, seed, steps)" in bad[0].why


def test_nothing_is_taken_up_where_the_caller_refuses(tmp_path):
    with Store(tmp_path) as store:
        store.stage(jobs(1)[0], "k0.mp4", 1, "", "m")

        def refuse():
            with store.taking_up([]) as bad:
                assert list(bad) == []
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            refuse()
        assert sum(store.counts().values()) == 0
        assert list(store.rows(every=True)) == []


def test_two_runners_share(tmp_path):
    with Store(tmp_path) as one, Store(tmp_path) as two:
        assert take_up(one, jobs(10)) == take_up(two, jobs(10)) == []
        claims = [batch.tasks for store in (one, two, one, two) for batch in [store.claim(3, "cpu")]]
        files = [task.file for tasks in claims for task in tasks]
        assert len(files) == len(set(files)) == 10
        assert (one.elsewhere(), two.elsewhere()) == (4, 6)
        assert one.recover() == two.recover() == 0  # both live
        assert two.finish(claims[0][0], two.scratch / "x", {})[0] == CANCELLED  # another runner has it
        two.fail(claims[0][0], "no", {})
        two.give_back(claims[0])
        assert statuses(one)["k0.mp4"] == CLAIMED


def dying(tmp_path, work):
    """Another process, killed during its work."""
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        store = Store(tmp_path).__enter__()
        work(store)
        os.write(go, store.runner.encode())
        time.sleep(60)
        os._exit(1)
    runner = os.read(ready, 100).decode()
    os.close(ready)
    os.close(go)
    yield runner
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    yield runner


def test_claims_of_the_dead(tmp_path, monkeypatch):
    """A run that renders in another process is killed: no job is to blame."""
    other = dying(tmp_path, lambda store: (take_up(store, jobs(4)), store.claim(2, "cpu")))
    runner = next(other)
    with Store(tmp_path) as store:
        take_up(store, jobs(4))
        monkeypatch.setattr(time, "time", lambda: 0.0)  # clocks may go back; they decide nothing
        assert (store.recover(), store.elsewhere()) == (0, 2)
        next(other)
        assert (store.recover(), store.elsewhere()) == (2, 0)
        assert not (tmp_path / FOLDER / runner).exists()
        assert [task.file for task in store.claim(8, "cpu").tasks] == ["k0.mp4", "k1.mp4", "k2.mp4", "k3.mp4"]
        assert [row.attempts for row in store.rows()] == [2, 2, 1, 1]


def claims(store, size=8, **more):
    found = []
    while batch := store.claim(size, "cpu", **more):
        found.append(([task.file[:2] for task in batch.tasks], batch.lonely))
    return found


def test_what_a_run_dies_of_goes_last_then_apart_and_fails(tmp_path):
    """The run renders in its own process, which a job may kill."""

    def work(store):
        store.renders_within()
        store.recover()
        take_up(store, jobs(3))
        store.claim(3, "cpu")

    expected = [
        [(["k3"], False), (["k0", "k1", "k2"], True)],
        [(["k3"], False), (["k0"], True), (["k1"], True), (["k2"], True)],
        [(["k3"], False)],
    ]
    for number, order in enumerate(expected):
        other = dying(
            tmp_path, work if number < 2 else lambda store: (work(store), [store.claim(1, "cpu") for _ in "12"])
        )
        next(other)
        next(other)
        with Store(tmp_path) as store:
            store.recover()
            take_up(store, jobs(4))
            assert claims(store, idle=False) == [([name], lonely) for names, lonely in order[:1] for name in names]
            assert claims(store) == order[1:]
    with Store(tmp_path) as store:
        errors = [row.error for row in store.rows(every=True) if row.status == FAILED]
        why = "the process that rendered it died 3 times, the last time while no other job was claimed"
        assert errors == [f"{why}: the process of the run ended"] * 3


def test_what_a_process_dies_of_fails(tmp_path):
    """The run continues. A suspected job is rendered with no other job, so that others are not blamed."""
    with Store(tmp_path) as store:
        take_up(store, jobs(2))
        for lonely in (False, True):
            batch = store.claim(8, "cpu")
            assert (len(batch), batch.lonely) == (2, lonely)
            assert store.died(batch.tasks, "killed") == []
        batch = store.claim(8, "cpu")
        assert ([task.file for task in batch.tasks], batch.lonely) == (["k0.mp4"], True)
        ((task, error),) = store.died(batch.tasks, "killed")
        assert (task.file, error) == (
            "k0.mp4", "the process that rendered it died 3 times, the last time while no other job was claimed: killed"
        )  # fmt: skip
        batch = store.claim(8, "cpu")
        finish(store, batch.tasks[0])
        assert statuses(store) == {"k0.mp4": FAILED, "k1.mp4": DONE}
        assert store.retry_failed() == 1
        assert store.claim(8, "cpu").lonely is False  # with its counts reset


@pytest.mark.parametrize("retries", [1, 2, 5])
def test_a_job_is_tried_again_so_often(tmp_path, retries):
    with Store(tmp_path, retries=retries) as store:
        take_up(store, jobs(1))
        tries = 0
        while batch := store.claim(8, "cpu"):
            tries += 1
            store.died(batch.tasks, "killed")
        assert tries == retries + 1
        assert statuses(store) == {"k0.mp4": FAILED}


def test_it_is_tried_again_elsewhere(tmp_path):
    with Store(tmp_path) as store:
        take_up(store, jobs(1))
        store.died(store.claim(8, "cpu", place="actor 0").tasks, "killed", "actor 0")
        assert store.claim(8, "cpu", place="actor 0", others=True) is None
        assert store.claim(8, "cpu", place="actor 1", others=True, idle=False) is None
        store.died(store.claim(8, "cpu", place="actor 1", others=True).tasks, "killed", "actor 1")
        assert store.claim(8, "cpu", place="actor 1") is not None  # there is no other


@pytest.mark.parametrize("when", ["before", "after", "lost"])
def test_a_rename_cut_short(tmp_path, when):
    """Killed right before the rename, or right after it; and with the clip in neither place."""

    def work(store):
        take_up(store, jobs(1))
        task = store.claim(1, "cpu").tasks[0]
        store.connection.execute("UPDATE jobs SET status = 'publishing' WHERE id = ?", (task.id,))
        if when != "lost":
            (store.scratch if when == "before" else store.out).joinpath(task.file).write_text("whole")

    other = dying(tmp_path, work)
    next(other)
    next(other)
    with Store(tmp_path) as store:
        assert store.recover() == 1
        take_up(store, jobs(1))
        assert statuses(store) == {"k0.mp4": PENDING if when == "lost" else DONE}
        assert when == "lost" or (tmp_path / "k0.mp4").read_text() == "whole"
        assert [path.name for path in store.home.iterdir() if path.is_dir()] == [store.runner]


def test_a_rename_is_on_record_before_it_happens(tmp_path, monkeypatch):
    """For the next process after a death: in the list of this process, and as others read it."""
    seen = []
    with Store(tmp_path) as store:

        def watched(aside, final):
            with sqlite3.connect(f"file:{store.home / 'jobs.db'}?mode=ro", uri=True) as other:
                seen.extend(other.execute("SELECT status, runner FROM jobs").fetchall())
            assert aside.exists()
            assert not final.exists()

        monkeypatch.setattr(stores, "publish", watched)
        take_up(store, jobs(1))
        finish(store, store.claim(1, "cpu").tasks[0])
        assert seen == [("publishing", store.runner)]


def test_a_file_in_the_way(tmp_path):
    with Store(tmp_path) as store:
        take_up(store, jobs(1))
        task = store.claim(1, "cpu").tasks[0]
        (tmp_path / "k0.mp4").write_text("somebody else's")
        (store.scratch / task.file).write_text("ours")
        assert store.finish(task, store.scratch / task.file, {})[0] == FAILED
        (row,) = store.rows()
    assert row.status == FAILED
    assert "this run did not write" in row.error
    assert (tmp_path / "k0.mp4").read_text() == "somebody else's"


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="output folder"):
        Store(tmp_path / "file").__enter__()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / FOLDER).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="got a link, expected a folder"):
        Store(tmp_path / "linked").__enter__()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    with Store(tmp_path / "later") as store:
        store.connection.execute("PRAGMA user_version=99")
    with pytest.raises(StoreError, match="got version 99, expected 3"):
        Store(tmp_path / "later").__enter__()
    (tmp_path / "damaged" / FOLDER).mkdir(parents=True)
    (tmp_path / "damaged" / FOLDER / "jobs.db").write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match="not a database"):
        Store(tmp_path / "damaged").__enter__()
    leftovers = [path for path in (tmp_path / "damaged" / FOLDER).iterdir() if path.is_dir()]
    assert leftovers == []


def test_a_damaged_list_is_noticed(tmp_path):
    with Store(tmp_path) as store:
        take_up(store, jobs(200))
    path = tmp_path / FOLDER / "jobs.db"
    data = bytearray(path.read_bytes())
    data[3 * 4096 : 5 * 4096] = b"\xff" * (2 * 4096)
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"damaged|malformed"):
        Store(tmp_path).__enter__()


def test_the_folder_goes_away(tmp_path):
    import shutil

    with Store(tmp_path / "out") as store:
        take_up(store, jobs(1))
        task = store.claim(1, "cpu").tasks[0]
        shutil.rmtree(tmp_path / "out")
        with pytest.raises((sqlite3.Error, OSError)):
            store.finish(task, store.scratch / task.file, {})
    assert not (tmp_path / "out").exists()


def test_trusted_is_the_same_job():
    job = Job(prompt="a", guidance=Guidance(Perturbation([1])), pipeline={"x": [1]}, width=64, name="n")
    assert trusted(json.dumps(job.to_dict())) == job
    assert trusted(json.dumps(Job(prompt="a").to_dict())) == Job(prompt="a")
    with pytest.raises(SettingsError):
        Job.from_dict({"prompt": "a", "repeat": 2})


def test_prompts_that_come_next(tmp_path):
    with Store(tmp_path) as store:
        take_up(store, [*jobs(3), Job(prompt="b", negative_prompt="bad", name="b")])
        assert store.waiting_prompts(9, "m") == [("a kite", None), ("b", "bad")]
        assert store.waiting_prompts(1, "m") == [("a kite", None)]
        assert store.claim(1, "cpu").tasks[0].job.name == "k0"
        assert statuses(store)["k0.mp4"] == CLAIMED
