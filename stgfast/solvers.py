"""Another solver over the pipeline's own sigmas: fewer steps for the same distance from a converged clip.

A solver of higher order uses the predictions of earlier steps. It takes the noise levels of the pipeline's own
scheduler, including its shift, so nothing else in the pipeline changes.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from stgfast.errors import SettingsError, wrong
from stgfast.integrations import ADAPTERS, known_class

Pipe = TypeVar("Pipe")
REPLACED = "_stgfast_scheduler"  # the attribute of a pipeline that holds its former scheduler
TAKES = "FlowMatchEulerDiscreteScheduler"
SOLVERS = {  # class in diffusers, order
    "unipc": ("UniPCMultistepScheduler", 2),  # arXiv 2302.04867
    "unipc3": ("UniPCMultistepScheduler", 3),
    "dpm++": ("DPMSolverMultistepScheduler", 2),  # arXiv 2211.01095
}
NO_SIGNAL = 1.0 - 1e-6  # the solver takes the logarithm of the remaining signal


def solver(pipe: Pipe, name: str) -> Pipe:
    """Replace a pipeline's solver. `restore` undoes it.

    The pipeline's scheduler must be diffusers' flow-matching Euler scheduler, which most video models have. Its sigmas
    stay as they are.

    Args:
        pipe: the pipeline, accelerated or not. It is changed in place.
        name: `"unipc"` or `"unipc3"` for UniPC of order 2 or 3, or `"dpm++"` for DPM-Solver++ of order 2.

    Returns:
        The same pipeline.

    Raises:
        SettingsError: the name is unknown, or the pipeline has another scheduler.

    Example:
        >>> pipe = stgfast.solver(pipe, "unipc")
    """
    check_solver(pipe, name)
    parts = vars(pipe)
    own = parts.get(REPLACED, parts["scheduler"])
    # `pipe.scheduler = ...` would also change how the pipeline is saved.
    parts |= {"scheduler": _flow(SOLVERS[name][0])(own, SOLVERS[name][1]), REPLACED: own}
    return pipe


def check_solver(pipe: Any, name: str) -> None:
    """Raise if this solver cannot make the pipeline's steps."""
    if name not in SOLVERS:
        raise wrong("solver", name, f"one of {', '.join(SOLVERS)}")
    known = known_class(type(pipe))
    reason = "" if known is None else ADAPTERS[known.__name__].own_solver
    if reason:
        raise SettingsError(f"solver of {type(pipe).__name__}: got {name!r}, expected its own: {reason}")
    own = vars(pipe).get(REPLACED, vars(pipe)["scheduler"])
    if type(own).__name__ != TAKES:
        raise SettingsError(f"scheduler of {type(pipe).__name__}: got {type(own).__name__}, expected {TAKES}")
    for setting in ("invert_sigmas", "stochastic_sampling"):
        if own.config.get(setting):
            raise SettingsError(f"scheduler of {type(pipe).__name__}: got {setting}=True, which {name} cannot follow")


def own_solver(pipe: Any) -> None:
    """Give a pipeline its own scheduler back, if it has another solver."""
    if REPLACED in vars(pipe):
        vars(pipe)["scheduler"] = vars(pipe).pop(REPLACED)


@functools.cache
def _flow(solver: str) -> Any:
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

    class FlowSolver(getattr(diffusers, solver)):  # type: ignore[misc]  # of a library without types
        """A solver over the sigmas of another scheduler. Like that one, it computes in float32."""

        def __init__(self, own: Any, order: int):
            flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": order}
            super().__init__(num_train_timesteps=own.config.num_train_timesteps, **flow)
            # Pipelines read from here how to shift by the size of a clip.
            self.register_to_config(**{**own.config, **flow})
            self.own = own

        def __reduce__(self) -> Any:
            return _remade, (solver, self.own, self.config.solver_order), vars(self)

        @functools.wraps(diffusers.FlowMatchEulerDiscreteScheduler.set_timesteps)
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            self.own.set_timesteps(*args, **kwargs)
            if float(self.own.sigmas.max()) > 1:
                raise wrong("sigmas of the scheduler", float(self.own.sigmas.max()), "shares of noise, at most 1")
            dynamic = {"mu": 0.0} if self.config.use_dynamic_shifting else {}
            super().set_timesteps(len(self.own.timesteps), **dynamic)  # everything for the start of a run
            self.timesteps = self.own.timesteps
            self.sigmas = self.own.sigmas.cpu().clamp(max=NO_SIGNAL)

        def scale_noise(self, *args: Any, **kwargs: Any) -> Any:
            return self.own.scale_noise(*args, **kwargs)

        def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True, **others: Any) -> Any:
            others.pop("generator", None)  # only for steps that draw noise
            unknown = [name for name, given in others.items() if given is not None]
            if unknown:
                raise wrong("step of the scheduler", unknown, f"none of these, which {solver} does not know")
            (made,) = super().step(model_output.float(), timestep, sample.float(), return_dict=False)
            made = made.to(model_output.dtype)
            return SchedulerOutput(prev_sample=made) if return_dict else (made,)

    return FlowSolver


def _remade(solver: str, own: Any, order: int) -> Any:
    return _flow(solver)(own, order)
