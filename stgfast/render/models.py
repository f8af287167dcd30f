"""Which pipeline a model is, and the arguments of its calls, known before it is loaded."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stgfast import toy
from stgfast.errors import SettingsError, UnsupportedPipelineError, flat, wrong
from stgfast.guidance import Guidance
from stgfast.install import accelerate
from stgfast.installed import INSTALLED
from stgfast.integrations import ADAPTERS
from stgfast.integrations.spec import Adapter
from stgfast.queue.job import Job
from stgfast.recipes import Recipe
from stgfast.render.calls import FRAMES, RATES
from stgfast.render.loading import BY_NAME, USUAL, Loading, check_folder, fingerprint, given_to, read_json, recipe_of
from stgfast.render.skeleton import skeleton


@dataclass(frozen=True)
class Named:
    """A model with a name of its own.

    Attributes:
        build: makes the pipeline, accelerated.
        kind: its class in diffusers.
        guidance: the guidance with which it is accelerated.
        job: default fields of its jobs.
        folder: its files, if there are any.
    """

    build: Callable[[], Any]
    kind: str
    guidance: Guidance
    job: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def _toy() -> Any:
    return accelerate(toy.pipeline(), toy.GUIDANCE)


NAMED = {"toy": Named(_toy, "LTXPipeline", toy.GUIDANCE, toy.JOB, toy.FOLDER)}


@dataclass(frozen=True)
class Model:
    """What is known about a model before its weights: its name and the class of its pipeline."""

    name: str
    kind: type[Any]
    pipe: Any = None
    trusted: bool = False
    parameters: dict[str, inspect.Parameter] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set, compare=False)  # calls that were found right
    # Recipes of jobs that were checked for this model.
    recipes: dict[str, Recipe] = field(default_factory=dict, compare=False)
    given: Guidance | None = None  # the guidance of the pipeline object
    build: Callable[[], Any] | None = None  # makes a named model
    recipe: Recipe | None = None  # the recipe of the pipeline object
    revision: str = ""  # of its files: that of the hub, or a fingerprint
    config: Mapping[str, Any] = field(default_factory=dict)  # of the pipeline
    folder: Path | None = None  # of its files, if they are on this machine

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

    def settled(self, job: Job) -> Job:
        """The job with everything that it leaves open: the settings of a named model, and the guidance of the
        pipeline or the default of the model, which may change between versions. Pipelines that ask for perturbed
        branches themselves have their own settings instead. A recipe is replaced by its solver, steps and reuse.
        """
        job = self.completed(job)
        recipe, guidance = self._recipe_of(job), job.guidance or self.given
        if guidance is None and self.adapter.announced is None:
            guidance = self.adapter.defaults
        if recipe is not None:
            steps, guidance = recipe.for_job(self.adapter, job.steps, guidance, job.pipeline)
            job = dataclasses.replace(job, steps=steps, recipe=None, solver=recipe.solver)
        return dataclasses.replace(job, guidance=guidance, model="")

    def completed(self, job: Job) -> Job:
        """The job with the settings of a named model."""
        own = dict(NAMED[self.name].job) if self.name in NAMED else {}
        if job.recipe is not None or self.recipe is not None:
            own.pop("steps", None)
        changes = {name: value for name, value in own.items() if getattr(job, name) in (None, {})}
        return dataclasses.replace(job, **changes) if changes else job

    def _recipe_of(self, job: Job) -> Recipe | None:
        """The recipe of a job: its own, or that of a pipeline object."""
        if job.recipe is None:
            if job.solver and self.recipe is not None:
                raise wrong("solver", job.solver, "none: the pipeline has a recipe")
            return self.recipe
        if self.recipe is not None:
            raise SettingsError("recipe: got one, expected none: the pipeline has another")
        key = json.dumps(job.recipe)
        if key not in self.recipes:  # many jobs share it
            recipe = Recipe.from_dict(job.recipe)
            if self.skeleton is None:
                recipe.check_pipeline(self.adapter.pipeline)
            else:
                recipe.check_model(self.skeleton, self.adapter)
            self.recipes[key] = recipe
        return self.recipes[key]

    def made(self, loading: Loading) -> dict[str, Any]:
        """What else decides a clip: the dtype, and the version of the model's files."""
        own = None if self.build is None else "float32"
        if self.pipe is not None:
            layout, *_ = self.adapter.layouts(self.pipe).values()
            own = str(layout.denoiser.dtype).removeprefix("torch.")
        made = {"dtype": loading.number_type(own), "revision": self.revision}
        return {name: value for name, value in made.items() if value}

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

    @functools.cached_property
    def skeleton(self) -> Any:
        """The pipeline without weights, or None if it cannot be built."""
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

    def fps(self, job: Job) -> float:
        """Frames per second of the call, or of the model's training."""
        for name in RATES:
            if name in self.parameters:
                given = job.pipeline.get(name, self.parameters[name].default)
                if isinstance(given, (int, float)) and 0.1 <= given <= 240:
                    return float(given)
        fps = self.adapter.clips.fps
        return fps(self.config) if callable(fps) else fps

    def load(self, loading: Loading = USUAL) -> Any:
        """The pipeline, guided. A pipeline object is copied, and stays as it is."""
        if self.pipe is not None:
            return loading.prepared(copy.copy(self.pipe))
        revision = "" if Path(self.name).is_dir() else self.revision  # of the hub
        source = self.build or self.name
        return loading.load(source, trusted=self.trusted, exact=self.adapter.clips.exact, revision=revision)


def described(model: Any, *, trust: str | None = None) -> Model:
    """What a model is, from its name, its folder, or a pipeline object.

    `trust` is the full name of a model whose folder may contain code that is run.
    """
    import diffusers

    if not isinstance(model, (str, Path)):
        kind = type(model)
        _check_supported(kind.__name__)
        _check_graphs(model)
        accelerate(copy.copy(model), given_to(model), recipe=recipe_of(model))  # errors are raised now
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
    # The hub's cache has a folder for each revision.
    revision = fingerprint(path) if path.is_dir() else index.parent.name
    kind, folder = getattr(diffusers, declared), path.resolve() if path.is_dir() else None
    return Model(name, kind, trusted=trust is not None, revision=revision, config=config, folder=folder)


def _of_hub(name: str, file: str, revision: str) -> Path | None:
    """A small file of a model on the hub, or None if it does not exist."""
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
        raise wrong("model", name, f"a folder, or the name of a model on the hub ({flat(error)})") from None


def _check_supported(name: str) -> None:
    if name not in ADAPTERS:
        near = ", ".join(difflib.get_close_matches(name, ADAPTERS, n=3, cutoff=0.0))
        raise UnsupportedPipelineError(f"pipeline: got {name}, expected one that stgfast knows, such as {near}")


def _check_graphs(pipe: Any) -> None:
    """Raise for CUDA graphs: batches have threads of their own, and a graph belongs to the thread that recorded it."""
    installed = getattr(pipe, INSTALLED, None)
    compilation = dict(installed.execution.compilation or {}) if installed else {}
    options = compilation.get("options") or {}
    if compilation.get("mode") in ("reduce-overhead", "max-autotune") or options.get("triton.cudagraphs"):
        raise wrong("compile of the pipeline", compilation, "no CUDA graphs, as with 'max-autotune-no-cudagraphs'")
