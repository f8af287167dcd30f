"""A model in a folder and a local Ray cluster, for the tests of several files."""

import gc
import os
import shlex
import subprocess
import sys

import pytest

from stgfast.render import cluster as connecting
from tests import forks
from tests.render import pipes

INSTEAD = f"import sys; sys.path.insert(0, {str(forks.ROOT)!r}); from tests import forks; forks.instead({{owner}})"


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """Garbage collection, as before each model, looks only at objects of these tests."""
    gc.freeze()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipes.pipeline("wan").save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def cluster(tmp_path_factory):
    """The address of the cluster. This process has joined it, so that runs find it."""
    python = executable = sys.executable
    if subprocess.Popen is forks.Popen:
        forks.start()
        python = tmp_path_factory.mktemp("python") / "python"
        command = shlex.join([executable, "-IS", "-c", INSTEAD.format(owner=os.getpid())])
        python.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        python.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(connecting, "STORE", 80 << 20)
        patch.setattr(sys, "executable", str(python))  # of the processes that Ray starts
        ray, own = connecting.connected("local")
        patch.setattr(sys, "executable", executable)
        with own:
            yield ray.get_runtime_context().gcs_address
