"""Settings of every test."""

import gc
import importlib.util
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest

from tests import forks

workers = any(argument.startswith("-n") for argument in sys.argv) and "PYTEST_XDIST_WORKER" not in os.environ
if workers and forks.POSSIBLE:
    forks.start()  # it imports while this process does

import torch  # noqa: E402

INTERPRET = "TRITON_INTERPRET"
GPU = torch.cuda.is_available()
if not GPU:
    os.environ[INTERPRET] = "1"  # before anything imports triton
    if importlib.util.find_spec("triton") is not None:
        for name in ("attention", "attention_hopper", "combination"):
            importlib.import_module(f"stgfast.kernels.{name}")
from hypothesis import HealthCheck, Phase, settings  # noqa: E402

from tests import again, cheaper, precision  # noqa: E402
from tests.browser import browser, one_browser  # noqa: E402, F401

if not GPU and forks.POSSIBLE:  # a process that has used a GPU cannot be forked
    subprocess.Popen = forks.Popen
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # the models are tiny, and tests run side by side
# `NO_SHRINK`: that a test fails is enough.
PHASES = [phase for phase in Phase if phase is not Phase.shrink or "NO_SHRINK" not in os.environ]
settings.register_profile(
    "stgfast", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=PHASES
)
settings.load_profile("stgfast")


def switches():
    """Global switches that change the bits of results."""
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


@pytest.fixture(autouse=True)
def _attending(request, monkeypatch):
    """Use the attention of a CPU, except in tests of kernels and in tests marked `interpreted`."""
    if "kernels" not in request.path.parts and request.node.get_closest_marker("interpreted") is None:
        monkeypatch.delenv(INTERPRET, raising=False)


@pytest.fixture
def float64(request):
    """Compute in float64, where exactness is shown. Tests marked `float32` do not: for example, torch.compile cannot
    trace the functions that keep a model in float64.
    """
    with nullcontext() if request.node.get_closest_marker("float32") else precision.computing_in(torch.float64):
        yield


@pytest.fixture(autouse=True)
def _compared(request):
    """Attach the test's comparisons and their budgets to its report."""
    precision.compared.clear()
    yield
    request.node.user_properties.append(("compared", list(precision.compared)))


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    again.mark(items)
    # One worker runs all of these, so they start first.
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
    for item in items:
        group = _group(item)
        if group is not None and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group))


def _group(item):
    """One worker starts a browser, and one builds the models of a family."""
    if "browser" in item.fixturenames:
        return "browser"
    family = getattr(getattr(item, "callspec", None), "params", {}).get("family")
    return family.name if hasattr(family, "build") else None


def pytest_collection_finish():
    """Exclude imported modules from garbage collection, and collect less often."""
    cheaper.replace()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)  # models are many objects and little garbage


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs):
    for spec in specs:
        spec.python = " ".join([sys.executable, *forks.FORKED])


def pytest_addoption(parser):
    parser.addoption("--tightest", action="store_true", help="print the ten comparisons that came closest to failing")


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--tightest"):
        return
    shares = [
        (far / budget, far, budget, report.nodeid)
        for report in terminalreporter.getreports("")  # the report of the teardown has the comparisons of the test
        for name, made in report.user_properties
        if name == "compared" and report.when == "teardown"
        for far, budget in made
    ]
    terminalreporter.section(f"the tightest of {len(shares)} comparisons")
    for share, far, budget, test in sorted(shares, reverse=True)[:10]:
        terminalreporter.line(f"{share:.2f} of its budget: {far:.2g} of {budget:.2g}, {test}")
