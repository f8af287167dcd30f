"""Time limits of a batch, with a clock of the test."""

import pytest

from stgfast.queue.batches import Batch, Task
from stgfast.queue.job import Job
from stgfast.render import batch_run, limits
from stgfast.render.hands import Hand, silent
from stgfast.render.limits import Limits
from stgfast.render.outcomes import Clock, Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


class Crew:
    def __init__(self):
        self.asked = []

    def expire(self, batch, why):
        self.asked.append(("expire", batch.tasks[0].id, why.partition(" (")[0]))

    def replace(self, batch, why):
        self.asked.append(("replace", batch.tasks[0].id, why.partition(" (")[0]))


def batch(identity=1, count=1, **more):
    tasks = tuple(Task(identity + n, f"k{n}", Job(prompt="a"), "m") for n in range(count))
    return Batch(tasks, "shape", **more)


def test_a_batch_that_takes_too_long_is_ended_then_its_process(clock):
    found, crew, told = Limits(4.0, lambda *event, **more: told.append(event)), Crew(), []
    late, quiet = batch(1, limit=4.0), batch(5, quiet=9.0)
    for seconds, silence, asked in (
        (4.0, 9.0, []),
        (4.1, 9.1, [("expire", 1, "it took longer than 4 s"), ("expire", 5, "it made no progress for 9 s")]),
    ):
        found.enforce(
            crew, [Progress(late, "denoise", 3, 9, seconds, 0.0), Progress(quiet, "", 0, 0, 0.0, silence)], ()
        )
        assert crew.asked == asked
    assert told == [("overdue",)] * 2
    crew.asked.clear()
    both = [Progress(late, "denoise", 3, 9, 5.0, 0.0)]
    clock[0] += limits.GRACE
    found.enforce(crew, both, ())
    assert crew.asked == []
    clock[0] += 0.1
    found.enforce(crew, both, ())
    assert crew.asked == [("replace", 1, "it took longer than 4 s")]
    found.settled(late.tasks[0])
    found.enforce(crew, both, ())
    assert crew.asked[-1][0] == "expire"  # it is another attempt


def test_a_batch_that_nobody_wants_is_ended(clock):
    found, crew = Limits(None, lambda *event, **more: None), Crew()
    progress = [Progress(batch(1, 2, limit=9.0), "denoise", 3, 9, 1.0, 0.0)]
    found.enforce(crew, progress, {1})
    assert crew.asked == []  # one of its two jobs is wanted
    found.enforce(crew, progress, {1, 2})
    assert crew.asked == [("expire", 1, "it was cancelled")]


def test_time_in_which_a_batch_waits_for_others_is_not_its_own(clock):
    mine = Clock()
    clock[0] += 2
    mine.sign()
    clock[0] += 1
    assert (mine.seconds, mine.quiet) == (3, 1)
    mine.pause()
    clock[0] += 50
    assert (mine.seconds, mine.quiet) == (3, 0)
    mine.go()
    clock[0] += 4
    assert (mine.seconds, mine.quiet) == (7, 4)


def test_what_a_process_has_not_said_since_is_added(clock):
    one, other = (Hand(batch(number, limit=9.0), at=clock[0]) for number in (1, 2))
    clock[0] += 5
    assert one.progress(alone=True).seconds == 5
    assert one.progress(alone=False).seconds == 0  # it may wait
    one.hear([Progress(one.batch, batch_run.DENOISER, 3, 9, 7.0, 1.0)])
    other.hear([Progress(other.batch, "", 0, 0, 0.5, 0.0)])
    clock[0] += 2
    assert (one.progress(alone=False).seconds, one.progress(alone=False).quiet) == (9.0, 3.0)
    assert other.progress(alone=False).seconds == 0.5
    assert silent([one, other], clock[0] - 9) == ""
    assert silent([one, other], clock[0] - 9.1) == "the worker process did not answer for 9 s"
    assert silent([one], clock[0] - 99) == ""  # which is timed by itself
