"""Production batch rendering: many jobs in, video files out, and a night's work that finishes.

jobs.py    what is asked for, checked line by line
models.py  which pipeline that is for
loading.py loading it, and where its parts are meanwhile
store.py   what became of every job, in SQLite beside the clips
batches.py which jobs are rendered together
worker.py  batches in, written clips out
texts.py   prompts encoded once
files.py   clips as files, which say inside how they were made
crew.py    who renders: a worker here, or
actors.py  the devices of a Ray cluster
run.py     all of these, until nothing waits
"""

from stgfast.errors import DeviceError
from stgfast.render.files import Form, metadata_of
from stgfast.render.jobs import Job
from stgfast.render.run import BadJobs, Report, render
from stgfast.render.store import Row, Store, StoreError

__all__ = ["BadJobs", "DeviceError", "Form", "Job", "Report", "Row", "Store", "StoreError", "metadata_of", "render"]
