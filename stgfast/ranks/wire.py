"""What the processes of a group send: that they are at the same position, that one has failed, and tensors.

All ranks meet before anything is sent: each rank tells the first one its position, and receives the verdict. So no rank
waits for one that has raised, was stopped by a callback, or has died: the verdict says so, and all of them raise. A
rank that fails reports it at the next meeting. Meetings use gloo on the host; tensors use the group itself.

Meeting and sending is one job of a separate thread, so an interrupt cannot come between the two.
"""

from __future__ import annotations

import importlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from stgfast.errors import EngineError, SettingsError, wrong

LIMIT = 600.0  # seconds to wait for a rank that neither comes to a meeting nor dies
TOLD = 10.0  # seconds to wait for the others, to report that this rank has failed
WORDS = 1024  # bytes of a message
Made = TypeVar("Made")


class Ranks:
    """The processes of a group, as seen by one of them."""

    def __init__(self, group: Any):
        self.group = group
        self.members = dist.get_process_group_ranks(group)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.received = 0  # bytes of tensors
        # Not `new_group`: it depends on the number of groups a process had, which may differ between processes.
        c10d: Any = importlib.import_module("torch.distributed.distributed_c10d")  # not all torch builds have it
        store = c10d.PrefixStore(f"stgfast {group.group_name}", c10d._get_default_store())
        self._control = c10d.ProcessGroupGloo(store, self.rank, self.size, timedelta(seconds=LIMIT))
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self.lost = ""  # why there are no more meetings
        self.clip = f"a clip over {self.size} processes"  # the beginning of messages
        self._one_call, self._depth = threading.RLock(), 0
        threading.Thread(target=self._work, daemon=True, name="stgfast ranks").start()

    def __deepcopy__(self, known: Any) -> Ranks:
        return self

    def __reduce__(self) -> Any:
        raise SettingsError(
            "pickle: got a pipeline with branches=group, expected stgfast.restore(pipe) first: "
            "a process group does not pickle"
        )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within the block all ranks have the same meetings. If the block ends on one, it ends on all of them. A
        nested block belongs to the outer one.
        """
        if not self._one_call.acquire(blocking=False):
            raise EngineError("guided calls over one group: got two at once, expected one after another on every rank")
        self._depth += 1
        try:
            yield
            if self._depth == 1:
                self.meet("the end of the call")
        except RankError:
            raise
        except BaseException as error:
            heard = self._tell(error) if self._depth == 1 else None
            if isinstance(error, UnsentError) and heard is not None:  # it names the rank at fault
                raise heard from error
            raise
        finally:
            self._depth -= 1
            self._one_call.release()

    def meet(self, where: str, then: Callable[[], Made] | None = None) -> Made | None:
        """Raise on each rank unless all of them are there and none has failed. Then call `then`."""
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

        def job() -> Made | None:
            self._hear("+" + where)
            if then is None:
                return None
            with torch.inference_mode(inference), torch.set_grad_enabled(grad and not inference):
                return then()

        return self._post(job).result()

    def spread(self, tensors: Sequence[tuple[int, Tensor]]) -> None:
        """Copy each tensor from its rank to all ranks. All ranks call this, within a meeting."""
        works = []
        try:
            for sender, tensor in tensors:
                self.received += 0 if sender == self.rank else tensor.nbytes
                raw = tensor.view(torch.uint8)  # all backends can send bytes
                works.append(dist.broadcast(raw, src=self.members[sender], group=self.group, async_op=True))
            for work, (_, tensor) in zip(works, tensors, strict=True):
                # On a GPU the host need not wait; with a limit it would.
                work.wait(*(() if tensor.is_cuda else (timedelta(seconds=LIMIT),)))
        except RuntimeError as error:
            why = " ".join(str(error).split())[:300]
            raise UnsentError(f"{self.clip}: predictions were not sent: {why}") from error

    def _tell(self, error: BaseException) -> BaseException | None:
        """Report a failure to the others, as long as they can be reached, and return what all of them report."""
        why = " ".join(f"{type(error).__name__}: {error}".removesuffix(": ").split())
        answer = self._post(lambda: self._hear("-" + why))
        try:
            return answer.exception(timeout=TOLD)
        except TimeoutError:
            return None  # they learn it when they come, or that this process has ended

    def _hear(self, message: str) -> None:
        """Come to a meeting; raise unless all ranks have come to the same one."""
        if not self.lost:
            verdict = self._judge(message) if self.rank == 0 else self._ask(message)
            if verdict:
                raise RankError(f"{self.clip}: {verdict}")
            return
        raise RankError(f"{self.lost}; start the processes again")

    def _ask(self, message: str) -> str:
        """Ask the first rank for the verdict."""
        began, answer = time.monotonic(), _blank()
        try:
            self._send(message, 0)
            self._coming(answer, 0).wait(timedelta(seconds=2 * LIMIT))
        except RuntimeError:
            gone = f"rank 0 {_gone(began, 2 * LIMIT)}"
            self.lost = f"{self.clip}: {gone}"
            return gone
        return _unpacked(answer)

    def _judge(self, own: str) -> str:
        """The verdict on the reports of all ranks, which is sent to each rank."""
        began, heard = time.monotonic(), {rank: _blank() for rank in range(1, self.size)}
        reports, gone, works = {0: own}, dict[int, str](), dict[int, Any]()
        for rank, message in heard.items():
            with self._unless_gone(rank, gone, began):
                works[rank] = self._coming(message, rank)
        for rank, work in works.items():
            with self._unless_gone(rank, gone, began):
                work.wait(timedelta(seconds=max(LIMIT - (time.monotonic() - began), 1.0)))
                reports[rank] = _unpacked(heard[rank])
        verdict = _verdict(reports, gone)
        for rank in reports.keys() - {0}:
            with self._unless_gone(rank, gone, began):
                self._send(verdict, rank)
        if not gone:
            return verdict
        all_gone = _verdict(reports, gone)
        self.lost = f"{self.clip}: {all_gone}"
        return verdict or all_gone

    @contextmanager
    def _unless_gone(self, rank: int, gone: dict[int, str], began: float) -> Iterator[None]:
        """Communicate with a rank within the block; an error there means that the rank is gone."""
        try:
            yield
        except RuntimeError:
            gone[rank] = _gone(began, LIMIT)

    def _send(self, words: str, rank: int) -> None:
        self._control.send([_packed(words)], rank, 0).wait(timedelta(seconds=LIMIT))

    def _coming(self, message: Tensor, rank: int) -> Any:
        """Wait for what a rank sends, and return it."""
        return self._control.recv([message], rank, 0)

    def _post(self, job: Callable[[], Made]) -> Future[Made]:
        future: Future[Made] = Future()
        stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

        def within() -> Made:
            with torch.cuda.stream(stream):
                return job()

        self._jobs.put((within, future))
        return future

    def _work(self) -> None:
        while True:
            job, future = self._jobs.get()
            try:
                future.set_result(job())
            except BaseException as error:  # raised where the result is read
                future.set_exception(error)


class RankError(EngineError):
    """Raised by all ranks when one of them cannot continue."""


class UnsentError(EngineError):
    """Predictions could not be received."""


_known: dict[Any, Ranks] = {}


def ranks_of(group: Any) -> Ranks:
    """The processes of a torch.distributed group, or of a one-dimensional device mesh. All of them must call this."""
    if not dist.is_available() or not dist.is_initialized():
        raise SettingsError(
            "branches: got no torch.distributed, expected its group: start with torchrun, and call "
            "torch.distributed.init_process_group() first"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise wrong("branches", f"a mesh of {group.ndim} dimensions", "one of its dimensions, mesh['branches']")
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise wrong("branches", group, "a torch.distributed group, such as torch.distributed.group.WORLD, or a mesh")
    if group not in _known:
        _known[group] = Ranks(group)
    return _known[group]


def device_of(asked: str | None) -> str | None:
    """The device of a process that torchrun started: its own GPU, unless another device is asked for."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if asked in (None, "cuda") and torch.cuda.is_available() else asked


def joined(device: str | None, **how: Any) -> Ranks:
    """This process as a member of a group, which torchrun's processes start, or as `how` says."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.index is not None:
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", **how)
    return ranks_of(dist.group.WORLD)


def _verdict(reports: dict[int, str], gone: dict[int, str]) -> str:
    # Reports of other ranks about a dead rank are consequences of its death.
    failed = gone or {rank: f"failed: {words[1:]}" for rank, words in reports.items() if words.startswith("-")}
    if failed:
        return "; ".join(f"rank {rank} {how}" for rank, how in sorted(failed.items()))
    places: dict[str, list[int]] = {}
    for rank, words in reports.items():
        places.setdefault(words[1:], []).append(rank)
    if len(places) == 1:
        return ""
    got = "; ".join(f"rank {', '.join(map(str, where))} at {words}" for words, where in places.items())
    return (
        f"got {got}; expected the same on all: give every rank the same arguments and seeds, such as "
        f"generator=torch.Generator().manual_seed(0), and callbacks that stop on all of them"
    )


def _gone(began: float, limit: float) -> str:
    late = time.monotonic() - began >= limit - 1.0
    return f"did not answer within {limit:g} s" if late else "is gone: its process ended"


def _blank() -> Tensor:
    return torch.zeros(WORDS, dtype=torch.uint8)


def _packed(words: str) -> Tensor:
    raw = words.encode()[:WORDS]
    return torch.frombuffer(bytearray(raw.ljust(WORDS, b"\0")), dtype=torch.uint8)


def _unpacked(message: Tensor) -> str:
    return bytes(message.tolist()).rstrip(b"\0").decode(errors="replace")
