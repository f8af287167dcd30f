"""The answers of a server about a folder, and its actions."""

import io
import json
import os
import re
import sqlite3
import subprocess
import sys

import pytest
from PIL import Image

from stgfast import Guidance, Perturbation
from stgfast.cli import main
from stgfast.queue.desk import Desk
from stgfast.queue.state import PACKED
from stgfast.serve.files import clip_of
from tests.serve.night import Night, ask, frames, served

JSON = {"Content_Type": "application/json"}


@pytest.fixture
def night(tmp_path):
    with Night(tmp_path / "out") as found:
        yield found.begin_with(6)


@pytest.fixture
def server(night):
    with served(night.out) as address:
        yield address


def names(answer):
    return [job["name"] for job in answer[2]["jobs"]]


def statuses(server):
    return {job["name"][:-4]: job["status"] for job in ask(server, "/api/jobs")[2]["jobs"]}


def error(answer, status=400):
    assert answer[0] == status
    return answer[2]["error"]


def test_how_it_stands_and_its_jobs(server, night):
    first, second = night.claimed(2)
    night.done(first)
    night.at(second, 7)
    _, _, status = ask(server, "/api/status")
    assert (status["counts"]["done"], status["counts"]["claimed"], status["folder"]) == (1, 1, "out")
    (running,) = status["running"]
    assert (running["file"], running["step"], running["steps"]) == ("clip-00001.mp4", 7, 30)
    _, _, found = ask(server, "/api/jobs?limit=2")
    done, going = found["jobs"]
    assert (found["total"], going["step"], going["address"]) == (6, 7, "")
    assert done["guidance"] == [{"layers": "3", "kind": "residual", "scale": 1.0}]
    assert re.fullmatch(r"/clips/clip-00000\.mp4\?v=\d+\.\d{3}", done["address"])
    assert ask(server, "/api/jobs?limit=2&offset=5")[2]["jobs"][0]["seed"] == 5
    assert names(ask(server, "/api/jobs?status=done,claimed&order=latest")) == ["clip-00000.mp4", "clip-00001.mp4"]
    assert names(ask(server, "/api/jobs?words=00003%20KITE")) == ["clip-00003.mp4"]
    assert ask(server, "/api/jobs?words=00003&status=failed")[2] == {"total": 0, "jobs": []}


def test_next_is_the_order_in_which_jobs_are_begun(server, night):
    assert ask(server, "/api/priority", {"names": ["clip-00004"], "priority": 5})[2] == {"done": ["clip-00004.mp4"]}
    assert ask(server, "/api/pause", {"names": ["clip-00000"]})[2] == {"done": ["clip-00000.mp4"]}
    told = names(ask(server, "/api/jobs?order=next"))
    begun = [task.file for _ in range(5) for task in night.claimed()]
    assert begun == told[:5]
    assert told[5] == "clip-00000.mp4"


def test_what_is_asked_is_done(server, night):
    (task,) = night.claimed()
    night.fail(task, "ValueError: why", {})
    assert ask(server, "/api/cancel", {"names": ["clip-00001", "clip-00002*"]})[2]["done"] == [
        *("clip-00001.mp4", "clip-00002.mp4"),
    ]
    assert ask(server, "/api/retry", {"statuses": ["failed", "cancelled"], "words": "kite 00000"})[2]["done"] == [
        "clip-00000.mp4"
    ]
    assert statuses(server) == {
        **{f"clip-{n:05}": "pending" for n in (0, 3, 4, 5)},
        **{f"clip-{n:05}": "cancelled" for n in (1, 2)},
    }
    assert ask(server, "/api/pause", {})[2] == {"done": []}
    assert night.claim(1, "cpu") is None
    ask(server, "/api/resume", {})
    assert night.claim(1, "cpu") is not None


def test_jobs_are_added_as_from_a_file(server, night):
    given = {"prompt": "a {red|blue} kite", "repeat": 20, "steps": 3}
    assert ask(server, "/api/add", {"job": given})[2] == {"done": 20}
    entries = [json.loads(row["entry"]) for row in night.connection.execute("SELECT entry FROM inbox")]
    assert {entry["prompt"] for entry in entries} == {"a red kite", "a blue kite"}
    assert "steps: got 0" in error(ask(server, "/api/add", {"job": {"prompt": "a kite", "steps": 0}}))
    assert "prompt" in error(ask(server, "/api/add", {"job": {}}))
    assert "step" in error(ask(server, "/api/add", {"job": {"prompt": "a kite", "stepps": 3}}))
    assert len(night.connection.execute("SELECT * FROM inbox").fetchall()) == 20


def test_a_job_again_with_changes(server, night):
    prompt = r"a \{red|blue\} kite"  # cached: it is not read again
    guidance = Guidance(Perturbation([2], kind="attention"))
    night.begin_with(0)
    with Desk(night.out) as desk:
        desk.add([{"prompt": prompt, "guidance": guidance.to_dict(), "name": "own", "steps": 4}])
    added, refused = night.take_in({"m": {}}, checked)
    assert (added, refused) == (1, [])
    asked = {"name": "own.mp4", "changes": {"seed": 9, "steps": None, "negative_prompt": "grey"}}
    assert ask(server, "/api/again", asked)[2] == {"done": 1}
    (entry,) = [json.loads(row["entry"]) for row in night.connection.execute("SELECT entry FROM inbox")]
    assert (entry["prompt"], entry["seed"], entry["negative_prompt"]) == (prompt, 9, "grey")
    assert entry["model"] == "m"
    assert "steps" not in entry
    assert "name" not in entry
    assert Guidance.from_dict(entry["guidance"]) == guidance
    assert "expected a clip of this folder" in error(ask(server, "/api/again", {"name": "no.mp4", "changes": {}}))


def checked(entry, line):
    from stgfast.queue.job import Job

    job = Job.from_dict(json.loads(entry)).named("m")
    return job, f"{job.name}.mp4", line, "", "m", {}


def test_added_jobs_that_were_refused_are_forgotten_when_they_are_read(server, night):
    def refuse(entry, line):
        raise ValueError("never")

    ask(server, "/api/add", {"job": {"prompt": "a"}})
    night.connection.execute("UPDATE inbox SET error = 'steps: got 13'")
    assert ask(server, "/api/status")[2]["refused"] == [["a", "steps: got 13"]]
    assert ask(server, "/api/dismiss", {})[2] == {"done": 1}
    assert ask(server, "/api/status")[2]["refused"] == []


def picture(size=(8, 8)):
    made = io.BytesIO()
    Image.fromarray(frames()[0]).resize(size).save(made, "PNG")
    return made.getvalue()


def test_images_are_sent_and_named_by_what_they_are(server, night):
    status, _, said = ask(server, "/api/images", body=picture(), Content_Type="application/octet-stream")
    assert status == 200
    name = said["done"]
    assert ask(server, "/api/images", body=picture(), Content_Type="image/png")[2]["done"] == name
    assert [path.name for path in (night.home / PACKED).iterdir()] == [name]
    assert ask(server, "/api/add", {"job": {"prompt": "a", "image": name}})[0] == 200
    (row,) = night.connection.execute("SELECT entry FROM inbox").fetchall()
    assert json.loads(row["entry"])["image"] == str(night.home.resolve() / PACKED / name)
    for wrong in (b"", b"no image", picture()[:40]):
        why = error(ask(server, "/api/images", body=wrong, Content_Type="image/png"))
        assert "expected a whole image" in why
        assert str(night.out) not in why
    assert [path.name for path in (night.home / PACKED).iterdir()] == [name]


def test_no_file_of_the_machine_is_named(server, night, tmp_path):
    (tmp_path / "own.png").write_bytes(picture())
    (night.out / "own.png").write_bytes(picture())
    digest = ask(server, "/api/images", body=picture(), Content_Type="image/png")[2]["done"]
    for image in (
        *(str(tmp_path / "own.png"), str(night.out / "own.png"), "../own.png", "own.png", "jobs.db", 7, ["a"], {}),
        *("../" + digest, digest + "/", digest.upper(), "0" * 64 + ".image"),
    ):
        assert "was sent to this page" in error(ask(server, "/api/add", {"job": {"prompt": "a", "image": image}}))
        again = {"name": "clip-00000.mp4", "changes": {"image": image}}
        assert "was sent to this page" in error(ask(server, "/api/again", again))
    for model in ("no/such/model", str(tmp_path), "../m", 3, ["m"]):
        assert "that this folder has clips of" in error(
            ask(server, "/api/add", {"job": {"prompt": "a", "model": model}})
        )
    assert "what is in its file" in error(ask(server, "/api/add", {"job": {"prompt": "a", "recipe": "/etc/passwd"}}))
    for more in ({"loras": [{"path": "/etc/passwd"}]}, {"image_sha256": "0" * 64}):
        assert "field: got" in error(ask(server, "/api/add", {"job": {"prompt": "a", **more}}))
    os.symlink(tmp_path / "own.png", night.home / PACKED / ("1" * 64 + ".png"))
    assert "was sent" in error(ask(server, "/api/add", {"job": {"prompt": "a", "image": "1" * 64 + ".png"}}))


def test_clips_are_served_in_parts(server, night):
    (task,) = night.claimed()
    night.done(task)
    whole = (night.out / task.file).read_bytes()
    address = ask(server, "/api/jobs?limit=1")[2]["jobs"][0]["address"]
    status, headers, body = ask(server, address)
    assert (status, body, headers["content-type"]) == (200, whole, "video/mp4")
    assert "max-age" in headers["cache-control"]
    status, headers, body = ask(server, address, Range="bytes=10-19")
    assert (status, body) == (206, whole[10:20])
    assert ask(server, address, Range=f"bytes={len(whole)}-")[0] == 416


@pytest.mark.parametrize("form", ["gif", "png", "npz"])
def test_clips_of_every_form(tmp_path, form):
    with Night(tmp_path) as night:
        night.begin_with(1, form=form)
        (task,) = night.claimed()
        if form == "npz":
            (night.scratch / task.file).write_bytes(b"npz")
            night.finish(task, night.scratch / task.file, {})
        else:
            night.done(task)
        with served(tmp_path) as address:
            (job,) = ask(address, "/api/jobs")[2]["jobs"]
            if form == "png":
                assert job["pictures"] == 12
                shown = job["address"].replace("?", "/11?")
                assert ask(address, shown)[2] == (tmp_path / task.file / "0011.png").read_bytes()
                assert ask(address, job["address"].replace("?", "/12?"))[0] == 404
                assert ask(address, job["address"])[0] == 404
            else:
                assert job["pictures"] == 0
                assert (job["address"] == "") == (form == "npz")
                assert ask(address, f"/clips/{task.file}")[0] == 200


def test_no_path_leaves_the_folder(server, night, tmp_path):
    """Even if the state of the folder, or a link in it, says so."""
    (tmp_path / "secret.mp4").write_text("secret")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "0.png").write_text("secret")
    os.symlink(tmp_path / "secret.mp4", night.out / "link.mp4")
    os.symlink(tmp_path / "secrets", night.out / "links")
    (night.out / "inner").mkdir()
    os.symlink(tmp_path / "secret.mp4", night.out / "inner" / "0.png")
    (night.out / "page.html").write_text("<script>")
    (night.out / "unlisted.mp4").write_text("secret")
    files = ["../secret.mp4", "link.mp4", "links", "inner", "page.html", str(tmp_path / "secret.mp4"), "..", ".", ""]
    files += [".stgfast/jobs.db", ".stgfast", "clip-00001.mp4"]
    for number, file in enumerate(files):
        change = "UPDATE OR REPLACE jobs SET file = ?, folded = ?, status = 'done', finished = 1 WHERE id = ?"
        night.connection.execute(change, (file, file, number % 6 + 1))
        quoted = "".join(f"%{byte:02x}" for byte in file.encode())
        for path in (f"/clips/{file}", f"/clips/{quoted}", f"/clips/{quoted}/0", f"/clips/{file}/0", f"/{file}"):
            status, _, said = ask(server, path)
            if path != "/":
                assert status in (404, 405), path
                assert b"secret" not in (said if isinstance(said, bytes) else b"")
        with Desk(night.out) as desk:
            assert clip_of(desk, file) is None
            assert clip_of(desk, file, 0) is None
        assert ask(server, "/api/jobs")[0] == 200
    for path in ("/clips/unlisted.mp4", "/clips/clip-00001.mp4/0", "/clips/..%2f..%2fetc%2fpasswd", "/clips/%00.mp4"):
        assert ask(server, path)[0] == 404


def test_for_prometheus(server, night):
    night.connection.execute("UPDATE runs SET model = ?", ('a "model" \\ of\nmine',))
    first, _ = night.claimed(2)
    night.done(first)
    _, headers, said = ask(server, "/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = dict(line.rsplit(" ", 1) for line in said.decode().splitlines() if not line.startswith("#"))
    assert samples['stgfast_jobs{status="done"}'] == "1"
    assert samples['stgfast_jobs{status="pending"}'] == "4"
    assert samples["stgfast_clip_seconds"] == "45"
    assert int(samples["stgfast_clip_bytes"]) == (night.out / first.file).stat().st_size
    (run,) = [name for name in samples if name.startswith("stgfast_run_seconds")]
    assert run.endswith('model="a \\"model\\" \\\\ of\\nmine"}')
    form = re.compile(
        r'(# (HELP|TYPE) stgfast_\w+ .+)|(stgfast_\w+(\{\w+="([^"\\\n]|\\.)*"(,\w+="([^"\\\n]|\\.)*")*\})? \S+)'
    )
    assert all(form.fullmatch(line) for line in said.decode().splitlines())


def test_a_folder_that_goes_away_is_said(tmp_path):
    with Night(tmp_path / "out") as night:
        night.begin_with(1)
    with served(tmp_path / "out") as address:
        (tmp_path / "out").rename(tmp_path / "away")
        for path in ("/api/status", "/api/jobs", "/metrics"):
            assert "expected one of stgfast render" in error(ask(address, path), 503)
        assert ask(address, "/")[0] == 200
        (tmp_path / "away").rename(tmp_path / "out")
        assert ask(address, "/api/status")[0] == 200
        (tmp_path / "out" / ".stgfast" / "jobs.db").write_bytes(b"no database" * 1000)
        for name in ("jobs.db-wal", "jobs.db-shm"):
            (tmp_path / "out" / ".stgfast" / name).unlink(missing_ok=True)
        assert "not a database" in error(ask(address, "/api/status"), 503)
        assert not list((tmp_path / "out" / ".stgfast").glob("*.corrupt"))
        with pytest.raises(sqlite3.DatabaseError):
            sqlite3.connect(tmp_path / "out" / ".stgfast" / "jobs.db").execute("SELECT * FROM jobs")


def test_what_is_too_much_is_refused(server):
    many = b" " * ((1 << 20) + 1)
    assert ask(server, "/api/cancel", body=many, **JSON)[0] == 413
    assert ask(server, "/api/images", body=b"x", Content_Type="text/html")[0] == 415
    assert ask(server, "/api/cancel", method="GET")[0] == 405
    assert ask(server, "/api/status", {}, method="DELETE")[0] == 405
    assert ask(server, "/api/nothing", {})[0] == 404
    assert ask(server, "/docs")[0] == 404


COMMAND = [sys.executable, "-m", "stgfast.cli", "serve", "--port", "0", "--out"]


def started(out, *more, **environment):
    command = [*COMMAND, str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})


def test_the_command_says_a_link(tmp_path):
    with Night(tmp_path) as night:
        night.begin_with(1)
    with started(tmp_path) as one, started(tmp_path, "--host", "0.0.0.0", STGFAST_TOKEN="x" * 20) as other:
        try:
            link = one.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", link)
            assert ask(link.split("/")[2], "/api/status")[2]["counts"]["pending"] == 1
            link = other.stdout.readline().strip()
            port = re.fullmatch(r"http://[^:/]+:(\d+)/\?token=x{20}", link)[1]
            assert ask(f"127.0.0.1:{port}", "/")[0] == 401
            assert ask(f"127.0.0.1:{port}", f"/?token={'x' * 20}")[0] == 200
        finally:
            one.terminate()
            other.terminate()


def test_the_command_s_own_mistakes(tmp_path, capsys, monkeypatch):
    assert main(["serve", "--out", str(tmp_path)]) == 3
    assert "expected one of stgfast render" in capsys.readouterr().err
    with Night(tmp_path) as night:
        night.begin_with(1)
    with served(tmp_path) as address:
        for more, why in (
            (["--port", address.split(":")[1]], "that is free"),
            (["--port", "70000"], "expected"),
            (["--port", "-1"], "expected"),
            (["--host", "no.such.host.invalid"], "an address of this machine"),
            (["--host", "192.0.2.7"], "that is free"),
        ):
            assert main(["serve", "--out", str(tmp_path), *more]) == 2
            said = capsys.readouterr().err
            assert said.startswith("stgfast serve: ")
            assert why in said
            assert said.count("\n") == 1
    monkeypatch.setenv("STGFAST_TOKEN", "short")
    assert main(["serve", "--out", str(tmp_path)]) == 2


def test_it_loads_no_torch():
    code = (
        "import sys, stgfast.serve.app, stgfast.serve.command, stgfast.serve.metrics\n"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'av') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
