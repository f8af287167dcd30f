"""Production batch rendering: many jobs in, video files out, and a night's work that finishes.

models.py     which pipeline a model is
checks.py     what it cannot do of a job
skeleton.py   a pipeline without its weights, by which jobs are checked
loading.py    loading it, and where its parts are meanwhile
planning.py   jobs, checked against their models, and taken up
rendering.py  batches handed out, and what became of them recorded
limits.py     how long a batch may take
worker.py     batches in, written clips out
outcomes.py   what became of their jobs
loras.py      weights that a job changes the model by
texts.py      prompts encoded once
files.py      clips as files, which say inside how they were made
crew.py       who renders: a worker here,
process.py    one in a process of its own (child.py), or
actors.py     the devices of a Ray cluster
run.py        all of these, until nothing waits

Jobs, and the state of a folder, are in `stgfast.queue`. Names are imported when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stgfast.errors import DeviceError
    from stgfast.queue.job import Job
    from stgfast.queue.state import StoreError
    from stgfast.queue.store import Row, Store
    from stgfast.render.files import Form, metadata_of
    from stgfast.render.run import BadJobs, Report, render

_HOME = {
    "errors": ("DeviceError",),
    "queue.job": ("Job",),
    "queue.state": ("StoreError",),
    "queue.store": ("Row", "Store"),
    "render.files": ("Form", "metadata_of"),
    "render.run": ("BadJobs", "Report", "render"),
}

__all__ = ["BadJobs", "DeviceError", "Form", "Job", "Report", "Row", "Store", "StoreError", "metadata_of", "render"]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"stgfast.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
