"""Clips as files: MP4 (H.264), GIF, a folder of PNGs, or an array. Each contains how it was made, and appears whole
or not at all.

A file is written to a temporary place and synced (`write`), then moved to its place by one rename (`publish`).
"""

from __future__ import annotations

import json
import wave
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stgfast.errors import SettingsError, wrong
from stgfast.queue.placing import sync

Frames = NDArray[np.uint8]  # (frames, height, width, 3)
KEY = "stgfast"  # marks our metadata
MAX_METADATA = 1 << 20
BLACK = 8  # of 255: a clip with nothing brighter is black
AAC_FRAME = 1024  # samples
ENDINGS = {"mp4": ".mp4", "gif": ".gif", "png": "", "npz": ".npz"}  # the PNGs of a clip are in a folder


@dataclass(frozen=True, kw_only=True)
class Form:
    """The format of clips.

    Attributes:
        kind: `mp4`, `gif`, `png`, or `npz`: `frames` as an array and, with sound, `sound` and its `rate`.
        fps: frames per second.
        crf: of H.264, from 0 (lossless) to 51.
    """

    kind: str = "mp4"
    fps: float = 24.0
    crf: int = 18

    def __post_init__(self) -> None:
        if self.kind not in ENDINGS:
            raise wrong("format", self.kind, f"one of {', '.join(ENDINGS)}")
        if isinstance(self.fps, bool) or not isinstance(self.fps, (int, float)) or not 0.1 <= self.fps <= 240:
            raise wrong("fps", self.fps, "a number from 0.1 to 240")
        if isinstance(self.crf, bool) or not isinstance(self.crf, int) or not 0 <= self.crf <= 51:
            raise wrong("crf", self.crf, "a whole number from 0 to 51")

    def in_words(self, *, with_fps: bool) -> str:
        """The format in words; without frames per second if each clip has the model's own."""
        crf = f", crf {self.crf}" if self.kind == "mp4" else ""
        return f"{self.kind}{crf}" + (f", {self.fps:g} fps" if with_fps else "")

    def file(self, name: str) -> str:
        """The file name of the output with this name."""
        ending = ENDINGS[self.kind]
        return name if ending and name.lower().endswith(ending) else name + ending


class Sound(NamedTuple):
    """The sound of a clip, from -1 to 1."""

    samples: NDArray[np.float32]  # (channels, length)
    rate: int  # samples in a second


def pixels(clip: Any) -> Frames:
    """Frames from 0 to 1 as bytes."""
    frames = np.asarray(clip, dtype=np.float32)
    _check_finite("frames", frames, "0 to 1")
    made: Frames = (frames * 255).round().clip(0, 255).astype(np.uint8)
    return made


def remark_on(frames: Frames, asked: int | None) -> str:
    """What is strange about a clip, for whoever checks a folder. The clip counts as done."""
    if frames.max() < BLACK:
        return "it is black"
    if int(frames.max()) - int(frames.min()) <= 1:
        return "it has only one colour"
    if len(frames) > 1 and (frames == frames[:1]).all():
        return "it does not move: all frames are the same"
    if asked is not None and len(frames) != asked:
        return f"it has {len(frames)} frames, where {asked} were asked for"
    return ""


def heard(samples: Any, rate: int) -> Sound:
    made = np.asarray(samples, dtype=np.float32)
    _check_finite("sound", made, "-1 to 1")
    return Sound(made.clip(-1, 1), rate)


def _check_finite(what: str, numbers: NDArray[np.float32], right: str) -> None:
    if not np.isfinite(numbers).all():
        raise ValueError(f"the clip's {what}: got numbers that are not finite, expected {right}; try another dtype")


def write(path: Path, frames: Frames, form: Form, metadata: Mapping[str, Any], sound: Sound | None = None) -> None:
    """Write a clip, and wait until it is on the disk. A GIF has no sound."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise wrong("frames", f"{frames.dtype} {frames.shape}", "uint8 (frames, height, width, 3)")
    text = json.dumps({KEY: metadata}, sort_keys=True)
    WRITERS[form.kind](path, frames, form, text, sound)
    for inner in sorted(path.iterdir()) if path.is_dir() else ():
        sync(inner)
    sync(path)


def _write_mp4(path: Path, frames: Frames, form: Form, text: str, sound: Sound | None) -> None:
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

    odd = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]
    frames = np.pad(frames, odd, mode="edge")  # colour has half the resolution, so sides must be even
    options = {"movflags": "+faststart"}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        container.metadata["comment"] = text
        stream = container.add_stream("libx264", rate=Fraction(form.fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(form.crf), "preset": "medium"}
        codec = stream.codec_context
        codec.thread_count = 2  # leave the others to the denoiser
        codec.colorspace, codec.color_primaries = Colorspace.ITU709, ColorPrimaries.BT709
        codec.color_trc, codec.color_range = ColorTrc.BT709, ColorRange.MPEG
        # Both exist before the first packet of either.
        track = None if sound is None else container.add_stream("aac", rate=sound.rate, layout=_layout(sound))
        for one in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(one), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if track is not None and sound is not None:
            for start in range(0, sound.samples.shape[1], AAC_FRAME):
                part = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(sound.samples[:, start : start + AAC_FRAME]), "fltp", _layout(sound)
                )
                part.sample_rate, part.pts, part.time_base = sound.rate, start, Fraction(1, sound.rate)
                container.mux(track.encode(part))
            container.mux(track.encode())


def _layout(sound: Sound) -> str:
    return "mono" if len(sound.samples) == 1 else "stereo"


def _write_gif(path: Path, frames: Frames, form: Form, text: str, sound: Sound | None) -> None:
    first, *rest = _images(frames)
    first.save(
        path,
        format="GIF",
        save_all=True,
        append_images=rest,
        duration=max(20, round(1000 / form.fps / 10) * 10),  # in hundredths of a second; browsers need at least two
        loop=0,
        comment=text.encode(),
    )


def _write_png(path: Path, frames: Frames, form: Form, text: str, sound: Sound | None) -> None:
    from PIL.PngImagePlugin import PngInfo

    path.mkdir()
    width = max(4, len(str(len(frames) - 1)))
    for number, image in enumerate(_images(frames)):
        info = PngInfo()
        info.add_itxt(KEY, text)
        image.save(path / f"{number:0{width}}.png", format="PNG", pnginfo=info)
    if sound is not None:
        with wave.open(str(path / "sound.wav"), "wb") as file:
            file.setparams((len(sound.samples), 2, sound.rate, 0, "NONE", ""))
            file.writeframes((sound.samples.T * 32767).round().astype("<i2").tobytes())


def _write_npz(path: Path, frames: Frames, form: Form, text: str, sound: Sound | None) -> None:
    arrays: dict[str, Any] = {"frames": frames, KEY: np.array(text)}
    arrays |= {} if sound is None else {"sound": sound.samples, "rate": np.array(sound.rate)}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _images(frames: Frames) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(frame) for frame in frames]


WRITERS: dict[str, Callable[[Path, Frames, Form, str, Sound | None], None]] = {
    "mp4": _write_mp4,
    "gif": _write_gif,
    "png": _write_png,
    "npz": _write_npz,
}


def metadata_of(path: Path) -> dict[str, Any]:
    """How a clip says it was made."""
    right = "a clip that stgfast rendered: .mp4, .gif, .npz, .png, or a folder of these"
    if path.is_dir():
        inner = sorted(path.glob("*.png"))
        if not inner:
            raise wrong("clip", str(path), right)
        path = inner[0]
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise wrong("clip", str(path), right)
    try:
        text = reader(path)
        found = json.loads(text)[KEY] if len(text) <= MAX_METADATA else None
    except OSError as error:
        if error.errno is None and not path.is_file():
            raise wrong("clip", str(path), right) from None
        raise SettingsError(f"clip: got {str(path)!r} ({error}), expected {right}") from None
    except (ValueError, KeyError, TypeError, RecursionError, SyntaxError, zipfile.BadZipFile):
        found = None
    if not isinstance(found, dict):
        raise wrong("clip", f"{path}, which does not say how it was made", right)
    return found


def _mp4_comment(path: Path) -> str:
    import av

    with av.open(str(path)) as container:
        return str(container.metadata.get("comment", ""))


def _image_comment(path: Path) -> str:
    from PIL import Image

    with Image.open(path, formats=("GIF", "PNG")) as image:
        comment = image.info.get(KEY) or image.info.get("comment", "")
    return comment.decode() if isinstance(comment, bytes) else str(comment)


def _npz_comment(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        if archive.getinfo(f"{KEY}.npy").file_size > 4 * MAX_METADATA:  # four bytes per character
            raise ValueError("metadata without end")
    with np.load(path, allow_pickle=False) as arrays:
        return str(arrays[KEY])


READERS: dict[str, Callable[[Path], str]] = {
    ".mp4": _mp4_comment,
    ".gif": _image_comment,
    ".png": _image_comment,
    ".npz": _npz_comment,
}


def read_frames(path: Path) -> Frames:
    """The frames of a clip as displayed."""
    import av
    from PIL import Image

    if path.is_dir():
        return np.stack([np.asarray(Image.open(frame).convert("RGB")) for frame in sorted(path.glob("*.png"))])
    if path.suffix.lower() == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            frames: Frames = arrays["frames"]
            return frames
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
