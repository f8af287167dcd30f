"""A forked command is like a new process to whoever started it."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests import forks

pytestmark = pytest.mark.xdist_group("commands")
COMMAND = [sys.executable, "-m", "stgfast.cli"]


def test_ends_with_the_same(tmp_path):
    arguments = ["render", "none.jsonl", "--model", "toy", "--out", "out"]
    found = []
    for popen in (forks.STARTED, forks.Popen):
        with popen([*COMMAND, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            found.append((*process.communicate(), process.returncode))
    assert found[0] == found[1]
    assert found[0][1].startswith(b"stgfast render: job file")
    assert found[0][2] == 2


def test_is_a_child_that_has_what_it_was_given(tmp_path):
    waits = [*COMMAND, "render", "--wait", "--model", "toy", "--out", str(tmp_path), "--same-process"]
    with forks.Popen(waits, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        child = psutil.Process(process.pid)
        assert child.ppid() == os.getpid()
        assert "tests.forks" in child.cmdline()  # no new process
        while not (tmp_path / ".stgfast" / "jobs.db").exists():
            assert process.poll() is None
            time.sleep(0.05)
        assert child.cwd() == str(tmp_path)
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
