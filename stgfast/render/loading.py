"""Load a model for a run: weights from safetensors, no code from its folder, offloading as asked."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stgfast.batching.execution import AS_IT_IS, Execution
from stgfast.errors import DeviceError, LoadError, SettingsError, UnsupportedPipelineError, one_line, wrong
from stgfast.guidance import Guidance
from stgfast.install import accelerate
from stgfast.installed import INSTALLED, installed_on, original_class
from stgfast.integrations import adapter_for
from stgfast.recipes import Recipe
from stgfast.render.shortage import is_out_of_memory
from stgfast.render.texts import encoders_of

LIBRARIES = ("diffusers", "transformers")
BY_NAME = "a model with code of its own is loaded only if it is trusted by name"
WHOLE, SAMPLES = 1 << 20, 64  # bytes of a file that are read, and the number of samples of a larger one
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OFFLOADS = TEXT, MODEL, GROUP = ("text", "model", "group")


@dataclass(frozen=True)
class Loading:
    """How a run loads its model.

    Attributes:
        dtype: of the weights, except for parts that are always float32. Default: bfloat16, or float32 on a CPU.
        device: "cuda" or "cpu". Default: CUDA if there is a GPU.
        offload: what is on the device only while it computes: "text", the text encoders; "model", each model of the
            pipeline; "group", each layer.
        vae_tiling: the VAE decodes in tiles, with less memory and slightly different pixels.
        compile: compile the denoiser's blocks.
        attention: "auto", the fastest for each shape.
        ranks: the processes over which each clip is divided, including this one.
    """

    dtype: str | None = None
    device: str | None = None
    offload: str | None = None
    vae_tiling: bool = False
    compile: bool = False
    attention: str | None = None
    ranks: int = 1

    def __post_init__(self) -> None:
        for name, choices in (("dtype", DTYPES), ("offload", OFFLOADS), ("attention", ("auto",))):
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise wrong(name, value, f"{', '.join(choices)}, or None")

    @property
    def footprint(self) -> str:
        """A key for how many clips fit into memory."""
        named = {"dtype": self.dtype, "offload": self.offload, "tiles": self.vae_tiling}
        return "".join(f", {name} {value}" for name, value in named.items() if value)

    def number_type(self, name: str | None) -> str:
        """The dtype of the denoiser; `name` is that of a model with a dtype of its own."""
        return self.dtype or name or ("float32" if self._target.type == "cpu" else "bfloat16")

    def check_handed_over(self) -> None:
        """Raise if something is asked that cannot be done to a copy of a pipeline object."""
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if value != each.default and (each.name, value) not in (("offload", TEXT), ("vae_tiling", True)):
                raise wrong(each.name, value, "none for a pipeline that is loaded: it is used as it is")

    def load(self, source: str | Callable[[], Any], *, trusted: bool, exact: Sequence[str], revision: str = "") -> Any:
        """The pipeline, guided, from a folder, a hub name, or a function that builds it. `exact` parts are in
        float32.
        """
        device = self._target
        try:
            if isinstance(source, str):
                pipe = self._pretrained(source, device, trusted, exact, revision)
            else:
                pipe = source() if self.dtype is None else source().to(DTYPES[self.dtype])
            self._place(pipe, device)
        except (SettingsError, UnsupportedPipelineError):
            raise
        except Exception as error:  # anything may be wrong with a model's files, or not installed
            if is_out_of_memory(error):
                more = "offload text, model or group takes less"
                raise DeviceError(f"{device} has less memory than the model takes: {more}") from error
            raise LoadError(f"model: got one that cannot be loaded: {one_line(error)}") from error
        return self.prepared(pipe)

    def prepared(self, pipe: Any) -> Any:
        """The pipeline, guided, with its VAE as asked."""
        if not hasattr(pipe, INSTALLED) or self.compile or self.attention or self.ranks > 1:
            given, adapter = given_to(pipe), adapter_for(pipe, original_class(type(pipe)))
            if given is None and adapter.announced is None:
                given = Guidance()  # each job has its own; the default's layers may not exist in this model
            accelerate(
                pipe,
                given,
                compile=self.compile,
                attention=self.attention,
                branches=torch.distributed.group.WORLD if self.ranks > 1 else None,
            )
        if self.vae_tiling or installed_on(pipe).adapter.clips.tiled:
            vae: Any = getattr(pipe, "vae", None)
            if not hasattr(vae, "use_tiling"):
                raise wrong("vae_tiling", True, f"False: {type(vae).__name__} decodes a clip as a whole")
            vars(pipe)["vae"] = vae = copy.copy(vae)  # the same weights
            vae.enable_tiling()
        return pipe

    @property
    def _target(self) -> torch.device:
        try:
            device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError:
            raise wrong("device", self.device, "the name of a device, such as cuda, cuda:1 or cpu") from None
        there = torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= there:
            right = f"one of the {there} GPUs that torch sees, or cpu" if there else "cpu, for torch sees no GPU"
            raise wrong("device", self.device, right)
        return device

    def _place(self, pipe: Any, device: torch.device) -> None:
        if self.offload == MODEL:
            pipe.enable_model_cpu_offload(device=device)
        elif self.offload == GROUP:
            pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=device.type == "cuda")
        else:
            moved = copy.copy(pipe)
            vars(moved).update(dict.fromkeys(encoders_of(pipe) if self.offload == TEXT else ()))
            moved.to(device)  # without these

    def _pretrained(self, name: str, device: torch.device, trusted: bool, exact: Sequence[str], revision: str) -> Any:
        from diffusers import DiffusionPipeline

        folder = name
        if not Path(folder).is_dir():
            how = {"revision": revision or None, "use_safetensors": True, "trust_remote_code": trusted}
            folder = DiffusionPipeline.download(folder, **how)
        if not trusted:
            check_folder(Path(folder))
        usual = DTYPES[self.number_type(None)]
        dtypes = {**dict.fromkeys(exact, torch.float32), "default": usual}
        return DiffusionPipeline.from_pretrained(folder, dtype=dtypes, use_safetensors=True, trust_remote_code=trusted)


USUAL = Loading()


def given_to(pipe: Any) -> Guidance | None:
    """The guidance with which a pipeline was accelerated; None for its default, or if it is not accelerated."""
    installed = getattr(pipe, INSTALLED, None)
    return installed.given if installed else None


def execution_of(pipe: Any) -> Execution:
    """How calls of a pipeline run."""
    installed = getattr(pipe, INSTALLED, None)
    return installed.execution if installed else AS_IT_IS


def recipe_of(pipe: Any) -> Recipe | None:
    """The recipe with which a pipeline was accelerated."""
    installed = getattr(pipe, INSTALLED, None)
    return installed.recipe if installed else None


def moves(pipe: Any) -> bool:
    """Whether models or layers move to and from the device around their calls, by accelerate or diffusers."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    registries = (getattr(module, "_diffusers_hook", None) for part in parts for module in part.modules())
    grouped = any("group_offloading" in registry.hooks for registry in registries if registry is not None)
    return grouped or any(hasattr(part, "_hf_hook") for part in parts)


def without_bars() -> None:
    """Switch off the progress bars of the libraries that load a model."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()


def fingerprint(folder: Path) -> str:
    """A key for the files of a model and its version: settings completely, weights by size and samples, because
    reading all of them may take minutes.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".json", ".safetensors") or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}".encode())
        with path.open("rb") as file:
            starts = [0] if size <= WHOLE else [size * part // SAMPLES for part in range(SAMPLES)]
            for start in starts:
                file.seek(start)
                digest.update(file.read(WHOLE if len(starts) == 1 else WHOLE // SAMPLES))
    return digest.hexdigest()[:16]


def check_folder(folder: Path) -> None:
    """Raise if a model's folder asks for code of its own, or for an unknown library."""
    import diffusers

    index = read_json(folder / "model_index.json")
    if not isinstance(index.get("_class_name"), str) or not hasattr(diffusers, index["_class_name"]):
        raise wrong("class in model_index.json", index.get("_class_name"), f"a pipeline of diffusers; {BY_NAME}")
    # Components of a single pipeline are named by its folder in diffusers.
    pipelines = {path.parent.name for path in (Path(diffusers.__file__).parent / "pipelines").glob("*/__init__.py")}
    for name, part in index.items():
        if isinstance(part, list) and part and part[0] not in (None, *LIBRARIES, *pipelines):
            raise wrong(f"library of {name} in model_index.json", part[0], f"{' or '.join(LIBRARIES)}; {BY_NAME}")
    for config in sorted(folder.glob("*/*.json")):
        if config.name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
            asks = read_json(config).get("auto_map")
            if asks:
                raise wrong(f"auto_map in {config.relative_to(folder)}", asks, f"none; {BY_NAME}")


def read_json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = str(error) if not isinstance(error, RecursionError) else "too many brackets in one another"
        raise wrong("model", str(path), f"a file with JSON ({why})") from None
    if not isinstance(found, dict):
        raise wrong("model", str(path), "a file with a JSON object")
    return found
