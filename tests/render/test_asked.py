"""Killed while other processes ask. The same with 300 jobs and 10 kills: `python -m tests.render.asked`."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.again
def test_asked_by_others_and_killed(tmp_path):
    command = [sys.executable, "-m", "tests.render.asked", "--jobs", "40", "--kills", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert (result["kills"], result["jobs"]) == (2, 40)
    assert result["clips"] + result["cancelled"] == 40
    assert sum(result["claimed when killed"]) > 0  # a kill that hits nothing shows nothing
