"""Jobs and their files as one archive."""

import hashlib
import json
import zipfile

import pytest
from PIL import Image

from stgfast.cli import main
from stgfast.errors import SettingsError
from stgfast.queue.desk import Desk
from stgfast.queue.pack import pack, read_packed
from stgfast.queue.readers import Bad, read
from stgfast.queue.state import FOLDER, PACKED


@pytest.fixture
def jobs(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    Image.new("RGB", (32, 16), "red").save(folder / "a.png")
    (folder / "style.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    used = [{"path": "style.safetensors", "weight": 0.5}]
    lines = [
        {"vars": {"style": ["ink", "oil"]}},
        {"prompt": "{red|blue} kite, $style", "repeat": 4, "seed": 5},
        {"prompt": "a", "image": "a.png", "loras": used},
        {"prompt": "b", "image": "a.png"},
    ]
    (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "jobs.jsonl"


def made(lines):
    return [job for line in lines for job in line.jobs]


def test_another_machine_takes_it(tmp_path, jobs):
    expected = made(read(jobs))
    assert pack(jobs, tmp_path / "night.zip") == (6, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "night.zip"]  # no temporary file remains
    jobs.parent.rename(tmp_path / "gone")
    found = made(read_packed(tmp_path / "night.zip", tmp_path / "there"))
    assert [job.identity("m") for job in found] == [job.identity("m") for job in expected]
    assert [job.prompt for job in found] == [job.prompt for job in expected]
    assert {path.suffix for path in (tmp_path / "there").iterdir()} == {".png", ".safetensors"}
    assert all(job.image is None or job.image.startswith(str(tmp_path / "there")) for job in found)
    again = made(read_packed(tmp_path / "night.zip", tmp_path / "there"))  # the existing file is used
    assert again == found


def test_commands(tmp_path, jobs, capsys):
    assert main(["pack", str(jobs), str(tmp_path / "night.zip")]) == 0
    assert capsys.readouterr().out == f"6 jobs and 2 files in {tmp_path / 'night.zip'}\n"
    assert main(["add", str(tmp_path / "night.zip"), "--out", str(tmp_path / "out")]) == 0
    with Desk(tmp_path / "out") as desk:
        entries = [json.loads(row[0]) for row in desk.connection.execute("SELECT entry FROM inbox")]
    assert len(entries) == 6
    assert entries[-1]["image"].startswith(str(tmp_path / "out" / FOLDER / PACKED))
    jobs.write_text("{}")
    assert main(["pack", str(jobs), str(tmp_path / "other.zip")]) == 2
    assert "stgfast pack: line 1: prompt: got ''" in capsys.readouterr().err
    assert not (tmp_path / "other.zip").exists()
    assert main(["pack", str(jobs), str(tmp_path / "other.tar")]) == 2
    assert main(["pack", str(jobs), str(tmp_path / "none" / "other.zip")]) == 2


def archive(path, lines, members=()):
    with zipfile.ZipFile(path, "w") as given:
        given.writestr("jobs.jsonl", "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        for name, data in dict(members).items():
            given.writestr(name, data)
    return path


def test_an_archive_is_not_trusted(tmp_path):
    data = b"an image"
    name = f"files/{hashlib.sha256(data).hexdigest()}.png"
    wrong = f"files/{'0' * 64}.png"
    lines = [
        *({"prompt": "a", "image": path} for path in ("../../etc/passwd", "/etc/passwd", name + "/..", wrong, name)),
        "no JSON",
        "[1]",
        {"prompt": "a", "loras": [{"path": "../x.safetensors"}]},
        {"prompt": "{a|b}"},  # words are chosen when an archive is made
    ]
    members = {name: data, wrong: b"another", "../outside.txt": b"x", "files/more.png": b"x"}
    found = list(read_packed(archive(tmp_path / "a.zip", lines, members), tmp_path / "there"))
    reasons = [line.why for line in found if isinstance(line, Bad)]
    assert len(reasons) == 8
    assert all("files/ with a digest and an ending" in reasons[n] for n in (0, 1, 2, 7))
    assert "one with this digest" in reasons[3]
    assert "a whole image" in reasons[4]
    assert found[-1].jobs[0].prompt == "{a|b}"
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["a.zip", "there", name.removeprefix("files/")])


@pytest.mark.parametrize("text", [b"", b"no archive", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_archive(tmp_path, text):
    (tmp_path / "a.zip").write_bytes(text)
    with pytest.raises(SettingsError, match=r"archive: got 'a\.zip', expected an archive of stgfast pack"):
        list(read_packed(tmp_path / "a.zip", tmp_path / "there"))
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as empty:
        empty.writestr("other", "x")
    with pytest.raises(SettingsError, match=r"it has no jobs\.jsonl"):
        list(read_packed(tmp_path / "b.zip", tmp_path / "there"))
    with pytest.raises(SettingsError, match="one with a job in it"):
        list(read_packed(archive(tmp_path / "c.zip", []), tmp_path / "there"))
    with pytest.raises(SettingsError, match="No such file"):
        list(read_packed(tmp_path / "none.zip", tmp_path / "there"))
