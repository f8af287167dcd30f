"""A job: one requested clip, and all checks that need no model.

Jobs come from other people, and nothing in one is trusted: prompts and images have limits, and the name of an output is
one harmless word. Messages say what is wrong together with what is expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from stgfast.errors import SettingsError, wrong
from stgfast.guidance import Guidance

MAX_PROMPT = 10_000  # characters: the longest text encoders read about 512 tokens
MAX_ARGUMENTS = 1 << 16  # bytes of `guidance` or `pipeline`, as JSON
MAX_NAME = 120  # bytes: with an extension it fits all file systems
MAX_IMAGE = 64 << 20  # bytes of an image file
MAX_PIXELS = 64 << 20  # in memory, after decoding
MAX_PRIORITY = 1000
MAX_PATH = 4096
MAX_LORAS, MAX_WEIGHT = 8, 10
MAX_LORA = 8 << 30  # bytes of a file
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
# Arguments that the worker sets itself: a job has other fields for them, or cannot set them.
TAKEN = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "width": "width",
    "height": "height",
    "num_frames": "num_frames",
    "video_length": "num_frames",
    "num_inference_steps": "steps",
    "image": "image",
    "generator": "seed",
    "stg": "guidance",
    "num_videos_per_prompt": "repeat",
    "num_images_per_prompt": "repeat",
}
CLOSED = ("output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
# Names that Windows reserves for devices, with any extension.
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
NOTHING: Mapping[str, Any] = MappingProxyType({})
RESERVED = {"index", "index.html"}  # the page about the clips


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Weights that change a model for one clip.

    Attributes:
        path: a .safetensors file.
        weight: their factor.
        second: they are for the second of two denoisers, as in Wan 2.2.
        sha256: the digest of the file.
    """

    path: str
    weight: float = 1.0
    second: bool = False
    sha256: str = ""

    def __post_init__(self) -> None:
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not number or not -MAX_WEIGHT <= self.weight <= MAX_WEIGHT:
            raise wrong("weight of a LoRA", shown(self.weight), f"a number from {-MAX_WEIGHT} to {MAX_WEIGHT}")
        if not isinstance(self.second, bool):
            raise wrong("second of a LoRA", shown(self.second), "true or false")
        object.__setattr__(self, "weight", float(self.weight))
        there = _check_lora(self.path)
        if self.sha256 not in ("", there):
            raise wrong(
                "loras", f"{self.path} with digest {there[:12]}...", f"{self.sha256[:12]}..., as when the job was made"
            )
        object.__setattr__(self, "sha256", there)

    def to_dict(self) -> dict[str, Any]:
        usual = {"weight": 1.0, "second": False}
        return {name: value for name, value in vars(self).items() if (name, value) not in usual.items()}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One clip. Fields that are left out are the pipeline's own.

    Attributes:
        prompt, negative_prompt, seed, width, height, num_frames, steps: as in diffusers.
        guidance: a `Guidance`, or one as data, or the name of a preset. Default: that of the model.
        pipeline: further arguments of the pipeline's call.
        image: a file, for image to video.
        name: the name of the output without extension. Default: made from prompt and settings.
        loras: weights that change the model, as `Lora` or data.
        solver: a solver of `stgfast.solver`.
        recipe: a recipe of `stgfast tune`, as data.
        model: a folder or hub name. Default: that of the run.
        priority: jobs with a higher one are rendered first.
    """

    prompt: str = ""
    negative_prompt: str | None = None
    seed: int = 0
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    steps: int | None = None
    guidance: Guidance | None = None
    pipeline: Mapping[str, Any] = field(default_factory=dict)
    image: str | None = None
    image_sha256: str | None = None
    name: str = ""
    loras: tuple[Lora, ...] = ()
    solver: str = ""
    recipe: Mapping[str, Any] | None = None
    model: str = ""
    priority: int = 0

    def __post_init__(self) -> None:
        check_text("prompt", self.prompt)
        if self.negative_prompt is not None:
            check_text("negative_prompt", self.negative_prompt)
        if not self.prompt.strip() and self.image is None:
            raise wrong("prompt", shown(self.prompt), "what to render, in words, or an image")
        check_number("seed", self.seed, 0, 2**63 - 1)
        for name, low, high in (("num_frames", 1, 10_000), ("steps", 1, 1000)):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low, high)
        for name in ("width", "height"):
            side = getattr(self, name)
            if side is not None:
                check_number(name, side, 16, 8192)
                if side % 8:
                    raise wrong(name, side, f"a multiple of 8, such as {max(16, round(side / 8) * 8)}")
        object.__setattr__(self, "guidance", _guidance(self.guidance))
        _check_arguments(self.pipeline)
        if self.image is not None:
            object.__setattr__(self, "image_sha256", _check_image(self.image, self.image_sha256))
        elif self.image_sha256 is not None:
            raise wrong("image_sha256", self.image_sha256, "an image with it")
        if self.name != "":
            object.__setattr__(self, "name", safe_name(self.name))
        object.__setattr__(self, "loras", _loras(self.loras))
        for name in ("solver", "model"):
            check_text(name, getattr(self, name), MAX_PATH)
        object.__setattr__(self, "recipe", _recipe(self.recipe, self.solver))
        check_number("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `from_dict`, without fields that were left out."""
        return dict(self._data)

    @functools.cached_property
    def _data(self) -> dict[str, Any]:
        mine = {name: getattr(self, name) for name in OWN}
        mine |= {"guidance": self.guidance and self.guidance.to_dict(), "pipeline": dict(self.pipeline)}
        mine["loras"] = [lora.to_dict() for lora in self.loras]
        mine["recipe"] = self.recipe and dict(self.recipe)
        usual = {"priority": 0}
        return {
            name: value
            for name, value in mine.items()
            if name == "prompt" or (value not in (None, "", {}, []) and (name, value) not in usual.items())
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Job:
        check_fields(data, FIELDS - {"repeat"})
        return cls(**data)

    def identity(self, model: str, made: Mapping[str, Any] = NOTHING) -> str:
        """Everything that decides what the clip looks like, in one line: clips with equal identity are equal. `made`
        describes the model beside its name.
        """
        mine = {name: value for name, value in self.to_dict().items() if name not in ("name", "image", "priority")}
        if self.loras:  # without their paths
            mine["loras"] = [{k: v for k, v in lora.to_dict().items() if k != "path"} for lora in self.loras]
        return json.dumps({**mine, "model": model, **made}, sort_keys=True)

    def named(self, model: str, made: Mapping[str, Any] = NOTHING) -> Job:
        """The same job with a name: its own, or one that depends on its settings only."""
        if self.name:
            return self
        digest = hashlib.sha256(self.identity(model, made).encode()).hexdigest()[:10]
        return dataclasses.replace(self, name=f"{_slug(self.prompt)}-{digest}")


OWN = tuple(f.name for f in dataclasses.fields(Job))
FIELDS = frozenset({*OWN, "repeat"})
EXAMPLE = '{"prompt": "a red kite", "seed": 1}'
NUMBERS = ("seed", "width", "height", "num_frames", "steps", "repeat", "priority")


def parse_json(text: str) -> Any:
    """Parse JSON, more strictly than Python: no duplicate names, no NaN, limited nesting."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} twice")
        return found

    def no_number(name: str) -> Any:
        raise ValueError(f"{name}, which is no number in JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=no_number)
    except RecursionError:
        raise ValueError("too many nested brackets") from None


# Checks of one field each.


def safe_name(name: object) -> str:
    """The name of an output: one part of a path that means the same file on each system."""
    if not isinstance(name, str):
        raise wrong("name", name, "text")
    check_text("name", name, MAX_NAME)
    name = unicodedata.normalize("NFC", name)
    right = "letters, digits, spaces and . _ - within one folder, such as 'kite-01'"
    if len(name.encode()) > MAX_NAME:
        raise wrong("name", f"{len(name.encode())} bytes", f"{MAX_NAME} bytes at most")
    strange = [c for c in name if not (c.isalnum() or c in " ._-+,=()" or unicodedata.category(c) in ("Mn", "Mc"))]
    if strange or not name or name[0] in ".- " or name[-1] in ". ":
        raise wrong("name", name, right)
    stem = name.split(".")[0].rstrip().casefold()
    if stem in DEVICES or name.casefold() in RESERVED:
        raise wrong("name", name, f"another one: {stem!r} is reserved")
    return name


def check_text(name: str, text: object, limit: int = MAX_PROMPT) -> None:
    if not isinstance(text, str):
        raise wrong(name, shown(text), "text")
    if len(text) > limit:
        raise wrong(name, f"{len(text)} characters", f"{limit} at most")
    bad = CONTROL.search(text)
    if bad:
        raise wrong(name, f"the control character U+{ord(bad[0]):04X}", "text without")


def check_number(name: str, number: object, low: int, high: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
        raise wrong(name, shown(number), f"a whole number from {low} to {high}")


def check_fields(given: Mapping[str, Any], fields: Iterable[str]) -> None:
    for name in given:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = repr(near[0]) if near else f"some of {', '.join(sorted(fields))}"
            hint = repr(TAKEN[name]) if name in TAKEN else hint
            raise wrong("field", shown(name), f"{hint}; further arguments of the pipeline go into 'pipeline'")


def _guidance(given: object) -> Guidance | None:
    if given is None or isinstance(given, Guidance):
        if given is not None:
            given.to_dict()  # raises for what cannot be plain data
        return given
    if isinstance(given, str):
        return Guidance.preset(given)
    if not isinstance(given, Mapping):
        raise wrong("guidance", shown(given), "fields of Guidance, or the name of a preset")
    _check_plain("guidance", given)
    try:
        return Guidance.from_dict(given)
    except (TypeError, AttributeError, KeyError) as error:
        raise SettingsError(f"guidance: got {shown(given)}, expected fields of Guidance ({error})") from None


def _check_arguments(given: object) -> None:
    if not isinstance(given, Mapping):
        raise wrong("pipeline", shown(given), "an object with arguments of the pipeline's call")
    for name in given:
        if name in TAKEN:
            raise wrong("pipeline", name, f"the job's own field {TAKEN[name]!r}")
        if not isinstance(name, str) or not name.isidentifier() or name in CLOSED or name.startswith("stg"):
            raise wrong("pipeline", shown(name), "an argument of the pipeline's call that a job may set")
    _check_plain("pipeline", given)


def _check_plain(name: str, given: Mapping[Any, Any]) -> None:
    try:
        size = len(json.dumps(given, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise SettingsError(f"{name}: got {shown(given)}, expected plain values as in JSON ({error})") from None
    if size > MAX_ARGUMENTS:
        raise wrong(name, f"{size} bytes", f"{MAX_ARGUMENTS} at most")


def _recipe(given: object, solver: str) -> Mapping[str, Any] | None:
    """The data of a recipe without its measurements. Its content is checked when the model is known."""
    if given is None:
        return None
    if solver:
        raise SettingsError("solver and recipe: got both, expected one of them")
    if not isinstance(given, Mapping):
        raise wrong("recipe", shown(given), "the content of a file written by stgfast tune")
    _check_plain("recipe", given)
    return {name: value for name, value in given.items() if name != "found"}


def _loras(given: object) -> tuple[Lora, ...]:
    right = 'a list such as [{"path": "style.safetensors", "weight": 0.8}]'
    if not isinstance(given, list | tuple) or len(given) > MAX_LORAS:
        raise wrong("loras", shown(given), f"{right}, of {MAX_LORAS} at most")
    return tuple(one if isinstance(one, Lora) else _lora(one, right) for one in given)


def _lora(given: object, right: str) -> Lora:
    if not isinstance(given, Mapping) or not {"path"} <= set(given) <= {"path", "weight", "second", "sha256"}:
        raise wrong("loras", shown(dict(given) if isinstance(given, Mapping) else given), right)
    return Lora(**given)


def _check_lora(path: object) -> str:
    """The digest of a file of weights."""
    right = "a .safetensors file that can be read"
    if not isinstance(path, str) or not path.endswith(".safetensors"):
        raise wrong("path of a LoRA", shown(path), right)
    check_text("path of a LoRA", path, MAX_PATH)
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_LORA:
            raise wrong("path of a LoRA", path, f"a file of {MAX_LORA} bytes at most")
        return _digest_of_lora(path, found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise wrong("path of a LoRA", path, f"{right} ({error.strerror})") from None


@functools.lru_cache(maxsize=1024)  # jobs share LoRAs
def _digest_of_lora(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        head = file.read(9)
        # The length of a JSON header, and its first bracket.
        if len(head) < 9 or int.from_bytes(head[:8], "little") > size or head[8:] != b"{":
            raise wrong("path of a LoRA", path, "a whole .safetensors file")
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_image(path: object, digest: str | None) -> str:
    """The digest of an image, after it was read completely."""
    if not isinstance(path, str):
        raise wrong("image", shown(path), "the name of a file")
    try:
        found = os.stat(path)
    except OSError as error:
        raise wrong("image", path, f"a file that can be read ({error.strerror})") from None
    if not stat.S_ISREG(found.st_mode):
        raise wrong("image", path, "a regular file")
    if found.st_size > MAX_IMAGE:
        raise wrong("image", f"{path} of {found.st_size} bytes", f"{MAX_IMAGE} bytes at most")
    there = _digest_of_image(path, found.st_size, found.st_mtime_ns)
    if digest not in (None, there):
        raise wrong("image", f"{path} with digest {there[:12]}...", f"{str(digest)[:12]}..., as when the job was made")
    return there


@functools.lru_cache(maxsize=1024)  # jobs share images
def _digest_of_image(path: str, size: int, changed: int) -> str:
    read_image(path)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_image(path: str) -> Any:
    """The image as RGB, upright. Its size is checked before it is decoded."""
    import warnings

    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is below the one that raises
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise wrong("image", f"{path} of {width} x {height}", f"{MAX_PIXELS} pixels at most")
                return ImageOps.exif_transpose(image).convert("RGB")
    except SettingsError:
        raise
    except Exception as error:  # a decoder of hostile bytes may raise anything
        formats = ", ".join(IMAGE_FORMATS)
        raise wrong("image", path, f"a whole image ({formats}): {type(error).__name__}: {error}") from None


def _slug(prompt: str) -> str:
    plain = unicodedata.normalize("NFKD", prompt[:200]).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].strip("-") or "clip"


def shown(value: object) -> object:
    """A value for a message: short whatever it is; a number is shown as a number."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    if isinstance(value, int | float):
        return value
    text = value if isinstance(value, str) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]}... ({len(text)} characters)"
