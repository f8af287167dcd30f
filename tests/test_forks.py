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
CODE = """
import os, sys
print(sys.argv, sys.path[0], __name__, os.getcwd(), os.environ["GIVEN"], sys.stdin.read())
print("stgfast" in sys.modules, file=sys.stderr)
sys.exit("it ends")
"""


STATUS = ["-m", "stgfast.cli", "status", "--out", "none"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"), [(STATUS, 3, b"stgfast status: "), (["-c", CODE, "a", "b c"], 1, b"it ends\n")]
)
def test_ends_with_the_same(tmp_path, arguments, code, said):
    found = []
    for popen in (forks.STARTED, forks.Popen):
        command = [sys.executable, *forks.FORKED, *arguments]
        environment, pipe = {**os.environ, "GIVEN": "1"}, subprocess.PIPE
        with popen(command, cwd=tmp_path, env=environment, stdin=pipe, stdout=pipe, stderr=pipe) as process:
            found.append((*process.communicate(b"given"), process.returncode))
    assert found[0] == found[1]
    assert found[0][2] == code
    assert said in found[0][1]


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
