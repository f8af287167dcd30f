"""Rendering many jobs to video files, in runs that finish.

    models.py     which pipeline a model is
    checks.py     what it cannot do of a job
    skeleton.py   a pipeline without weights, with which jobs are checked
    loading.py    loading the pipeline, and offloading its parts
    planning.py   jobs, checked against their models and added to the folder
    rendering.py  handing out batches, and recording results
    limits.py     time limits of batches
    worker.py     batches in, written clips out
    batch_run.py  one batch on its way through the stages of a worker
    outcomes.py   results of their jobs
    loras.py      LoRAs of jobs
    texts.py      encoded prompts, each once
    files.py      clips as files, with how they were made
    crew.py       what renders: a worker in this process,
    process.py    one in a child process (child.py), or
    actors.py     actors on the devices of a Ray cluster (actor.py, cluster.py)
    run.py        a whole run

Jobs and the state of a folder are in `stgfast.queue`. Names are imported on first use.
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
