"""Killed at random moments and started again. The same with 200 jobs and 20 kills: `python -m tests.render.killed`."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.xdist_group("commands")
def test_killed_and_started_again(tmp_path):
    command = [sys.executable, "-m", "tests.render.killed", "--folder", str(tmp_path / "run")]
    sizes = ["--jobs", "12", "--kills", "2", "--bad", "2"]
    ended = subprocess.run(
        [*command, *sizes], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert (result["kills"], result["clips"]) == (2, 10)
    assert result["attempts"] > 10  # a kill without claimed jobs tests nothing
