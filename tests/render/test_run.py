"""Whole runs on tiny pipelines: clips depend only on their job, and a fault affects only its job."""

import collections
import contextlib
import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import stgfast
from stgfast import Guidance, Perturbation
from stgfast.errors import DeviceError, SettingsError
from stgfast.integrations.clips import EACH, ONE
from stgfast.queue.batches import stack_of
from stgfast.queue.job import Job
from stgfast.queue.state import FOLDER, StoreError
from stgfast.queue.store import Store
from stgfast.render import batch_run, files, run, worker
from stgfast.render.files import metadata_of, read_frames
from stgfast.render.gallery import NAME
from stgfast.render.loading import fingerprint
from stgfast.render.run import BadJobs, render
from stgfast.render.texts import Texts
from tests import models
from tests.precision import near
from tests.render import pipes

TEXT = {"pipeline": {"max_sequence_length": 16}}
STATE = ("jobs.db", "jobs.db-wal", "jobs.db-shm", "lock")  # a full disk keeps the log of the list
PROMPTS = ("a red kite", "the grey sea", "a dog runs")


def some(count=6, **more):
    """Jobs of two shapes, with repeated prompts."""
    return [
        {**pipes.CALL, **TEXT, "prompt": PROMPTS[n % 3], "seed": n, "name": f"k{n}", "width": 32 + 16 * (n % 2), **more}
        for n in range(count)
    ]


@pytest.fixture
def pipe():
    return stgfast.accelerate(pipes.pipeline("wan"), Guidance(Perturbation([1])))


@pytest.fixture
def latents(monkeypatch):
    """What the decoder receives, by the name of the clip."""
    seen = {}
    decoded = worker.BatchRun._decoded

    def recording(self, decode, latents, *rest):
        names = [task.job.name for task in self.batch.tasks]
        seen.update(zip(names, latents.detach().clone(), strict=True))
        return decoded(self, decode, latents, *rest)

    monkeypatch.setattr(worker.BatchRun, "_decoded", recording)
    return seen


def go(pipe, jobs, out, events=None, **more):
    listener = None if events is None else events.append
    return render(pipe, jobs, out, **{"format": "png", "listener": listener, **more})


def told(events, name):
    return [event for event in events if event["event"] == name]


def entries(out):
    """All files but the page."""
    return sorted(path.name for path in out.iterdir() if path.name != NAME)


def left_behind(out):
    return sorted(path.name for path in (out / FOLDER).iterdir() if path.name not in STATE)


class Decoder:
    """Replaces the decoder of a pipeline: calls `before(latents)` first."""

    def __init__(self, pipe, before):
        kind = type(pipe.vae)

        class Watched(kind):
            def decode(self, latents, *args, **kwargs):
                before(latents)
                return kind.decode(self, latents, *args, **kwargs)

        pipe.vae.__class__ = Watched


@pytest.mark.parametrize(
    ("family", "more"),
    [
        *(pytest.param(family, {}, id=family) for family in ("wan", "ltx", "mochi", "cogvideox")),
        pytest.param("ltx", {"reuse": 2, "reuse_cfg": [0, 1, 3]}, id="ltx, carried on"),
    ],
)
def test_a_clip_is_the_same_in_any_company(tmp_path, latents, family, more):
    steps = 5 if more else 3
    pipe = stgfast.accelerate(pipes.pipeline(family), Guidance(Perturbation([1]), rescale=0.5, **more))
    jobs = some(5, width=32, num_frames=9 if family == "ltx" else 5, steps=steps)
    del jobs[4]["pipeline"], jobs[4]["name"]
    jobs[4] |= {"pipeline": {**TEXT["pipeline"], "guidance_scale": 2.0}, "name": "k4"}
    events = []
    assert go(pipe, jobs, tmp_path / "together", events).done == 5
    assert sorted(len(event["files"]) for event in told(events, "claimed")) == [1, 4]
    together = dict(latents)
    latents.clear()
    for job in reversed(jobs):  # and the plain call, of the pipeline itself
        assert go(pipe, [job], tmp_path / "alone").rendered == 1
    plain = pipe(  # as a user calls it
        **{key: value for key, value in jobs[1].items() if key not in ("seed", "name", "steps", "pipeline")},
        max_sequence_length=16,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
    ).frames[0]
    assert np.abs(plain * 255 - read_frames(tmp_path / "alone" / "k1")).max() < 0.51
    assert set(together) == set(latents)
    for name, latent in together.items():
        near(latent, latents[name])
    assert (together["k0"] - together["k3"]).abs().mean() > 0.1  # the same prompt, another seed
    for name in together:
        one, other = (read_frames(tmp_path / where / name).astype(int) for where in ("together", "alone"))
        assert np.abs(one - other).max() <= 1


def test_nothing_is_rendered_twice(tmp_path, pipe):
    first, second = [], []
    report = go(pipe, some(), tmp_path, first, format="mp4")
    assert (report.done, report.rendered, report.code) == (6, 6, 0)
    assert entries(tmp_path) == [FOLDER, *(f"k{n}.mp4" for n in range(6))]
    assert all(f'"k{n}.mp4"' in (tmp_path / NAME).read_text() for n in range(6))
    assert left_behind(tmp_path) == []
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4")}
    report = go(pipe, some(7), tmp_path, second, format="mp4")
    assert (report.done, report.rendered) == (7, 1)
    assert before.items() < {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4")}.items()
    third = []
    assert go(pipe, some(7), tmp_path, third, format="mp4").rendered == 0
    assert told(third, "loading") == []  # the model is not even loaded
    with Store(tmp_path) as store:
        for row in store.rows(every=True):
            assert row.attempts == 1
            assert set(row.seconds) == {"text", "denoise", "decode", "write"}
            assert all(seconds >= 0 for seconds in row.seconds.values())


def test_a_clip_says_how_to_make_it_again(tmp_path, pipe):
    job = some(1, guidance={"perturbations": [{"layers": [2], "scale": 1.5}]}, negative_prompt="bad")[0]
    go(pipe, [job], tmp_path / "one")
    said = metadata_of(tmp_path / "one" / "k0")
    assert said["job"]["prompt"] == job["prompt"]
    assert said["job"]["guidance"]["perturbations"][0]["scale"] == 1.5
    go(pipe, [said["job"]], tmp_path / "two")
    assert (read_frames(tmp_path / "one" / "k0") == read_frames(tmp_path / "two" / "k0")).all()
    go(pipe, some(1), tmp_path / "three")  # with the guidance of the pipeline, which the clip records
    assert metadata_of(tmp_path / "three" / "k0")["job"]["guidance"]["perturbations"][0]["layers"] == [1]


def test_text_is_read_once_and_ahead(tmp_path, pipe):
    read = []
    kind = type(pipe.text_encoder)

    class Reading(kind):
        def forward(self, ids, *args, **kwargs):
            read.append((threading.current_thread().ident, ids.shape))
            return kind.forward(self, ids, *args, **kwargs)

    pipe.text_encoder.__class__ = Reading
    go(pipe, some(9), tmp_path, max_batch=2)
    assert len(read) == 4  # three prompts, and the empty negative one
    assert all(shape[0] == 1 for _, shape in read)


@pytest.mark.parametrize("late", [False, True], ids=["", "more batches are handed out before the first reads"])
def test_text_encoder_leaves_the_device(tmp_path, pipe, latents, monkeypatch, late):
    go(pipe, some(), tmp_path / "kept", max_batch=1)
    kept = dict(latents)
    handed_out = threading.Event()
    if late:
        encoding, start = Texts.encoding, worker.Worker.start

        def waiting(self, *given):
            assert handed_out.wait(60)
            return encoding(self, *given)

        def started(self, *given):
            start(self, *given)
            if not self.free():
                handed_out.set()

        monkeypatch.setattr(Texts, "encoding", waiting)
        monkeypatch.setattr(worker.Worker, "start", started)
    moves = []
    encoder = pipe.text_encoder
    encoder.to = lambda device: moves.append(str(device)) or encoder
    go(pipe, some(), tmp_path / "gone", offload="text", max_batch=1)
    assert moves == ["cpu", "cpu", "cpu"]  # moved there and back once for all prompts
    assert pipe.text_encoder is encoder
    for name, clip in kept.items():
        assert torch.equal(clip, latents[name])


def test_decoding_overlaps_denoising(tmp_path, pipe):
    """The decoder waits until the next batch is denoised: without overlap, it would wait forever."""
    denoising, overlapped = threading.Event(), []
    forward = type(pipe.transformer).forward
    first = threading.Lock()

    class Watched(type(pipe.transformer)):
        def forward(self, *args, **kwargs):
            if first.locked():
                denoising.set()
            return forward(self, *args, **kwargs)

    def before(latents):
        if first.acquire(blocking=False):
            overlapped.append(denoising.wait(20))

    pipe.transformer.__class__ = Watched
    Decoder(pipe, before)
    assert go(pipe, some(4), tmp_path, max_batch=1).done == 4
    assert overlapped == [True]


def test_out_of_memory_halves_and_is_remembered(tmp_path, pipe):
    sizes = []
    forward = type(pipe.transformer).forward

    class Small(type(pipe.transformer)):
        def forward(self, hidden_states, *args, **kwargs):
            sizes.append(len(hidden_states))
            if len(hidden_states) > 6:  # branches and clips
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return forward(self, hidden_states, *args, **kwargs)

    pipe.transformer.__class__ = Small
    events = []
    report = go(pipe, some(9, width=32), tmp_path, events)
    assert (report.done, report.failed) == (9, 0)
    assert [event["rows"] for event in told(events, "again")][:1] == [4]
    assert max(sizes) > 6
    with Store(tmp_path) as store:
        remembered = store.connection.execute("SELECT rows FROM shapes").fetchall()
        assert [row[0] for row in remembered] == [2] or [row[0] for row in remembered] == [4]
        bound = remembered[0][0]
    sizes.clear()
    events.clear()
    go(pipe, some(16, width=32), tmp_path, events)
    assert max(len(event["files"]) for event in told(events, "claimed")) <= bound
    assert told(events, "again") == []


def test_out_of_memory_alone_is_tried_with_nothing_else_running(tmp_path, pipe):
    raised = []

    def before(latents):
        if not raised:
            raised.append(len(latents))
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1")

    Decoder(pipe, before)
    assert go(pipe, some(2), tmp_path / "once").done == 2

    def always(latents):
        raise MemoryError

    Decoder(pipe, always)
    events = []
    assert go(pipe, some(2, width=32), tmp_path / "ever", events).failed == 2
    assert all("out of memory" in event["error"] or "MemoryError" in event["error"] for event in told(events, "failed"))


@pytest.mark.parametrize("fits", [0, 1])
def test_where_there_is_no_memory_for_one_others_like_it_are_not_tried(tmp_path, pipe, fits):
    """Unless one of them was rendered: then something else may have taken the memory for a while."""
    decoded = []

    def before(latents):
        wide = latents.shape[-1] > 4
        decoded.append(wide)
        if not wide and decoded.count(False) > fits:
            raise MemoryError

    Decoder(pipe, before)
    events = []
    report = go(pipe, some(10, height=32), tmp_path, events, max_batch=1)
    assert (report.done, report.failed, report.waiting) == (5 + fits, 5 - fits, 0)
    said = [event["error"] for event in told(events, "failed")]
    untried = [
        error for error in said if re.fullmatch(r"not tried: as large as k\d+, which did not fit into memory", error)
    ]
    assert said[0].startswith(
        "out of memory, with nothing else running (offload, vae_tiling or a smaller clip take less)"
    )
    if fits:
        assert untried == []
    else:
        assert untried  # some were claimed
    # They stay failed until a retry.
    assert go(pipe, some(10, height=32), tmp_path).failed == 5 - fits


def test_a_decoder_that_fails_fails_one_clip(tmp_path, pipe):
    calls = []

    def before(latents):
        calls.append(len(latents))
        if len(calls) == 2:
            raise RuntimeError("the decoder broke")

    Decoder(pipe, before)
    events = []
    report = go(pipe, some(4, width=32), tmp_path, events)
    assert (report.done, report.failed, report.code) == (3, 1, 1)
    (failed,) = told(events, "failed")
    assert failed["error"] == "RuntimeError: the decoder broke"
    assert set(calls) == {1}
    assert len(calls) == 4  # no other clip was decoded twice
    assert left_behind(tmp_path) == []
    report = go(pipe, some(4, width=32), tmp_path)  # it stays failed until a retry
    assert (report.rendered, report.failed) == (0, 1)
    assert go(pipe, some(4, width=32), tmp_path, retry_failed=True).done == 4


def test_a_broken_job_fails_alone(tmp_path, pipe):
    encode = type(pipe).encode_prompt

    class Broken(type(pipe)):
        @functools.wraps(encode)
        def encode_prompt(self, prompt, *args, **kwargs):
            if prompt == ["the grey sea"]:
                raise ValueError("no such words")
            return encode(self, prompt, *args, **kwargs)

    Broken.__name__ = type(pipe).__name__
    pipe.__class__ = Broken
    events = []
    report = go(pipe, some(6, width=32), tmp_path, events)
    assert (report.done, report.failed) == (4, 2)
    assert {event["file"] for event in told(events, "failed")} == {"k1", "k4"}
    assert all(event["apart"] for event in told(events, "again"))
    assert any("no such words" in event["trace"] for event in told(events, "failed"))


def test_frames_that_are_no_numbers(tmp_path, pipe):
    def before(latents):
        latents[0, 0, 0, 0, 0] = float("nan")

    Decoder(pipe, before)
    events = []
    assert go(pipe, some(2), tmp_path, events).failed == 2
    assert "not finite" in told(events, "failed")[0]["error"]
    assert entries(tmp_path) == [FOLDER]


def test_bad_lines_stop_everything_or_are_left_out(tmp_path, pipe):
    jobs = [*some(2), {"prompt": "a", "name": "../up"}, {**some(1)[0], "name": "x", "width": 24}, 7, some(1)[0]]
    events = []
    with pytest.raises(BadJobs, match=r"got 4 bad lines, expected none \(line 3: name: got '\.\./up'"):
        go(pipe, jobs, tmp_path, events)
    assert [event["line"] for event in told(events, "bad")] == [3, 4, 5, 6]
    assert told(events, "loading") == []
    assert entries(tmp_path) == [FOLDER]
    with Store(tmp_path) as store:
        assert list(store.rows(every=True)) == []
    report = go(pipe, jobs, tmp_path, skip_bad=True)
    assert (report.done, report.bad, report.code) == (2, 4, 1)
    assert entries(tmp_path) == [FOLDER, "k0", "k1"]


def test_image_to_video_is_rendered_one_by_one(tmp_path):
    """For any pipeline with an image: here one that takes it and does not use it."""
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    seen = []
    pipe = pipes.pipeline("wan")
    original = type(pipe)

    class WanPipeline(original):
        def __call__(
            self, prompt=None, image=None, height=32, width=32, num_frames=5, num_inference_steps=2, guidance_scale=5.0,
            guidance_scale_2=None, generator=None, output_type="np", max_sequence_length=16, num_videos_per_prompt=1,
        ):  # fmt: skip
            seen.append((image.size, image.mode, len(prompt)))
            return super().__call__(
                prompt, height=height, width=width, num_frames=num_frames, num_inference_steps=num_inference_steps,
                generator=generator, output_type=output_type, max_sequence_length=max_sequence_length,
            )  # fmt: skip

    pipe.__class__ = WanPipeline
    jobs = [{"prompt": "a", "image": str(tmp_path / "a.png"), "seed": n} for n in range(2)]
    assert go(pipe, jobs, tmp_path / "out").done == 2
    assert set(seen) == {((32, 32), "RGB", 1)}


def test_clips_that_begin_with_images_in_one_batch(tmp_path, latents):
    """Each with its own image, the same as alone."""
    import diffusers
    from PIL import Image

    for name in ("red", "blue"):
        Image.new("RGB", (40, 32), name).save(tmp_path / f"{name}.png")
    text = pipes.pipeline("ltx")
    pipe = stgfast.accelerate(diffusers.LTXImageToVideoPipeline(**text.components), Guidance(Perturbation([1])))
    of = {**pipes.CALL, **TEXT, "num_frames": 9}
    shown = [("red", 0), ("blue", 0), ("red", 1)]
    jobs = [
        {**of, "prompt": PROMPTS[n], "image": str(tmp_path / f"{name}.png"), "seed": seed, "name": f"k{n}"}
        for n, (name, seed) in enumerate(shown)
    ]
    events = []
    assert go(pipe, jobs, tmp_path / "out", events).done == 3
    assert [sorted(event["files"]) for event in told(events, "claimed")] == [["k0", "k1", "k2"]]
    assert told(events, "again") == []
    together = dict(latents)
    assert go(pipe, jobs, tmp_path / "alone", max_batch=1).done == 3
    for name, alone in latents.items():
        near(together[name], alone)
    assert float((together["k0"] - together["k1"]).norm()) > 0.1


def test_clips_with_sound(tmp_path, latents):
    """LTX-2 makes both. Each clip has its own sound, and the pipeline's passes share one computation."""
    from tests.integrations import test_ltx2

    pipe = stgfast.accelerate(test_ltx2.build(tokenizer=pipes.tokenizer(), text_encoder=pipes.text_encoder(16, "t5")))
    models.spread(pipe.audio_vae, gain=3.0)
    models.spread(pipe.vocoder)  # otherwise it outputs zeros for any input
    own = {"spatio_temporal_guidance_blocks": [3], **TEXT["pipeline"]}
    jobs = [
        {**pipes.CALL, "num_frames": 9, "prompt": PROMPTS[n], "seed": n, "name": f"k{n}", "pipeline": own}
        for n in range(2)
    ]
    events = []
    assert go(pipe, jobs, tmp_path / "out", events, format="npz", same_process=True).done == 2
    assert len(told(events, "claimed")) == 1
    assert go(pipe, jobs, tmp_path / "alone", format="npz", max_batch=1).done == 2
    sounds = []
    for name in ("k0.npz", "k1.npz"):
        together, alone = np.load(tmp_path / "out" / name), np.load(tmp_path / "alone" / name)
        assert np.abs(together["frames"].astype(int) - alone["frames"]).max() <= 1
        near(*(torch.from_numpy(clip["sound"]) for clip in (together, alone)))
        assert together["rate"] == 16000
        sounds.append(alone["sound"])
    assert sounds[0].shape[0] == 2
    assert np.abs(sounds[0] - sounds[1]).max() > 1e-3


def test_who_is_rendered_together_with_images(tmp_path):
    from PIL import Image

    for shade in range(2):
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / f"{shade}.png")
    one, other = (Job(prompt="a", image=str(tmp_path / f"{shade}.png")) for shade in range(2))
    assert stack_of(one, EACH) == stack_of(other, EACH) != stack_of(Job(prompt="a"), EACH)
    assert stack_of(one, ONE) != stack_of(other, ONE)
    assert stack_of(one, ONE) == stack_of(Job(prompt="b", image=one.image, seed=7), ONE)


def test_the_disk_is_full(tmp_path, pipe, monkeypatch):
    """No partial file, nothing lost. The next start renders the rest."""
    whole, room = files.WRITERS["png"], [2]

    def writer(path, *rest):
        whole(path, *rest)
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setitem(files.WRITERS, "png", writer)
    events = []
    with pytest.raises(StoreError, match=r"No space left on device.*finished clips are kept"):
        go(pipe, some(), tmp_path, events, max_batch=2)
    assert len(entries(tmp_path)) == 3
    assert left_behind(tmp_path) == []
    with Store(tmp_path) as store:
        assert sorted(row.status for row in store.rows(every=True)) == ["done"] * 2 + ["pending"] * 4
    room[0] = 100
    report = go(pipe, some(), tmp_path)
    assert (report.done, report.rendered) == (6, 4)


@pytest.fixture
def small(tmp_path):
    """A file system with almost no space."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=768k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a displayed error may keep a file open


def test_a_disk_that_is_really_full(small, pipe):
    """It fails first for the writer of the clip or for the state. With space again, the rest is rendered."""
    padding = small / "padding"
    padding.write_bytes(b"x" * (584 << 10))
    with pytest.raises(StoreError, match=r"No space left|disk is full|disk I/O error"):
        go(pipe, some(24, width=64, height=64), small / "out", max_batch=2)
    for name in entries(small / "out")[1:]:
        assert read_frames(small / "out" / name).shape == (5, 64, 64, 3)
    padding.unlink()
    report = go(pipe, some(4, width=64, height=64), small / "out")
    assert report.done == 4
    assert left_behind(small / "out") == []


def test_a_folder_that_cannot_be_written(tmp_path, pipe, monkeypatch):
    mkdir = os.mkdir

    def refused(path, *rest, **more):
        if str(path).startswith(str(tmp_path / "out")):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        mkdir(path, *rest, **more)

    monkeypatch.setattr(os, "mkdir", refused)  # root may write everywhere, whatever the mode is
    with pytest.raises(StoreError, match="Permission denied"):
        go(pipe, some(1), tmp_path / "out")


def test_the_folder_is_deleted_meanwhile(tmp_path, pipe):
    gone = threading.Event()

    def before(latents):
        if not gone.is_set():
            gone.set()
            shutil.rmtree(tmp_path / "out")

    Decoder(pipe, before)
    with pytest.raises(StoreError, match="output folder"):
        go(pipe, some(4), tmp_path / "out", max_batch=1)
    assert gone.is_set()
    assert not (tmp_path / "out").exists()


def test_the_clock_goes_back(tmp_path, pipe, monkeypatch):
    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    assert go(pipe, some(4), tmp_path).done == 4
    with Store(tmp_path) as store:
        assert all(seconds >= 0 for row in store.rows(every=True) for seconds in row.seconds.values())


def test_two_runners_at_once(tmp_path):
    """Each renders some jobs, none of them twice, and both end when all are done."""
    reports, events = {}, {0: [], 1: []}

    def one(number):
        pipe = stgfast.accelerate(pipes.pipeline("wan"), Guidance(Perturbation([1])))
        reports[number] = go(pipe, some(12), tmp_path, events[number], max_batch=1)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {report.done for report in reports.values()} == {12}
    assert sum(report.rendered for report in reports.values()) == 12
    assert min(report.rendered for report in reports.values()) > 0
    done = [event["file"] for number in events for event in told(events[number], "done")]
    assert len(done) == len(set(done)) == 12
    assert left_behind(tmp_path) == []


def interrupting(pipe, times):
    """Interrupt this process when the first clip is denoised."""
    forward = type(pipe.transformer).forward
    sent = []

    class Interrupting(type(pipe.transformer)):
        def forward(self, *args, **kwargs):
            while len(sent) < times:
                sent.append(os.kill(os.getpid(), signal.SIGINT))
                time.sleep(0.3)
            return forward(self, *args, **kwargs)

    pipe.transformer.__class__ = Interrupting


def test_an_interruption_finishes_what_is_in_hand(tmp_path, pipe):
    interrupting(pipe, 1)
    events = []
    handler = signal.getsignal(signal.SIGINT)
    report = go(pipe, some(12), tmp_path, events, max_batch=2)
    assert signal.getsignal(signal.SIGINT) is handler
    assert (report.interrupted, report.code) == (True, 130)
    assert report.done == report.rendered == 2
    assert report.waiting == 10
    assert len(entries(tmp_path)) == 3
    assert go(pipe, some(12), tmp_path, max_batch=2).done == 12


def test_the_listener_is_not_called_within_itself(tmp_path, pipe):
    """A stream that is written to during a write, by a signal handler, raises an error."""
    events, within = [], []

    def listener(event):
        assert not within
        within.append(event)
        events.append(event)
        if event["event"] == "done" and len(told(events, "done")) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        within.clear()

    report = render(pipe, some(12), tmp_path, max_batch=2, format="png", listener=listener)
    assert (report.interrupted, report.code) == (True, 130)
    assert [event["why"] for event in told(events, "stopping")] == ["SIGINT"]
    assert [event["event"] for event in events][-1] == "ended"


def test_a_second_interruption_stops_at_once(tmp_path, pipe):
    interrupting(pipe, 2)
    report = go(pipe, some(12, steps=50), tmp_path, max_batch=2)
    assert (report.code, report.done, report.waiting) == (130, 0, 12)
    assert entries(tmp_path) == [FOLDER]
    assert left_behind(tmp_path) == []


def test_a_device_past_use_ends_the_run(tmp_path, pipe, monkeypatch):
    """After some errors every later job would fail, through no fault of its own."""
    broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(worker.BatchRun, "_broken", lambda self: broken)

    def before(latents):
        raise broken

    Decoder(pipe, before)
    with pytest.raises(DeviceError, match="illegal memory access"):
        go(pipe, some(9), tmp_path, max_batch=1)
    with Store(tmp_path) as store:
        assert {row.status for row in store.rows(every=True)} == {"pending"}


def test_a_worker_that_breaks_ends_the_run(tmp_path, pipe, monkeypatch):
    monkeypatch.setattr(batch_run, "_why", lambda error: 1 / 0)

    def before(latents):
        raise ValueError

    Decoder(pipe, before)
    with pytest.raises(DeviceError, match="ZeroDivisionError"):
        go(pipe, some(3), tmp_path, max_batch=1)
    assert left_behind(tmp_path) == []


def test_models_that_move_are_not_overlapped(tmp_path, pipe):
    """With offloading, one call ends before the next starts: no prompt is encoded while another clip is made."""
    kind, model = type(pipe), type(pipe.transformer)
    working, meanwhile = [], []

    class Reading(kind):
        @functools.wraps(kind.encode_prompt)
        def encode_prompt(self, *args, **kwargs):
            meanwhile.extend(working)
            return kind.encode_prompt(self, *args, **kwargs)

    class Slow(model):
        def forward(self, *args, **kwargs):
            working.append("denoiser")
            time.sleep(0.03)
            made = model.forward(self, *args, **kwargs)
            working.remove("denoiser")
            return made

    def before(latents):
        working.append("decoder")
        time.sleep(0.03)
        working.remove("decoder")

    Reading.__name__ = kind.__name__
    pipe.__class__, pipe.transformer.__class__ = Reading, Slow
    Decoder(pipe, before)
    jobs = [{**job, "prompt": f"a {job['seed']}"} for job in some(6)]
    pipe.enable_model_cpu_offload(device="cpu")
    assert go(pipe, jobs, tmp_path / "whole", max_batch=1).done == 6
    assert meanwhile == []
    pipe.remove_all_hooks()
    assert go(pipe, jobs, tmp_path / "overlapped", max_batch=1).done == 6
    assert meanwhile != []


def test_a_pipeline_is_left_alone(tmp_path, pipe):
    """Its scheduler, decoder and text encoder: a run changes only copies."""
    parts = ("scheduler", "vae", "text_encoder")
    before = {name: dict(vars(getattr(pipe, name))) for name in parts}
    own = dict(vars(pipe))
    assert go(pipe, some(4), tmp_path, max_batch=2, offload="text").done == 4
    assert vars(pipe) == own
    for name in parts:
        now = vars(getattr(pipe, name))
        assert now.keys() == before[name].keys(), name
        assert all(now[key] is before[name][key] for key in now), name


def test_thousands_of_jobs(tmp_path, pipe):
    path = tmp_path / "jobs.jsonl"
    with path.open("w") as file:
        for number in range(4_000):
            size = 32 + 16 * (number % 7)
            job = {"prompt": f"a kite {number} " + "and more " * 20, "seed": number, "width": size, "steps": 4}
            file.write(json.dumps(job) + "\n")

    def most():  # kilobytes of memory of this process since the counter was reset
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")
    before = most()
    counted = collections.Counter()
    report = go(pipe, path, tmp_path / "out", plan_only=True, listener=lambda event: counted.update([event["event"]]))
    assert counted == {"listed": 4_000, "planned": 1, "forecast": 1, "ended": 1}
    with Store(tmp_path / "out") as store:
        assert list(store.rows(every=True)) == []  # a plan writes nothing
    assert (report.waiting, report.rendered) == (4_000, 0)
    assert most() - before < 20 * 1024


def test_wrong_arguments(tmp_path, pipe):
    for wrong, message in (
        ({"max_batch": 0}, "max_batch: got 0, expected a number of clips"),
        ({"format": "avi"}, "format: got 'avi'"),
        ({"fps": -1}, "fps: got -1"),
    ):
        with pytest.raises(SettingsError, match=message):
            go(pipe, some(1), tmp_path, **wrong)
    with contextlib.suppress(BadJobs):
        go(pipe, [Job(prompt="a", width=24)], tmp_path)
    assert run.Report(1, 0, 0, 0, 1, 1.0).code == 0


def test_what_decides_a_clip_is_part_of_its_name_and_said_by_it(tmp_path):
    """The default guidance, the dtype, and the version of the model's files."""
    pipes.pipeline("wan").save_pretrained(tmp_path / "model")
    # The default of Wan's adapter, which needs CFG.
    jobs = [{**pipes.CALL, **TEXT, "prompt": "a red kite", "pipeline": {**TEXT["pipeline"], "guidance_scale": 4.0}}]

    def clip(out):
        assert render(tmp_path / "model", jobs, tmp_path / out, format="npz", same_process=True).done == 1
        (made,) = (tmp_path / out).glob("*.npz")
        return made.name, metadata_of(made)

    name, said = clip("one")
    assert said["job"]["guidance"] == Guidance.preset("wan").to_dict()
    assert (said["dtype"], said["revision"]) == ("float32", fingerprint(tmp_path / "model"))
    assert clip("same")[0] == name
    # Repeated from its metadata, it is the same clip.
    again = {**said["job"], "name": "again"}
    assert render(tmp_path / "model", [again], tmp_path / "again", format="npz", same_process=True).done == 1
    assert np.array_equal(
        *(np.load(path)["frames"] for path in (tmp_path / "one" / name, tmp_path / "again/again.npz"))
    )
    # With another version of the weights, it is another clip in the same folder.
    pipes.pipeline("wan", seed=1).save_pretrained(tmp_path / "model")
    assert render(tmp_path / "model", jobs, tmp_path / "one", format="npz", same_process=True).rendered == 1
    assert len(list((tmp_path / "one").glob("*.npz"))) == 2
    # And with another dtype too.
    assert (
        render(
            tmp_path / "model",
            jobs,
            tmp_path / "one",
            format="npz",
            same_process=True,
            plan_only=True,
            dtype="bfloat16",
        ).waiting
        == 1
    )


def test_what_is_wrong_with_a_pipeline_is_said_before_anything_is_taken_up(tmp_path):
    with pytest.raises(SettingsError, match="the default layers of this model, LTXPipeline"):
        render(pipes.pipeline("ltx"), some(2), tmp_path / "out")
    assert not (tmp_path / "out").exists()
