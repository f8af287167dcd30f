"""What every test runs under."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # the models are tiny, and tests run side by side
settings.register_profile("stgfast", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("stgfast")


def switches():
    """What is one for the whole process, and decides the bits of what comes out."""
    names = ("flash", "mem_efficient", "cudnn", "math")
    torchs = [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in names]
    attention = sys.modules.get("diffusers.models.attention_dispatch")
    chosen = attention._AttentionBackendRegistry.get_active_backend()[0].value if attention else "native"
    return {"attention": chosen, "torch's": torchs, "dtype": torch.get_default_dtype(), "grad": torch.is_grad_enabled()}


@pytest.fixture(autouse=True)
def _seeded_and_left_as_it_was():
    before = switches()
    torch.manual_seed(0)
    yield
    assert switches() == before
