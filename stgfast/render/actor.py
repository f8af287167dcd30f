"""What runs on a device of a Ray cluster: an actor with the model and a worker, and its followers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stgfast.errors import DeviceError, LoadError, SettingsError, UnsupportedPipelineError, one_line, wrong
from stgfast.queue.batches import Batch
from stgfast.ranks.wire import joined
from stgfast.render.cluster import ANSWER
from stgfast.render.crew import Setup
from stgfast.render.outcomes import Outcome, Progress, Prompt, Stopped
from stgfast.version import __version__


@dataclasses.dataclass(frozen=True)
class Ready:
    """An actor that accepts batches."""

    device_name: str
    node: str
    pid: int


@dataclasses.dataclass(frozen=True)
class Refused:
    """An actor that cannot start. `ours`: each other one would fail too, because the request is wrong."""

    why: str
    ours: bool


class Actor:
    """The part on a device of the cluster. It does not load in its constructor, because Ray would restart an actor
    that dies there for ever.
    """

    def __init__(self, setup: Setup, folder: bool, scratch: Path, token: str, version: str):
        self.setup, self.folder, self.scratch, self.token, self.version = setup, folder, scratch, token, version
        self.lock = threading.Lock()
        self.state: Ready | Refused | None = None

    def hello(self) -> None:
        """Return that its process runs."""

    def load(self) -> Ready | Refused:
        with self.lock:
            self.state = self.state or self._load()
            return self.state

    def _load(self) -> Ready | Refused:
        node, setup = socket.gethostname(), self.setup
        try:
            if self.version != __version__:
                raise wrong(f"stgfast on {node}", __version__, f"the version of the run, {self.version}")
            if not _sees(self.scratch / "token", self.token):
                out = self.scratch.parent.parent
                raise wrong(f"output folder {out}", f"another one on {node}", "the same on every node")
            if self.folder and not Path(setup.model.name).is_dir():
                raise wrong(f"model on {node}", setup.model.name, "a folder that every node sees")
            own = self.scratch / uuid.uuid4().hex  # for its encoded prompts
            self.worker = setup.worker(own) if setup.loading.ranks == 1 else Hosted(setup, own).worker
            return Ready(self.worker.device_name, node, os.getpid())
        except (LoadError, DeviceError) as error:
            return Refused(f"{node}: {error}", ours=False)
        except (SettingsError, UnsupportedPipelineError) as error:
            return Refused(str(error), ours=True)
        except Exception as error:
            return Refused(f"the model could not be loaded on {node}: {one_line(error)}", ours=False)

    def render(self, batch: Batch, ahead: Sequence[Prompt], aside: Path) -> Iterator[Outcome]:
        for outcome in self.worker.render(batch, ahead, aside):
            if isinstance(outcome, Stopped) and outcome.error is not None:
                yield Stopped(outcome.tasks, _plain(outcome.error))
            else:
                yield outcome

    def progress(self) -> list[Progress]:
        return self.worker.progress()

    def expire(self, batch: Batch, why: str) -> None:
        self.worker.expire(batch, why)

    def stop(self) -> None:
        self.worker.stop()


class Hosted:
    """The actors that make each clip together with this one, which started them. They end with it."""

    def __init__(self, setup: Setup, scratch: Path):
        import ray

        place, size = ray.util.get_current_placement_group(), setup.loading.ranks
        with socket.socket() as free:
            free.bind(("", 0))
            address = f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"
        self.followers = []
        for rank in range(1, size):
            bundle = place.bundle_specs[rank]
            asks = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0)}
            kind = ray.remote(Follower).options(**asks, scheduling_strategy=bundle_of(place, rank))
            self.followers.append(kind.remote(setup, address, rank))
        for follower in self.followers:
            follower.load.remote(scratch.parent / uuid.uuid4().hex)
        self.ranks = joined(setup.loading.device, init_method=address, rank=0, world_size=size)
        self.worker = setup.worker(scratch, self)

    def begin(self, batch: Batch, ahead: Sequence[Prompt]) -> None:
        for follower in self.followers:
            follower.follow.remote(batch, ahead)


class Follower:
    """An actor that makes clips together with the one that started it, and writes none."""

    def __init__(self, setup: Setup, address: str, rank: int):
        self.setup, self.address, self.rank = setup, address, rank

    def load(self, scratch: Path) -> None:
        loading = self.setup.loading
        self.ranks = joined(loading.device, init_method=self.address, rank=self.rank, world_size=loading.ranks)
        self.worker = self.setup.worker(scratch, self)

    def follow(self, batch: Batch, ahead: Sequence[Prompt]) -> None:
        self.worker.follow(batch, ahead)

    def begin(self, batch: Batch, ahead: Sequence[Prompt]) -> None:
        """Start a batch; its own followers are nobody."""


def bundle_of(place: Any, bundle: int) -> Any:
    """Where a placement group has this bundle."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return PlacementGroupSchedulingStrategy(place, bundle, placement_group_capture_child_tasks=True)


def _sees(path: Path, token: str) -> bool:
    """Whether a file of the run exists; a network folder may be late."""
    until = time.monotonic() + ANSWER
    while True:
        with contextlib.suppress(OSError):
            if path.read_text() == token:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)


def _plain(error: BaseException) -> BaseException:
    """An error that can be sent anywhere, and keeps its kind."""
    if isinstance(error, OSError):
        return OSError(error.errno, f"{error.strerror or error} (on {socket.gethostname()})", error.filename)
    return DeviceError(one_line(error))
