"""Restart sampling: noise is added to a nearly clean sample, which is then denoised again.

Algorithm 3 of arXiv 2411.18664; Xu et al., arXiv 2306.14878. A sample at a step is `alpha x0 + sigma eps`, with alpha
and sigma of that step. A sample that has reached t_min, step m of the schedule, goes back to t_max, step k:

    x_k = r x_m + sqrt(sigma_k^2 - r^2 sigma_m^2) eps,    r = alpha_k / alpha_m

and steps k to m-1 are made again, `times` times. Between steps the scheduler shows the long list of timesteps of the
run. During a step it is the stock scheduler with its own short list, so that no solver sees a timestep twice.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stgfast.errors import SettingsError, wrong

Generators = torch.Generator | Sequence[torch.Generator]
# What solvers store about earlier steps. A restart resets it to its state at the start of the run.
HISTORY = ("model_outputs", "timestep_list", "lower_order_nums", "last_sample", "prev_derivative", "dt")
SNAP = 1e-3  # how far t_max may be beyond the first step: some schedules start slightly below 1


def flow(scheduler: Any) -> tuple[Tensor, Tensor]:
    """Flow matching: (1 - s) x0 + s eps. Mochi counts s in the other direction."""
    s = scheduler.sigmas.double().cpu()
    s = 1 - s if scheduler.config.get("invert_sigmas") else s
    return 1 - s, s


def exploding(scheduler: Any) -> tuple[Tensor, Tensor]:
    """EDM: x0 + s eps."""
    s = scheduler.sigmas.double().cpu()
    return torch.ones_like(s), s


def flow_euler(scheduler: Any) -> tuple[Tensor, Tensor]:
    """Cosmos uses the flow-matching class with the sigmas of EDM."""
    return exploding(scheduler) if scheduler.sigmas.max() > 1 + SNAP else flow(scheduler)


def preserving(scheduler: Any) -> tuple[Tensor, Tensor]:
    """Variance preserving, by s = sigma / alpha. The same classes also do flow matching."""
    if scheduler.config.get("use_flow_sigmas"):
        return flow(scheduler)
    s = scheduler.sigmas.double().cpu()
    alpha = (s**2 + 1).rsqrt()
    return alpha, s * alpha


def cumulative(scheduler: Any) -> tuple[Tensor, Tensor]:
    """Variance preserving, by a table of alpha^2 over the training timesteps."""
    squares = scheduler.alphas_cumprod.double().cpu()
    last = torch.tensor([float(getattr(scheduler, "final_alpha_cumprod", 1.0))], dtype=torch.float64)
    squares = torch.cat([squares[scheduler.timesteps.long().cpu()], last])
    return squares.sqrt(), (1 - squares).sqrt()


# alpha and sigma of every step of a scheduler's schedule, and of its end.
MARGINALS: dict[str, Callable[[Any], tuple[Tensor, Tensor]]] = {
    "FlowMatchEulerDiscreteScheduler": flow_euler,
    "FlowMatchHeunDiscreteScheduler": flow,
    "UniPCMultistepScheduler": preserving,
    "DPMSolverMultistepScheduler": preserving,
    "DDIMScheduler": cumulative,
    "DDPMScheduler": cumulative,
    "CogVideoXDDIMScheduler": cumulative,
    "CogVideoXDPMScheduler": cumulative,
    "EulerDiscreteScheduler": exploding,
    "EulerAncestralDiscreteScheduler": exploding,
    "HeunDiscreteScheduler": exploding,
}


@dataclass(frozen=True)
class Settings:
    t_min: float
    t_max: float
    times: int
    generator: Generators | None


@dataclass
class Run:
    """One run over a schedule of n steps.

    Attributes:
        first, last: k and m: steps k to m-1 are made again.
        order: for each step of the run, its step in the schedule.
        ratio, std: r, and the standard deviation of the added noise.
        history: the state of the solver at the start of the run.
    """

    n: int
    first: int
    last: int
    order: list[int]
    ratio: float
    std: float
    history: dict[str, Any]
    seeds: Tensor | None = None
    generators: list[torch.Generator] = field(default_factory=list)

    def goes_back(self, position: int) -> bool:
        """Whether noise is added after this step of the run."""
        return position + 1 < len(self.order) and self.order[position + 1] != self.order[position] + 1

    def lengthened(self, values: Tensor) -> Tensor:
        """A list with one entry for each step of the schedule, as one with an entry for each step of the run. Further
        entries stay.
        """
        again = [values[self.first : self.last]] * ((len(self.order) - self.n) // (self.last - self.first))
        return torch.cat([values[: self.last], *again, values[self.last :]])

    def shortened(self, values: Tensor) -> Tensor:
        return torch.cat([values[: self.last], values[len(self.order) - self.n + self.last :]])

    def noise(self, sample: Tensor, generator: Generators | None) -> Tensor:
        if generator is None and not self.generators:
            assert self.seeds is not None
            self.generators = [torch.Generator().manual_seed(seed) for seed in self.seeds.tolist()]
        return draw(sample, self.generators if generator is None else generator)


def restart(scheduler: Any, *, t_min: float, t_max: float, times: int = 1, generator: Generators | None = None) -> Any:
    """Make a scheduler that restarts: it adds noise to go back from `t_min` to `t_max`, and denoises that part again.

    `t_min` and `t_max` are fractions of noise, sigma / (alpha + sigma) for a sample alpha x0 + sigma eps: 0 is clean, 1
    is noise only. Under flow matching this is sigma. Each selects the nearest step of the schedule. The steps between
    them are made again, so the run gets longer.

    The noise comes from the generator that the pipeline passes to the scheduler's step, if it does (CogVideoX and Latte
    do), else from `generator`, else from one generator for each sample, seeded by the sample's first latents. So a call
    with the same generators or latents gives the same result, a sample does not depend on those beside it, and torch's
    global random state is not used.

    Args:
        scheduler: the pipeline's scheduler. It is not changed.
        t_min, t_max: where to restart, and how far to go back.
        times: the number of restarts.
        generator: one generator, or a list with one for each sample.

    Returns:
        The new scheduler.

    Example:
        >>> pipe.scheduler = stgfast.restart(pipe.scheduler, t_min=0.3, t_max=0.6, times=2)
    """
    stock = getattr(type(scheduler), "_stock", type(scheduler))
    if stock.__name__ not in MARGINALS or not hasattr(scheduler, "config"):
        raise wrong("scheduler to restart", stock.__name__, f"one of {', '.join(sorted(MARGINALS))}")
    if getattr(scheduler, "solver_p", None) is not None:
        raise wrong("solver_p of the scheduler to restart", type(scheduler.solver_p).__name__, "None")
    for name, t in (("t_min", t_min), ("t_max", t_max)):
        if isinstance(t, bool) or not isinstance(t, (int, float)) or not math.isfinite(t):
            raise wrong(name, t, "a share of noise from 0 (clean) to 1 (only noise)")
    if not 0 <= t_min < t_max <= 1:
        raise wrong("t_min and t_max", (t_min, t_max), "shares of noise with 0 <= t_min < t_max <= 1")
    if isinstance(times, bool) or not isinstance(times, int) or times < 1:
        raise wrong("times", times, "a whole number, 1 or more")
    given = [generator] if isinstance(generator, torch.Generator) else generator
    if given is not None and not (
        isinstance(given, (list, tuple)) and given and all(isinstance(one, torch.Generator) for one in given)
    ):
        raise wrong("generator", generator, "a torch.Generator, a list with one for every sample, or None")
    restarting = copy.deepcopy(scheduler)
    restarting.__class__ = _restarting_class(stock, Settings(t_min, t_max, times, generator))
    restarting._run = None
    return restarting


class Restarting:
    """The methods in which a restarting scheduler differs from its stock class."""

    # Both are in the class, so that a copied or newly made scheduler restarts in the same way.
    _stock: Any
    _settings: Settings
    _run: Run | None = None
    _step_index: int | None  # the step of the run
    timesteps: Tensor
    order: int

    def restarts(self, **schedule: Any) -> int:
        """The number of steps that restarts add to the schedule that `set_timesteps` makes from these arguments."""
        probe: Any = copy.deepcopy(self)
        probe.set_timesteps(**schedule)
        return int(probe.repeated)

    @property
    def repeated(self) -> int:
        """The number of steps that restarts add to the current schedule."""
        return 0 if self._run is None else len(self._run.order) - self._run.n

    def _lengthen(self) -> None:
        """Runs after the stock `set_timesteps`."""
        n = len(self.timesteps)
        alpha, sigma = MARGINALS[self._stock.__name__](self)
        shares = (sigma / (alpha + sigma)).tolist()
        # Heun's method evaluates the model twice for a step, and only between steps is there a sample.
        whole = [position for position in range(n + 1) if position % self.order == 0 or position == n]
        t_min, t_max, times = self._settings.t_min, self._settings.t_max, self._settings.times
        if t_max > shares[0] + SNAP:
            raise wrong("t_max", t_max, f"at most {shares[0]:.4g}, the share of noise at the run's first step")
        k, m = (min(whole, key=lambda position: abs(shares[position] - t)) for t in (t_max, t_min))
        if k >= m or shares[k] <= shares[m] or alpha[k] < -SNAP or alpha[m] <= 0:
            steps = ", ".join(f"{shares[position]:.4g}" for position in whole)
            raise wrong("t_min and t_max", (t_min, t_max), f"a step between them; this run's are at {steps}")
        ratio = float(alpha[k] / alpha[m])
        std = math.sqrt(max(0.0, float(sigma[k]) ** 2 - (ratio * float(sigma[m])) ** 2))
        order = [*range(m), *[*range(k, m)] * times, *range(m, n)]
        history = {name: _copied(vars(self)[name]) for name in HISTORY if name in vars(self)}
        self._run = run = Run(n, k, m, order, ratio, std, history)
        for name in self._lists():
            vars(self)[name] = run.lengthened(vars(self)[name])
        self._step_index = None

    def _lists(self) -> list[str]:
        return [name for name in ("timesteps", "sigmas") if name in vars(self)]

    @contextmanager
    def _short(self, run: Run) -> Iterator[None]:
        """Use the stock scheduler's own schedule within the block. The long lists may have been changed in place."""
        long = {name: vars(self)[name] for name in self._lists()}
        vars(self).update({name: run.shortened(values) for name, values in long.items()})
        try:
            yield
        finally:
            vars(self).update(long)

    def _init_step_index(self, timestep: Any) -> None:
        """Let the stock scheduler find the first step of a run, among timesteps that are all different."""
        if self._run is None:
            self._stock._init_step_index(self, timestep)
            return
        with self._short(self._run):
            if hasattr(self._stock, "_init_step_index"):
                self._stock._init_step_index(self, timestep)
            else:
                self._step_index = int((self.timesteps == timestep).nonzero()[0, 0])
        assert self._step_index is not None
        self._check_begin(self._run, self._step_index)

    def _check_begin(self, run: Run, begin: int) -> None:
        if begin > run.first:
            raise SettingsError(
                f"first step of the run: got step {begin}, expected at most {run.first}, at t_max, to which restarts "
                f"go back; ask for more of the schedule, or for a smaller t_max"
            )

    def _begin(self, run: Run, arguments: Mapping[str, Any]) -> None:
        """Find everything that is wrong before the first step."""
        sample, timestep = arguments["sample"], arguments["timestep"]
        if self._step_index is None:
            self._init_step_index(timestep)
        generator = self._generator(arguments)
        if isinstance(generator, (list, tuple)) and len(generator) not in (1, len(sample)):
            raise wrong("generators", len(generator), f"one, or one for each of {len(sample)} samples")
        times = arguments.get("per_token_timesteps")
        if times is not None and bool(((times != 0) & (times < timestep - SNAP)).any()):
            # Such a token joins later in the run: how far it would have to go back is not known here.
            loose = round(float(times[(times != 0) & (times < timestep - SNAP)][0]), 3)
            raise wrong(
                "time of a token at the first step", loose, f"0, or {float(timestep):g}: conditions of strength 1"
            )
        run.seeds = seeds(sample)

    def _generator(self, arguments: Mapping[str, Any]) -> Generators | None:
        given: Generators | None = arguments.get("generator")
        return self._settings.generator if given is None else given

    def _run_step(self, run: Run, given: inspect.BoundArguments) -> Any:
        """Make one step of the run, and add noise if a restart follows."""
        arguments = given.arguments
        if run.seeds is None:
            self._begin(run, arguments)
        position = self._step_index
        assert position is not None
        if position > 0 and run.goes_back(position - 1):
            got, expected = float(arguments["timestep"]), float(self.timesteps[position])
            if got != expected:  # the pipeline began in the middle, where the same timestep occurs again
                raise wrong("timestep after a restart", got, f"{expected}: the run has to begin at or before t_max")
            if "old_pred_original_sample" in arguments:  # history that CogVideoX's pipelines store for the solver
                arguments["old_pred_original_sample"] = arguments["timestep_back"] = None
        with self._short(run):
            self._step_index = run.order[position]
            output = self._stock.step(*given.args, **given.kwargs)
        self._step_index = position + 1
        if not run.goes_back(position):
            return output
        vars(self).update({name: _copied(value) for name, value in run.history.items()})
        x = output[0] if isinstance(output, tuple) else output.prev_sample
        noise = run.noise(x, self._generator(arguments))
        x = (run.ratio * x.to(noise.dtype) + run.std * noise).to(x.dtype)
        if isinstance(output, tuple):
            return (x, *output[1:])
        output.prev_sample = x
        return output


def _restarting_class(stock: Any, settings: Settings) -> Any:
    """Make a subclass with the same name. Pipelines look at a scheduler's class, methods and their arguments, and save
    the name of the class. The saved scheduler is the stock one.
    """
    signature = inspect.signature(stock.step)

    @functools.wraps(stock.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        self._run = None
        stock.set_timesteps(self, *args, **kwargs)
        self._lengthen()

    @functools.wraps(stock.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._run is None:
            return stock.step(self, *args, **kwargs)
        return self._run_step(self._run, signature.bind(self, *args, **kwargs))

    body = {"set_timesteps": set_timesteps, "step": step, "_stock": stock, "_settings": settings}
    if hasattr(stock, "set_begin_index"):

        @functools.wraps(stock.set_begin_index)
        def set_begin_index(self: Any, begin_index: int = 0) -> None:
            if self._run is not None:
                self._check_begin(self._run, begin_index)
            stock.set_begin_index(self, begin_index)

        body["set_begin_index"] = set_begin_index
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
    return type(stock.__name__, (Restarting, stock), {**body, **names})


def seeds(sample: Tensor) -> Tensor:
    """A seed for each sample, from all of its bits. The sum of integers does not depend on their order."""
    bits = sample.detach().float().reshape(len(sample), -1).view(torch.int32).long()
    weights = torch.arange(1, bits.shape[1] + 1, device=bits.device) * 2654435761 % 2147483629
    return (bits * weights).sum(dim=1) % 2147483647


def draw(sample: Tensor, generator: Generators) -> Tensor:
    """Noise for a sample, with one generator for all or one for each; in float32 or wider."""
    dtype = torch.promote_types(sample.dtype, torch.float32)
    each = [generator] if isinstance(generator, torch.Generator) else list(generator)
    rows = len(sample) // len(each)
    noise = [torch.randn((rows, *sample.shape[1:]), generator=one, device=one.device, dtype=dtype) for one in each]
    return torch.cat([part.to(sample.device) for part in noise])


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value
