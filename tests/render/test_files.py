"""Clips as files: what is written is read back, and a file is complete or absent."""

import errno
import json
import os
import wave

import numpy as np
import pytest

from stgfast.errors import SettingsError
from stgfast.queue.placing import discard, publish
from stgfast.render import files
from stgfast.render.files import Form, heard, metadata_of, read_frames, write

SAID = {"job": {"prompt": "<script>alert(1)</script> über \u2603", "seed": 3}, "model": "m"}


def clip(frames=6, height=48, width=64):
    """Moving colours that a wrong colour matrix would change."""
    y, x = np.mgrid[:height, :width]
    ramp = [np.stack([x * 255 / width, y * 255 / height, 0 * x + 40 * t], -1) for t in range(frames)]
    return np.stack(ramp).astype(np.uint8)


@pytest.mark.parametrize(("kind", "budget"), [("mp4", 12), ("gif", 40), ("png", 0), ("npz", 0)])
def test_round_trip(tmp_path, kind, budget):
    form = Form(kind=kind, fps=10, crf=1)
    path = tmp_path / form.file("clip")
    write(path, clip(), form, SAID)
    assert metadata_of(path) == SAID
    back = read_frames(path)
    assert back.shape == clip().shape
    assert np.abs(back.astype(int) - clip()).mean() <= budget / 2
    assert np.abs(back.astype(int) - clip()).max() <= budget


@pytest.mark.parametrize("channels", [1, 2])
def test_sound(tmp_path, channels):
    """A tone for each channel; samples that are too loud are clipped."""
    import av

    rate, seconds = 24000, 0.6
    time = np.arange(int(rate * seconds)) / rate
    tones = np.stack([0.5 * np.sin(2 * np.pi * hertz * time) for hertz in (440, 880)[:channels]])
    sound = heard(np.where(time < 0.5, tones, 7.0), rate)
    assert (sound.samples.max(), sound.samples.dtype) == (1.0, np.float32)
    for kind in ("mp4", "gif", "png", "npz"):
        form = Form(kind=kind, fps=10)
        write(tmp_path / form.file("clip"), clip(), form, SAID, sound)
        assert metadata_of(tmp_path / form.file("clip")) == SAID
        assert read_frames(tmp_path / form.file("clip")).shape == clip().shape
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.audio[0]
        assert (stream.codec_context.name, stream.rate, stream.channels) == ("aac", rate, channels)
        played = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    with wave.open(str(tmp_path / "clip" / "sound.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (channels, rate, len(time))
        written = np.frombuffer(file.readframes(len(time)), "<i2").reshape(-1, channels).T / 32767
    assert np.abs(written - sound.samples).max() < 1e-4
    arrays = np.load(tmp_path / "clip.npz")
    assert (arrays["sound"] == sound.samples).all()
    assert arrays["rate"] == rate
    for channel, hertz in zip(played, (440, 880), strict=False):
        heights = np.abs(np.fft.rfft(channel[2000:10000]))
        assert abs(np.fft.rfftfreq(8000, 1 / rate)[heights.argmax()] - hertz) < 4
    with pytest.raises(ValueError, match="the clip's sound: got numbers that are not finite"):
        heard(np.full((1, 4), np.nan), rate)


def test_mp4_is_what_players_want(tmp_path):
    import av

    write(tmp_path / "a.mp4", clip(height=33, width=47), Form(fps=29.97), SAID)  # odd sides
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == (48, 34)
        assert float(stream.average_rate) == pytest.approx(29.97, abs=0.01)
        assert stream.frames == 6
        assert stream.codec_context.colorspace == 1  # BT.709
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays while it loads


def test_names_get_one_ending():
    assert Form().file("kite") == Form().file("kite.mp4") == "kite.mp4"
    assert Form(kind="png").file("kite") == "kite"
    assert Form(kind="gif").file("kite.mp4") == "kite.mp4.gif"


@pytest.mark.parametrize(
    "wrong", [{"kind": "avi"}, {"fps": 0}, {"fps": float("nan")}, {"crf": 52}, {"crf": 1.5}, {"fps": True}]
)
def test_wrong_forms(wrong):
    with pytest.raises(SettingsError, match="got"):
        Form(**wrong)


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (2, 8, 8, 4), (8, 8, 3)])
def test_wrong_frames(tmp_path, shape):
    with pytest.raises(SettingsError, match="frames: got"):
        write(tmp_path / "a.mp4", np.zeros(shape, np.uint8), Form(), SAID)


@pytest.mark.parametrize("kind", ["mp4", "png"])
def test_publish_replaces_nothing(tmp_path, kind):
    form = Form(kind=kind)
    aside, final = tmp_path / "aside", tmp_path / form.file("a")
    write(aside, clip(), form, SAID)
    final.write_text("somebody else's")
    with pytest.raises(FileExistsError):
        publish(aside, final)
    assert final.read_text() == "somebody else's"
    final.unlink()
    final.symlink_to(tmp_path / "nowhere")  # a link counts as existing
    with pytest.raises(FileExistsError):
        publish(aside, final)
    final.unlink()
    publish(aside, final)
    assert metadata_of(final) == SAID
    assert not aside.exists()


def test_written_means_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    write(tmp_path / "a", clip(), Form(kind="png"), SAID)
    assert synced == [*(str(tmp_path / "a" / f"{n:04}.png") for n in range(6)), str(tmp_path / "a")]
    publish(tmp_path / "a", tmp_path / "b")
    assert synced[-1] == str(tmp_path)


def test_discard(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("folder", "link", "nothing"):
        discard(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_disk_full(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a.mp4", clip(), Form(), SAID)


def test_clips_that_say_nothing(tmp_path):
    import av
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    np.savez(tmp_path / "pickled.npz", stgfast=np.array({"an": "object"}, dtype=object))
    np.savez_compressed(tmp_path / "endless.npz", stgfast=np.zeros(files.MAX_METADATA * 4, np.uint8))
    np.savez(tmp_path / "foreign.npz", frames=clip())
    (tmp_path / "empty").mkdir()
    with av.open(str(tmp_path / "foreign.mp4"), "w") as container:
        container.metadata["comment"] = json.dumps(["not", "ours"])
        stream = container.add_stream("libx264", rate=24)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        container.mux(stream.encode())
    arrays = [path.name for path in tmp_path.glob("*.npz")]
    for name in (*arrays, "plain.png", "broken.mp4", "empty", "foreign.mp4", "none.mp4", "a.txt"):
        with pytest.raises(SettingsError, match="clip: got"):
            metadata_of(tmp_path / name)
    assert files.ENDINGS.keys() == files.WRITERS.keys()
