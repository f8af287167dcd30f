"""The estimated time of jobs, from clips that were rendered."""

import pytest

from stgfast.queue.forecast import Forecast, forecast
from stgfast.queue.job import Job
from stgfast.queue.store import WAITS, Store
from tests.queue.test_store import take_up


def some(count, name, **more):
    return [Job(prompt="a kite", seed=seed, name=f"{name}{seed}", **more) for seed in range(count)]


def done(store, walls, text="whole"):
    for wall in walls:
        (task,) = store.claim(1, "cpu").tasks
        aside = store.scratch / task.file
        aside.write_text(text)
        store.finish(task, aside, {"denoise": 0.1}, wall=wall)


def test_by_clips_of_the_same_call(tmp_path):
    with Store(tmp_path / "one") as store:
        take_up(store, some(6, "a", width=64, steps=10))
        done(store, [3.0, 1.0, 2.0])  # jobs of a batch are done at the same time
        assert forecast(store, WAITS, store) == Forecast(jobs=3, unknown=0, seconds=6.0, bytes=3 * len("whole"))
        with Store(tmp_path / "two") as other:
            take_up(other, [*some(4, "b", width=64, steps=10), *some(2, "c", width=32, steps=10)])
            assert forecast(other, WAITS, other).unknown == 6
            assert forecast(other, WAITS, store) == Forecast(jobs=6, unknown=2, seconds=8.0, bytes=20)


def test_by_clips_of_the_same_size_and_other_steps(tmp_path):
    with Store(tmp_path) as store:
        take_up(store, [*some(2, "a", width=64, steps=10), *some(3, "b", width=64, steps=30), *some(1, "c", width=64)])
        done(store, [2.0])
        found = forecast(store, WAITS, store)
    assert (found.jobs, found.unknown) == (5, 1)  # whose number of steps is unknown
    assert found.seconds == pytest.approx(2.0 + 3 * 6.0)
