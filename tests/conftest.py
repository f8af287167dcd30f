"""What every test runs under."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # the models are tiny, and tests run side by side
settings.register_profile("stgfast", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("stgfast")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
