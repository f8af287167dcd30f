"""The devices of a Ray cluster as a crew: one actor for each, with the model and a worker of its own.

Ray places actors, restarts them and reports deaths. Only this process has the state of the folder. An actor writes
clips into temporary folders of this run, and this process moves them to their place. Each batch has such a folder for
itself, so an actor that was taken for dead and keeps writing disturbs nobody.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stgfast.errors import DeviceError, SettingsError, wrong
from stgfast.queue.batches import Batch, Task, takes_more
from stgfast.render.actor import Actor, Ready, Refused, bundle_of
from stgfast.render.cluster import ADDRESSES, ANSWER, answers, connected, imported
from stgfast.render.crew import Setup
from stgfast.render.hands import LIVES, LOADING, Hand, brought, silent
from stgfast.render.models import Model
from stgfast.render.outcomes import Died, Expired, Outcome, Progress, Prompt, Stopped, tasks_of
from stgfast.version import __version__

IN_HAND = 3  # batches of an actor: one in the decoder, one in the denoiser, one next
GONE = 30.0  # seconds without an answer after which the cluster is gone; after 60, Ray ends this process itself
KEPT = "finished clips are kept"


def check(model: Model | None, address: str | None, actors: int | None) -> None:
    """The checks that need no cluster."""
    if address is None:
        raise wrong("actors", actors, f"none without ray: {ADDRESSES}")
    if actors is not None and (isinstance(actors, bool) or not isinstance(actors, int) or actors < 1):
        raise wrong("actors", actors, "a number, 1 or more")
    host, _, port = str(address).rpartition(":")
    if address not in ("local", "auto") and not (host and port.isdigit() and "/" not in host):
        raise wrong("ray", address, ADDRESSES)
    if model is not None and model.pipe is not None:
        raise wrong(
            "model", type(model.pipe).__name__, "a folder or a name: a pipeline cannot be sent to another machine"
        )
    imported(address)


class RemoteActor:
    """An actor as seen by this process: a seat."""

    def __init__(self, number: int, handle: Any, send: Callable[[RemoteActor, Batch, Sequence[Prompt]], None]):
        self.number, self.handle, self.send = number, handle, send
        self.hello: Any = None  # pending: that its process runs, then that it has loaded the model
        self.loading = False
        self.ready: Ready | None = None
        self.in_hand: dict[Any, Hand] = {}
        self.pending: Any = None  # the answer with the progress of its batches
        self.asked = 0.0  # when
        self.greeted = time.monotonic()  # when it was told to load
        self.deaths = 0  # in a row

    @property
    def device_name(self) -> str:
        return self.ready.device_name if self.ready else ""

    @property
    def where(self) -> dict[str, Any]:
        return {"actor": self.number} | (
            {"node": self.ready.node, "pid": self.ready.pid, "device": self.device_name} if self.ready else {}
        )

    @property
    def has_room(self) -> bool:
        return self.ready is not None and takes_more((hand.batch for hand in self.in_hand.values()), IN_HAND)

    @property
    def idle(self) -> bool:
        return not self.in_hand

    @property
    def place(self) -> str:
        return f"actor {self.number}"

    def start(self, batch: Batch, ahead: Sequence[Prompt]) -> None:
        self.send(self, batch, ahead)


class Actors:
    """All actors of a run."""

    def __init__(self, setup: Setup, scratch: Path, address: str, count: int | None, tell: Callable[..., None]):
        self.scratch, self.tell = scratch.resolve(), tell
        self.stopping = self.aborting = self.stop_sent = False
        self.found: deque[Outcome] = deque()
        self.batches = 0
        self.members: list[RemoteActor] = []
        self.groups: list[Any] = []  # placement groups of actors that make a clip together
        self.ray, self.own = connected(address)
        self.looked = self.answered = time.monotonic()
        try:
            self._hire(setup, count)
        except BaseException:
            self.own.close()
            raise

    def _hire(self, setup: Setup, count: int | None) -> None:
        folder, token = Path(setup.model.name).is_dir(), uuid.uuid4().hex
        (self.scratch / "token").write_text(token)
        there = self.ray.cluster_resources()
        gpus = 0 if setup.loading.device == "cpu" else int(there.get("GPU", 0))
        each, asks = "GPU" if gpus else "CPU", {"num_cpus": 1, "num_gpus": min(gpus, 1)}
        size = setup.loading.ranks
        count = count or gpus // size * size or size
        self.tell("asking", model=setup.model.name, actors=count, each=each)
        if size > 1 and (count % size or count > int(there.get(each, 0))):
            has = f"{there.get(each, 0):g} {each}s in the cluster"
            raise wrong("gpus_per_clip", size, f"a divisor of the actors, {count}, for which there are {has}")
        kind = self.ray.remote(Actor)
        options = {**asks, "max_restarts": -1, "max_concurrency": IN_HAND + 4}
        arguments = setup, folder, self.scratch, token, __version__
        for number in range(count // size):
            where: Any = "SPREAD"
            if size > 1:
                bundle = {"CPU": 1.0, "GPU": 1.0} if gpus else {"CPU": 1.0}
                self.groups.append(self.ray.util.placement_group([bundle] * size, strategy="PACK"))
                where = bundle_of(self.groups[-1], 0)
            handle = kind.options(**options, scheduling_strategy=where).remote(*arguments)
            self.members.append(RemoteActor(number, handle, self._send))
        for actor in self.members:
            self._greet(actor)

    @property
    def alike(self) -> bool:
        return len({actor.device_name for actor in self.members}) == 1  # one that is not ready has no name yet

    @property
    def busy(self) -> bool:
        return bool(self.found) or any(actor.in_hand for actor in self.members)

    @property
    def places(self) -> int:
        return sum(actor.ready is not None for actor in self.members)

    def free(self) -> Sequence[RemoteActor]:
        able = [actor for actor in self.members if actor.has_room]
        return sorted(able, key=lambda actor: len(actor.in_hand))

    def stop(self) -> None:
        self.stopping = True  # this may be in a signal handler: actors learn of it at the next check

    def abort(self) -> None:
        self.stopping = self.aborting = True

    def outcome(self, seconds: float) -> Outcome | None:
        if self.stopping and not self.stop_sent:
            self._tell_to_stop()
        self._look_whether_gone()
        awaited: dict[Any, tuple[RemoteActor, Hand | None]] = {}
        awaited |= {actor.hello: (actor, None) for actor in self.members if actor.hello}
        self._look_whether_loaded()
        awaited |= {stream: (actor, hand) for actor in self.members for stream, hand in actor.in_hand.items()}
        if awaited and not self.found:
            for stream in self.ray.wait(list(awaited), num_returns=1, timeout=seconds)[0]:
                actor, hand = awaited[stream]
                if hand is None:
                    self._greeted(actor)
                else:
                    self._heard(actor, stream, hand)
        elif not self.found:
            time.sleep(seconds)
        return self.found.popleft() if self.found else None

    def progress(self) -> list[Progress]:
        """The last progress of actors, and the time since then: one that hangs reports none."""
        for actor in self.members:
            if actor.pending is not None and self.ray.wait([actor.pending], timeout=0)[0]:
                asked, actor.pending = actor.pending, None
                with contextlib.suppress(self.ray.exceptions.RayError):  # its batches report its death
                    progress = self.ray.get(asked)
                    for hand in actor.in_hand.values():
                        hand.hear(progress)
            if actor.pending is None and actor.ready and actor.in_hand:
                actor.pending, actor.asked = actor.handle.progress.remote(), time.monotonic()
            elif actor.pending is not None and (why := silent(list(actor.in_hand.values()), actor.asked)):
                self._kill(actor, again=True)
                for stream in list(actor.in_hand):
                    self._died(actor, stream, why)
        hands = [list(actor.in_hand.values()) for actor in self.members]
        return [hand.progress(alone=len(several) == 1) for several in hands for hand in several]

    def expire(self, batch: Batch, why: str) -> None:
        for actor in self.members:
            if any(hand.batch == batch for hand in actor.in_hand.values()):
                actor.handle.expire.remote(batch, why)

    def replace(self, batch: Batch, why: str) -> None:
        """Kill the actor with this batch; Ray starts it again."""
        for actor in self.members:
            if any(hand.batch == batch for hand in actor.in_hand.values()):
                self._kill(actor, again=True)
                for stream, hand in list(actor.in_hand.items()):
                    left = self._put_down(actor, stream)
                    self.found.append(Expired(left, why) if hand.batch == batch else Stopped(left))
                actor.ready = actor.pending = None
                self._greet(actor)

    def close(self, seconds: float) -> None:
        """Kill all actors, and leave the cluster if this process was not part of it before."""
        if self.members:
            for actor in self.members:
                self._kill(actor)
            streams = [stream for actor in self.members for stream in actor.in_hand]
            until = time.monotonic() + seconds
            for stream in streams:  # a writer is gone when its stream has ended
                with contextlib.suppress(self.ray.exceptions.RayError, StopIteration):
                    while time.monotonic() < until and self.ray.wait([stream], timeout=until - time.monotonic())[0]:
                        self.ray.get(next(stream))
        for place in self.groups:
            self.ray.util.remove_placement_group(place)
        self.members, self.groups = [], []
        self.own.close()

    # Batches

    def _send(self, actor: RemoteActor, batch: Batch, ahead: Sequence[Prompt]) -> None:
        self.batches += 1
        aside = self.scratch / f"batch-{self.batches}"
        aside.mkdir()
        stream = actor.handle.render.options(num_returns="streaming").remote(batch, ahead, aside)
        actor.in_hand[stream] = Hand(batch, aside)

    def _heard(self, actor: RemoteActor, stream: Any, hand: Hand) -> None:
        """Handle what an actor reports of a batch, or Ray of the actor."""
        try:
            outcome: Outcome = self.ray.get(next(stream))
        except StopIteration:
            self._put_down(actor, stream)
            return
        except self.ray.exceptions.RayActorError as error:
            self._died(actor, stream, _reason(error))
            return
        except self.ray.exceptions.RayError as error:  # its message was lost
            outcome = Stopped(hand.left(), DeviceError(f"actor {actor.number}: {_reason(error)}"))
        if isinstance(outcome, Stopped) and outcome.error is not None and not isinstance(outcome.error, OSError):
            self._kill(actor, again=True)  # the device is unusable for this process
            self._died(actor, stream, str(outcome.error))
            return
        outcome = brought(outcome, self.scratch)
        tasks = tasks_of(outcome)
        hand.settled |= {task.id for task in tasks}
        actor.deaths = 0
        self.found.append(outcome)

    def _put_down(self, actor: RemoteActor, stream: Any) -> tuple[Task, ...]:
        hand = actor.in_hand.pop(stream)
        if hand.aside is not None:
            shutil.rmtree(hand.aside, ignore_errors=True)
        return hand.left()

    def _died(self, actor: RemoteActor, stream: Any, why: str) -> None:
        """Handle the death of an actor, with which each of its streams ends. Ray restarts it, and it loads the model
        again.
        """
        left = self._put_down(actor, stream)
        if left:
            self.found.append(Died(left, f"actor {actor.number}: {why}", actor.place))
        if actor.ready is None:
            return  # already handled
        actor.ready = None
        self._again(actor, why)

    def _again(self, actor: RemoteActor, why: str) -> None:
        actor.deaths += 1
        if actor.deaths < LIVES:
            self._greet(actor)
        else:
            self._lost(actor, f"it died {LIVES} times in a row: {why}")

    # Actors

    def _greet(self, actor: RemoteActor) -> None:
        actor.loading, actor.greeted = False, time.monotonic()
        actor.hello = actor.handle.hello.options(max_task_retries=-1).remote()

    def _kill(self, actor: RemoteActor, *, again: bool = False) -> None:
        with contextlib.suppress(self.ray.exceptions.RayError):  # one that does not receive it is gone
            self.ray.kill(actor.handle, no_restart=not again)

    def _greeted(self, actor: RemoteActor) -> None:
        hello, actor.hello = actor.hello, None
        try:
            answer: Ready | Refused | None = self.ray.get(hello)
        except self.ray.exceptions.RayError as error:
            (self._again if actor.loading else self._lost)(actor, _reason(error))
            return
        if answer is None:
            actor.hello, actor.loading, actor.greeted = actor.handle.load.remote(), True, time.monotonic()
        elif isinstance(answer, Ready):
            actor.ready = answer
            self.tell("joined", **actor.where)
        elif answer.ours:
            self.found.append(Stopped((), SettingsError(answer.why)))
        else:
            self._lost(actor, answer.why)

    def _lost(self, actor: RemoteActor, why: str) -> None:
        """Handle an actor that does not come back."""
        self._kill(actor)
        self.tell("lost", actor=actor.number, why=why)
        actor.hello = actor.ready = actor.pending = None
        if all(other.hello is None and other.ready is None for other in self.members):
            self.found.append(Stopped((), DeviceError(f"no actor is left, the last one because: {why}; {KEPT}")))

    def _tell_to_stop(self) -> None:
        self.stop_sent = True
        for actor in self.members:
            if actor.ready:
                actor.handle.stop.remote()

    def _look_whether_loaded(self) -> None:
        for actor in self.members:
            if actor.loading and time.monotonic() - actor.greeted > LOADING:
                self._kill(actor, again=True)
                self._again(actor, f"the model was not loaded after {LOADING:g} s")

    def _look_whether_gone(self) -> None:
        """Raise if the cluster is gone. Ray would wait for it, and then end the process without a reason."""
        now = time.monotonic()
        if now - self.looked < ANSWER or not self.members:
            return
        address = self.ray.get_runtime_context().gcs_address
        if answers(address):
            self.answered = time.monotonic()
        elif now - self.answered > GONE:
            for actor in self.members:
                for stream in list(actor.in_hand):
                    self.found.append(Stopped(self._put_down(actor, stream)))
            self.members = []
            why = f"the Ray cluster at {address} does not answer any more; {KEPT}"
            self.found.append(Stopped((), DeviceError(why)))
        self.looked = time.monotonic()


def _reason(error: BaseException) -> str:
    """The last line of Ray's error, which says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else type(error).__name__
