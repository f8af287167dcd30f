"""Connecting to a Ray cluster, and leaving it as it was."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

from stgfast.errors import SettingsError, one_line, wrong

ADDRESSES = '"local", "auto", or the host:port of a cluster'
STORE = 100 << 20  # bytes of a local Ray's object store: only jobs and outcomes pass through it
ANSWER = 5.0  # seconds to wait for a connection


def imported(address: str) -> Any:
    """Import Ray. It reads its settings at that time."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local":
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # all parts listen on this machine only
        os.environ.setdefault("RAY_worker_niceness", "0")  # an actor has the priority of this process
    try:
        import ray
    except ImportError as error:
        raise SettingsError(f'ray: got {error}, expected it installed: pip install "stgfast[ray]"') from None
    return ray


def connected(address: str) -> tuple[Any, contextlib.ExitStack]:
    """Connect to Ray, and return what ends with the run. A cluster that this process is already part of is used and
    left as it is.
    """
    own = contextlib.ExitStack()
    ray = imported(address)
    if ray.is_initialized():
        return ray, own
    if address not in ("local", "auto") and not answers(address):
        raise wrong("ray", address, f"a cluster that answers there; {ADDRESSES}")
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "critical"}
    if address == "local":
        settings |= {"include_dashboard": False, "object_store_memory": STORE}
    try:
        with own:
            own.enter_context(_silence())
            own.enter_context(_unmoved_signal())
            own.callback(ray.shutdown)
            ray.init(address=address, **settings)
            return ray, own.pop_all()
    except (RuntimeError, ValueError, OSError) as error:
        raise wrong("ray", address, f"{ADDRESSES} ({one_line(error)})") from None


@contextlib.contextmanager
def _unmoved_signal() -> Iterator[None]:
    """Keep our SIGTERM handler, which Ray would replace."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silence Ray's message that a process died. It goes to standard output, whatever the log settings are."""
    from ray._private import worker

    before = getattr(worker, "_worker_logs_enabled", True)
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = before


def answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()
    except OSError:
        return False
    return True
