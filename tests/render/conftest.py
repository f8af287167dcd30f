"""A model in a folder and a local Ray cluster, for the tests of several files."""

import pytest

from stgfast.render import cluster as connecting
from tests.render import pipes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipes.pipeline("wan").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cluster():
    """The address of the cluster. This process has joined it, so that runs find it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(connecting, "STORE", 80 << 20)
        ray, own = connecting.connected("local")
        with own:
            yield ray.get_runtime_context().gcs_address
