"""A model in a folder and a local Ray cluster, for the tests of several files."""

import os
import sys

import pytest

from stgfast.render import cluster as connecting
from tests import forks
from tests.render import pipes

PYTHON = """#!{python} -IS
import sys

sys.path.insert(0, {root!r})
from tests import forks

forks.instead({pid})
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipes.pipeline("wan").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of the cluster. This process has joined it, so that runs find it."""
    python = tmp_path_factory.mktemp("python") / "python"
    executable = sys.executable
    python.write_text(PYTHON.format(python=executable, root=str(forks.ROOT), pid=os.getpid()))
    python.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(connecting, "STORE", 80 << 20)
        patch.setattr(sys, "executable", str(python))  # of the processes that Ray starts
        ray, own = connecting.connected("local")
        patch.setattr(sys, "executable", executable)
        with own:
            yield ray.get_runtime_context().gcs_address
