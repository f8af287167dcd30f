"""Encoded prompts, each once: the result of a pipeline's `encode_prompt` is stored prompt by prompt.

Prompts are encoded one by one, so that the result does not depend on the other prompts of a batch.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

MEMORY = 256 << 20  # bytes of encoded prompts that stay in memory; more go to disk
DISK = 4 << 30  # bytes of them on disk; the rest is dropped, and encoded again when needed
TEXTS = ("prompt", "negative_prompt")  # a single one is the same as a list of one
Encoded = tuple[Tensor | None, ...]


class NotStackable(Exception):
    """These prompts cannot be in one call and give what each gives alone."""


class Texts:
    """Encoded prompts, by everything that decides them.

    Attributes:
        folder: for what memory does not hold.
        parts: the text encoders, if they are on the device only while they encode; then others are encoded ahead.
        ahead: later prompts and negative prompts.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        *,
        parts: Mapping[str, nn.Module] | None = None,
        ahead: Callable[[], list[tuple[str, str | None]]] = list,
        memory: int = MEMORY,
        disk: int = DISK,
    ):
        self.folder, self.device, self.parts, self.ahead = folder, device, parts or {}, ahead
        self.memory, self.disk = memory, disk
        self.known: OrderedDict[str, Encoded] = OrderedDict()
        self.spilled: OrderedDict[str, int] = OrderedDict()  # bytes of each on disk
        self.size = 0
        self.lock = threading.Lock()
        self.last: dict[str, Last] = {}
        for part in self.parts.values():
            part.to("cpu")

    def anew(self) -> Texts:
        """An empty copy, for a worker whose thread hangs and holds this one."""
        folder = self.folder.with_name(f"{self.folder.name}+")
        return Texts(folder, self.device, parts=self.parts, ahead=self.ahead, memory=self.memory, disk=self.disk)

    def encoding(self, pipe: Any, count: int) -> Callable[..., Any]:
        """The replacement of `pipe.encode_prompt` in calls for the same `count` prompts, which are looked up once."""
        original = type(pipe).encode_prompt
        signature = inspect.signature(original)
        named = all(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values())
        mine: dict[str, Any] = {}

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            given = dict(signature.bind(pipe, *args, **kwargs).arguments)
            del given[next(iter(signature.parameters))]  # self
            given |= {name: [text] for name in TEXTS if isinstance(text := given.get(name), str)}
            try:
                key = _key(given) if named else ""
            except TypeError:  # their equality cannot be decided
                key = ""
            if not key:
                with self.lock, self._reader(pipe) as reader:  # it cannot be split by prompt
                    return original(reader, *args, **kwargs)
            if key not in mine:
                with self.lock:
                    each = [self._encoded(pipe, _of_one(given, place, count)) for place in range(count)]
                mine[key] = each[0] if count == 1 else _together(each)
            return mine[key]

        return encode_prompt

    def _encoded(self, pipe: Any, given: dict[str, Any]) -> Any:
        key = _key(given)
        encoded = self._look_up(key)
        if encoded is None:
            # A text that is encoded with an image belongs to one clip.
            others = [_with(given, *texts) for texts in self.ahead()] if self.parts and "image" not in given else []
            with self._reader(pipe) as reader:
                encoded = type(pipe).encode_prompt(reader, **given)
                if not _plain(encoded):
                    return encoded  # an unknown form, which is not stored
                self._keep(key, encoded)
                for other in others:
                    theirs = _key(other)
                    if theirs not in self.known and theirs not in self.spilled:
                        self._keep(theirs, type(pipe).encode_prompt(reader, **other))
        return tuple(None if part is None else part.to(self.device) for part in encoded)

    @contextmanager
    def _reader(self, pipe: Any) -> Iterator[Any]:
        """The pipeline with its text encoders, on the device within the block.

        Each encoder remembers its last outputs, because a negative prompt comes with each prompt.
        """
        reader = copy.copy(pipe)
        for name, part in (self.parts or encoders_of(pipe)).items():
            vars(reader)[name] = remembering = copy.copy(part)  # the same weights
            vars(remembering)["forward"] = self.last.setdefault(name, Last()).of(part.forward)
        for part in self.parts.values():
            part.to(self.device)
        try:
            yield reader
        finally:
            for part in self.parts.values():
                part.to("cpu")

    def _keep(self, key: str, encoded: Encoded) -> None:
        self.known[key] = kept = tuple(None if part is None else part.detach().cpu() for part in encoded)
        self.size += _bytes(kept)
        while self.size > self.memory:
            oldest = next(iter(self.known))
            if oldest == key:
                return
            self._spill(oldest)

    def _spill(self, key: str) -> None:
        """Move from memory to disk. If the disk is full, the entry is dropped: the current job is not at fault."""
        from safetensors.torch import save

        encoded = self.known.pop(key)
        self.size -= _bytes(encoded)
        parts = {str(place): part.contiguous() for place, part in enumerate(encoded) if part is not None}
        data = save(parts, {"parts": str(len(encoded))})
        path = self.folder / key
        try:
            self.folder.mkdir(exist_ok=True)
            path.write_bytes(data)
        except OSError:
            path.unlink(missing_ok=True)
            return
        self.spilled[key] = len(data)
        while sum(self.spilled.values()) > self.disk:
            oldest, _ = self.spilled.popitem(last=False)
            (self.folder / oldest).unlink(missing_ok=True)

    def _look_up(self, key: str) -> Encoded | None:
        from safetensors import SafetensorError, safe_open

        if key in self.known:
            self.known.move_to_end(key)
            return self.known[key]
        if key not in self.spilled:
            return None
        self.spilled.move_to_end(key)
        try:
            with safe_open(self.folder / key, "pt") as file:
                there = set(file.keys())
                count = int(file.metadata()["parts"])
                return tuple(file.get_tensor(str(n)) if str(n) in there else None for n in range(count))
        except (OSError, SafetensorError):  # the folder was cleared
            del self.spilled[key]
            return None


class Last:
    """The last few outputs of a module, for calls with equal arguments."""

    def __init__(self, memory: int = 64 << 20):
        self.outputs: OrderedDict[str, Any] = OrderedDict()
        self.memory = memory

    def of(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def remembered(*args: Any, **kwargs: Any) -> Any:
            key = hashlib.sha256()
            for name, value in (*enumerate(args), *sorted(kwargs.items())):
                key.update(f"{name}:{value if not isinstance(value, Tensor) else (value.dtype, value.shape)}".encode())
                if isinstance(value, Tensor):
                    key.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            found = key.hexdigest()
            if found not in self.outputs:
                self.outputs[found] = forward(*args, **kwargs)
            self.outputs.move_to_end(found)
            output = self.outputs[found]
            while len(self.outputs) > 1 and sum(map(_held, self.outputs.values())) > self.memory:
                self.outputs.popitem(last=False)
            return output

        return remembered


def _held(output: Any) -> int:
    """The bytes of an output's tensors."""
    if isinstance(output, Tensor):
        return output.nbytes
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return sum(map(_held, parts))


def encoders_of(pipe: Any) -> dict[str, nn.Module]:
    """The text encoders of a pipeline, by name."""
    return {
        name: part
        for name, part in vars(pipe).items()
        if name.startswith("text_encoder") and isinstance(part, nn.Module)
    }


def _of_one(given: dict[str, Any], place: int, count: int) -> dict[str, Any]:
    """The arguments for one prompt: lists with one entry for each prompt are cut."""
    one = {
        name: value[place : place + 1] if isinstance(value, list) and len(value) == count else value
        for name, value in given.items()
    }
    return one | ({"batch_size": 1} if "batch_size" in given else {})  # some take the number of prompts


def _with(given: dict[str, Any], prompt: str, negative: str | None) -> dict[str, Any]:
    changed = {**given, "prompt": [prompt]}
    if negative is not None and given.get("negative_prompt") is not None:
        changed["negative_prompt"] = [negative]
    return changed


def _key(given: dict[str, Any]) -> str:
    """A key that is equal only for equal arguments; raises TypeError if their equality cannot be decided."""
    return hashlib.sha256(repr({name: _described(given[name]) for name in sorted(given)}).encode()).hexdigest()


def _described(value: Any) -> Any:
    """A value as text that is equal for equal values."""
    if value is None or isinstance(value, (str, int, float, torch.device, torch.dtype)):
        return value
    if isinstance(value, (list, tuple)):
        return [_described(part) for part in value]
    if isinstance(value, Mapping):
        return {name: _described(part) for name, part in value.items()}
    if isinstance(value, Image.Image):
        return value.mode, value.size, hashlib.sha256(value.tobytes()).hexdigest()
    raise TypeError(type(value).__name__)


def _plain(encoded: Any) -> bool:
    return isinstance(encoded, tuple) and all(part is None or isinstance(part, Tensor) for part in encoded)


def _together(each: list[Any]) -> Any:
    """The outputs for several prompts, in the form of one call for all of them."""
    for encoded in each:
        if not _plain(encoded) or any(part is not None and (not part.ndim or len(part) != 1) for part in encoded):
            raise NotStackable("prompts: got an encoding that has no row for each")
    columns = list(zip(*each, strict=True))
    for parts in columns:
        if len({None if part is None else tuple(part.shape) for part in parts}) > 1:
            raise NotStackable("prompts: got encodings of several lengths, which differ when they are padded")
    return tuple(None if parts[0] is None else torch.cat(parts) for parts in columns)


def _bytes(encoded: Encoded) -> int:
    return sum(part.nbytes for part in encoded if part is not None)
