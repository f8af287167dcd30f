"""Which pipeline a model is, and what its calls take: known before it is loaded."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stgfast import toy
from stgfast.batching.execution import AS_IT_IS
from stgfast.errors import SettingsError, UnsupportedPipelineError, wrong
from stgfast.guidance import Guidance
from stgfast.install import accelerate
from stgfast.installed import INSTALLED, Installed, bound_call, settled
from stgfast.integrations import ADAPTERS
from stgfast.integrations.spec import Adapter
from stgfast.queue.batches import stack_of
from stgfast.queue.job import Job
from stgfast.recipes import Recipe
from stgfast.render.calls import FRAMES, arguments_of, frames_argument
from stgfast.render.loading import BY_NAME, USUAL, Loading, check_folder, fingerprint, given_to, read_json, recipe_of
from stgfast.render.loras import lacking
from stgfast.render.skeleton import skeleton


@dataclass(frozen=True)
class Named:
    """A model that comes by a name of its own.

    build     the pipeline, accelerated
    kind      its class, of diffusers
    guidance  that it is accelerated with
    job       what its jobs have that do not say otherwise
    folder    its files, where there are any
    """

    build: Callable[[], Any]
    kind: str
    guidance: Guidance
    job: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def _toy() -> Any:
    return accelerate(toy.pipeline(), toy.GUIDANCE)


RATES = ("frame_rate", "fps")  # arguments of calls
# What pipelines call how many frames their VAE makes of one.
STEPS = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_frame_scale_factor")
CHECKED = 10_000  # calls that are remembered
NAMED = {"toy": Named(_toy, "LTXPipeline", toy.GUIDANCE, toy.JOB, toy.FOLDER)}


@dataclass(frozen=True)
class Model:
    """What is known of a model before its weights are: its name and the class of its pipeline."""

    name: str
    kind: type[Any]
    pipe: Any = None
    trusted: bool = False
    parameters: dict[str, inspect.Parameter] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set, compare=False)  # calls that nothing is wrong with
    given: Guidance | None = None  # what the pipeline that was handed over, or is built, is accelerated with
    build: Callable[[], Any] | None = None  # of a model that comes by a name of its own
    recipe: Recipe | None = None  # likewise
    revision: str = ""  # of its files: the hub's, or what tells them from others
    config: Mapping[str, Any] = field(default_factory=dict)  # of the pipeline
    folder: Path | None = None  # of its files, where they are on this machine

    def __post_init__(self) -> None:
        self.parameters.update(inspect.signature(self.kind.__call__).parameters)
        missing = {"generator", "output_type", "num_inference_steps"} - set(self.parameters)
        if missing or not set(FRAMES) & set(self.parameters):
            raise UnsupportedPipelineError(f"pipeline: got {self.kind.__name__}, expected one that makes video")
        needed = {name for name, parameter in self.parameters.items() if parameter.default is parameter.empty}
        needed -= {"self", "args", "kwargs", "prompt", "image"}
        if needed:
            named = ", ".join(sorted(needed))
            raise UnsupportedPipelineError(
                f"pipeline: got {self.kind.__name__}, which begins with {named}, expected one that begins with a "
                f"prompt or an image"
            )

    def settled(self, job: Job, recipe: Recipe | None = None) -> Job:
        """The job with the guidance that it is rendered with, where it does not say: that of the pipeline, or the
        default of the model, which may be another one in another version. Pipelines that ask for their weak branches
        themselves have settings of their own in its place. What is made by a recipe has that in its guidance."""
        guidance = job.guidance or self.given
        if guidance is None and self.adapter.announced is None:
            guidance = self.adapter.defaults
        if recipe is not None:
            steps, guidance = recipe.for_job(self.adapter, job.steps, guidance, job.pipeline)
            job = dataclasses.replace(job, steps=steps)
        return job if guidance is None else dataclasses.replace(job, guidance=guidance)

    def recipe_of(self, loading: Loading) -> Recipe | None:
        """By which its clips are made."""
        return loading.recipe or self.recipe

    def made(self, loading: Loading) -> dict[str, Any]:
        """What else decides a clip: the type of numbers, the version of the model's files, the solver of a recipe."""
        own = None if self.build is None else "float32"
        if self.pipe is not None:
            layout, *_ = self.adapter.layouts(self.pipe).values()
            own = str(layout.denoiser.dtype).removeprefix("torch.")
        recipe = self.recipe_of(loading)
        solver = "" if recipe is None else recipe.solver
        made = {"dtype": loading.number_type(own), "revision": self.revision, "solver": solver}
        return {name: value for name, value in made.items() if value}

    def defaults_with(self, recipe: Recipe | None) -> Mapping[str, Any]:
        """What its jobs have that do not say otherwise; a recipe's steps come before those."""
        own = NAMED[self.name].job if self.name in NAMED else {}
        return own if recipe is None else {name: value for name, value in own.items() if name != "steps"}

    @property
    def adapter(self) -> Adapter:
        return ADAPTERS[self.kind.__name__]

    @property
    def images(self) -> str:
        """How its calls take several images."""
        return self.adapter.clips.images

    @property
    def needs_image(self) -> bool:
        kind = self.kind.__name__
        named = any(part in kind for part in ("ImageToVideo", "I2V", "StableVideoDiffusion", "VideoToWorld"))
        return named and "image" in self.parameters

    def check(self, job: Job, recipe: Recipe | None = None) -> None:
        """What this pipeline cannot do of a job."""
        self._check_fields(job)
        key = f"{stack_of(job)} {bool(job.prompt)}"
        if key not in self.checked:  # jobs differ in prompts and seeds above all
            self._check_values(job)
            self._own_check(job)
            self._check_frames(job)
            try:
                self._check_call(self.settled(job, recipe))
            except SettingsError as error:
                if job.guidance is not None or self.given is not None:
                    raise
                raise SettingsError(f"guidance: got none, and the default does not fit this model: {error}") from None
            if len(self.checked) > CHECKED:
                self.checked.clear()
            self.checked.add(key)

    def _check_fields(self, job: Job) -> None:
        kind, known = self.kind.__name__, self.parameters
        lacks = lacking(self.kind, job.loras)
        if lacks:
            raise wrong("loras", len(job.loras), lacks)
        for name in ("image", "negative_prompt", "width", "height"):
            value = getattr(job, name)
            if value is not None and name not in known:
                raise wrong(name, value[:60] if isinstance(value, str) else value, f"none: {kind} takes none")
        if job.image is None and self.needs_image:
            raise wrong("image", None, f"one: {kind} begins with an image")
        if job.negative_prompt is None and self.adapter.clips.negative:
            raise wrong("negative_prompt", None, f"one, if an empty one: {kind} fails without")
        for name in job.pipeline:
            if name not in known or name in ("self", "args", "kwargs"):
                near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4)) or ", ".join(known)
                raise wrong("pipeline", name, f"an argument of {kind}, such as {near}")

    def _check_values(self, job: Job) -> None:
        """That further arguments of the call are of the kind that it takes."""
        for name, value in job.pipeline.items():
            parameter = self.parameters[name]
            default = parameter.default
            if _takes_tensors_alone(parameter):
                raise wrong("pipeline", name, "an argument that is no tensor: a job has plain values")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if isinstance(default, bool):
                if not isinstance(value, bool):
                    raise wrong(f"pipeline, {name}", value, "true or false")
            elif isinstance(default, int | float) and not number and not (value is None or isinstance(value, list)):
                raise wrong(f"pipeline, {name}", value, f"a number, such as {default}")
            elif isinstance(default, str) and not isinstance(value, str):
                raise wrong(f"pipeline, {name}", value, f"text, such as {default!r}")
            if name in RATES and number and not 0.1 <= value <= 240:
                raise wrong(f"pipeline, {name}", value, "frames in a second, from 0.1 to 240")

    def _check_frames(self, job: Job) -> None:
        """Where the VAE makes several frames of one, the first alone, and the pipeline's own number is of that form,
        others are rounded without a word."""
        pipe, asked = self.skeleton, job.num_frames
        if pipe is None or asked is None:
            return
        step = next((value for name in STEPS if isinstance(value := getattr(pipe, name, None), int)), 1)
        own = self.parameters[frames_argument(self.parameters)].default
        if step > 1 and isinstance(own, int) and (own - 1) % step == 0 and (asked - 1) % step:
            below = (asked - 1) // step * step + 1
            raise wrong("num_frames", asked, f"{below} or {below + step}, as {self.kind.__name__} makes them")

    def _check_call(self, job: Job) -> None:
        """The engine's own check of the call."""
        pipe = self.skeleton
        if pipe is None:
            return
        installed = Installed(self.adapter, job.guidance, AS_IT_IS, None, self.kind)
        call = arguments_of(pipe, [dataclasses.replace(job, image=None, image_sha256=None, prompt=job.prompt or " ")])
        given = {"stg": call.pop("stg")} if "stg" in call else {}
        bound = bound_call(installed, inspect.signature(self.kind.__call__).bind_partial, pipe, **call)
        settled(pipe, installed, bound.arguments, given)

    @functools.cached_property
    def skeleton(self) -> Any:
        """The pipeline without its weights, or None where that cannot be had."""
        if self.pipe is not None:
            return self.pipe
        if self.folder is None and (self.build is not None or self.trusted):
            return None

        def find(file: str) -> Path | None:
            if self.folder is not None:
                return self.folder / file if (self.folder / file).is_file() else None
            return _of_hub(self.name, file, self.revision)

        return skeleton(self.kind, self.config, self.adapter.denoisers, find)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("skeleton", "checked")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "checked": set()})

    def _own_check(self, job: Job) -> None:
        """The pipeline's own check of its arguments, as far as it can be had without the weights."""
        checks = getattr(self.kind, "check_inputs", None)
        if checks is None:
            return
        frames = frames_argument(self.parameters)
        call = {name: p.default for name, p in self.parameters.items() if p.default is not p.empty}
        given = {"width": job.width, "height": job.height, frames: job.num_frames, "num_inference_steps": job.steps}
        call |= {name: value for name, value in given.items() if value is not None}
        call |= {**job.pipeline, "prompt": job.prompt, "negative_prompt": job.negative_prompt}
        call |= {"image": None if job.image is None else _placeholder()}
        taken = list(inspect.signature(checks).parameters)[1:]
        try:
            checks(
                self.skeleton or object.__new__(self.kind),
                **{name: value for name, value in call.items() if name in taken},
            )
        except ValueError as error:
            raise SettingsError(f"{self.kind.__name__}: {error}") from None
        except (AttributeError, TypeError):
            # It asks for weights or for values that come from them: the call itself checks that again, for this job.
            return

    def fps(self, job: Job) -> float:
        """Frames in a second, as the call has them, or as the model was trained."""
        for name in RATES:
            if name in self.parameters:
                given = job.pipeline.get(name, self.parameters[name].default)
                if isinstance(given, (int, float)) and 0.1 <= given <= 240:
                    return float(given)
        fps = self.adapter.clips.fps
        return fps(self.config) if callable(fps) else fps

    def load(self, loading: Loading = USUAL) -> Any:
        """The pipeline, guided: a copy where it was handed over, which itself is left as it is."""
        if self.pipe is not None:
            return loading.prepared(copy.copy(self.pipe))
        revision = "" if Path(self.name).is_dir() else self.revision  # of the hub
        source = self.build or self.name
        return loading.load(source, trusted=self.trusted, exact=self.adapter.clips.exact, revision=revision)


def described(model: Any, *, trust: str | None = None) -> Model:
    """What a model is, by its name, its folder, or the pipeline itself.

    `trust` is the name of a model whose folder may bring code that is run. It has to be the model's own, in full.
    """
    import diffusers

    if not isinstance(model, (str, Path)):
        kind = type(model)
        _check_supported(kind.__name__)
        _check_graphs(model)
        accelerate(copy.copy(model), given_to(model), recipe=recipe_of(model))  # what is wrong is said now
        name = getattr(model, "name_or_path", None) or kind.__name__
        facts = dict(model.config)
        return Model(str(name), kind, model, config=facts, given=given_to(model), recipe=recipe_of(model))
    name = str(model)
    if trust is not None and trust != name:
        raise wrong("trust", trust, f"the name of the model, {name!r}, or none")
    if name in NAMED:
        named = NAMED[name]
        config = {} if named.folder is None else read_json(named.folder / "model_index.json")
        kind = getattr(diffusers, named.kind)
        return Model(name, kind, build=named.build, given=named.guidance, config=config, folder=named.folder)
    path = Path(name)
    if path.is_dir():
        name, index = str(path.resolve()), path / "model_index.json"
        if not index.is_file():
            raise wrong("model", str(path), "a folder with model_index.json, as save_pretrained makes it")
        if trust is None:
            check_folder(path)
    else:
        index = _index_of(name)
    config = read_json(index)
    declared = config.get("_class_name")
    if isinstance(declared, list) and trust is not None:
        declared = declared[-1]
    if not isinstance(declared, str):
        raise wrong("class in model_index.json", declared, f"a pipeline of diffusers; {BY_NAME}")
    _check_supported(declared)
    revision = fingerprint(path) if path.is_dir() else index.parent.name  # the hub's cache has a folder for each
    kind, folder = getattr(diffusers, declared), path.resolve() if path.is_dir() else None
    return Model(name, kind, trusted=trust is not None, revision=revision, config=config, folder=folder)


def _of_hub(name: str, file: str, revision: str) -> Path | None:
    """A small file of a model on the hub, or None where it has none of this name."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except (EntryNotFoundError, HfHubHTTPError, OSError):
        return None


def _index_of(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "model_index.json"))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise wrong("model", name, f"a folder, or the name of a model on the hub ({said})") from None


def _check_supported(name: str) -> None:
    if name not in ADAPTERS:
        near = ", ".join(difflib.get_close_matches(name, ADAPTERS, n=3, cutoff=0.0))
        raise UnsupportedPipelineError(f"pipeline: got {name}, expected one that stgfast knows, such as {near}")


def _check_graphs(pipe: Any) -> None:
    """Batches have threads of their own, and a CUDA graph is of the thread that recorded it."""
    installed = getattr(pipe, INSTALLED, None)
    compilation = dict(installed.execution.compilation or {}) if installed else {}
    options = compilation.get("options") or {}
    if compilation.get("mode") in ("reduce-overhead", "max-autotune") or options.get("triton.cudagraphs"):
        raise wrong("compile of the pipeline", compilation, "no CUDA graphs, as with 'max-autotune-no-cudagraphs'")


def _takes_tensors_alone(parameter: inspect.Parameter) -> bool:
    annotation = parameter.annotation
    words = set(re.findall(r"\w+", annotation.__name__ if isinstance(annotation, type) else str(annotation)))
    tensors = {"Tensor", "FloatTensor", "LongTensor"}
    return bool(words & tensors) and words <= tensors | {
        "torch",
        "None",
        "NoneType",
        "list",
        "List",
        "Optional",
        "Union",
    } | {"typing"}


@functools.cache
def _placeholder() -> Any:
    from PIL import Image

    return Image.new("RGB", (16, 16))
