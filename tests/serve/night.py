"""A folder with a simulated run: jobs are claimed, go through steps, are done or fail.

`python -m tests.serve.night` simulates one hour, one second for each request of the page: 20,000 jobs, of which 7,200
are rendered. It prints the server's memory.
"""

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import uvicorn

from stgfast import Guidance, Perturbation
from stgfast.queue.job import Job
from stgfast.queue.state import DONE
from stgfast.queue.store import Store
from stgfast.render.files import Form, write
from stgfast.serve.app import application
from stgfast.serve.command import listen


class Night(Store):
    """The run of such a night."""

    def begin_with(self, count=6, prompt="a red kite", *, guidance=None, form="mp4"):
        """Add pending jobs."""
        guidance = guidance or Guidance(Perturbation([3]))
        for seed in range(count):
            job = Job(prompt=f"{prompt} {seed}", seed=seed, name=f"clip-{seed:05}", guidance=guidance)
            self.stage(job, Form(kind=form).file(job.name), seed + 1, "", "m")
        with self.taking_up([]) as bad:
            assert list(bad) == []
        self.begin("m")
        return self

    def claimed(self, size=1):
        """Claim jobs."""
        return self.claim(size, "cpu").tasks

    def at(self, task, step, steps=30):
        """Set the step of a job."""
        self.record([(task.id, "denoise", step, steps, 1.5 * step, "cpu")])

    def done(self, task, clip=None):
        """Finish a job. Its clip is a link to a given one, or is made."""
        aside = self.scratch / task.file
        if clip is None:
            write(aside, frames(task.job.seed), Form(kind=Path(task.file).suffix[1:] or "png"), {})
        else:
            os.link(clip, aside)
        assert self.finish(task, aside, {"denoise": 45.0})[0] == DONE


def frames(seed=0):
    """Half a second with motion."""
    made = np.zeros((12, 32, 48, 3), np.uint8)
    for time_ in range(12):
        made[time_, 8:24, time_ : time_ + 12] = (255, 40 * seed % 256, 60)
    return made


@contextmanager
def served(out, token="", host="127.0.0.1"):
    """A server of a folder in this process: its host and port."""
    listening = listen(host, 0)
    config = uvicorn.Config(application(out, token), lifespan="off", ws="none", http="h11", log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def ask(address, path, given=None, *, method=None, body=None, host=None, **headers):
    """One request: status, headers, and the body, as data if it is JSON."""
    connection = http.client.HTTPConnection(*address.split(":"), timeout=30)
    if given is not None:
        body, headers = json.dumps(given), {"Content-Type": "application/json", **headers}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        method = method or ("GET" if body is None else "POST")
        connection.request(method, path, body, {"Host": host or address, **named})
        answer = connection.getresponse()
        said = answer.read()
    finally:
        connection.close()
    is_json = (answer.getheader("Content-Type") or "").startswith("application/json")
    return answer.status, dict(answer.getheaders()), json.loads(said) if is_json else said


def memory(pid):
    """Resident bytes of a process."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def watched(out, seconds, *, jobs=20_000, each=2, looks=2):
    """A run of this many seconds, with several requests of the page in each: the server's memory after every tenth."""
    command = [sys.executable, "-m", "stgfast.cli", "serve", "--out", str(out), "--port", "0"]
    with Night(out) as night:
        night.begin_with(jobs)
        first = night.claimed()[0]
        night.done(first)
        clip = out / first.file
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                address = server.stdout.readline().split("/")[2]
                found = []
                for second in range(seconds):
                    for task in night.claimed(each):
                        night.at(task, second % 30)
                        night.done(task, clip)
                    for look in range(looks):
                        place = (second * 7 + look * 60) % jobs
                        order = ("listed", "latest", "next")[second % 3]
                        asked = ("/api/status", f"/api/jobs?offset={place}&limit=60&order={order}", "/metrics")
                        for path in (*asked, f"/clips/{first.file}"):
                            status, _, _ = ask(address, path)
                            assert status == 200, (path, status)
                    if second % max(1, seconds // 10) == 0:
                        found.append(memory(server.pid))
            finally:
                server.terminate()
    return found


def main():
    with TemporaryDirectory() as out:
        began = time.monotonic()
        found = watched(Path(out), 3600)
        told = ", ".join(f"{each / 1e6:.1f}" for each in found)
        sys.stdout.write(f"an hour in {time.monotonic() - began:.0f} s; MB of the server: {told}\n")


if __name__ == "__main__":
    main()
