"""Insert deliberate faults into a copy of the package, one at a time, and run the tests that should fail.

    python -m tests.faults              all faults, two at a time: a quarter of an hour
    python -m tests.faults rows lock    faults with one of these words

A fault is a text that occurs once in a file, its replacement, and the tests that should fail. The exit code is the
number of faults that no test noticed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FAMILIES = "tests/integrations/test_families.py -k 'Mochi or LTX or Wan-'"
SECONDS = 300


class Fault(NamedTuple):
    what: str
    file: str
    text: str
    instead: str
    tests: str


FAULTS = [
    # Processes of one clip
    Fault(
        "a rank that computes more than it has to",
        "ranks/division.py",
        "if loads and (max(loads), sum(loads)) >= least:",
        "if loads and (sum(loads), max(loads)) >= least:",
        "tests/ranks/test_division.py",
    ),
    Fault(
        "the same prompts on every rank",
        "ranks/shared.py",
        "slice(division.part(ranks.rank) * each, (division.part(ranks.rank) + 1) * each)",
        "slice(0, each)",
        "tests/ranks/test_clips.py -k plain_method",
    ),
    Fault(
        "predictions that are not sent",
        "ranks/shared.py",
        "self.ranks.spread(sent)",
        "self.ranks.spread(sent[:0])",
        "tests/ranks/test_clips.py -k plain_method",
    ),
    Fault(
        "something handed out that counts",
        "divided.py",
        "self._alike.new_zeros(cast",
        "self._alike.new_ones(cast",
        "tests/ranks/test_clips.py -k plain_method",
    ),
    Fault(
        "ranks that may be at different places",
        "ranks/wire.py",
        "if len(places) == 1:",
        "if places:",
        "tests/ranks/test_endings.py -k begin_again",
    ),
    Fault(
        "a failure that others wait for",
        "ranks/wire.py",
        "self._tell(error) if self._depth == 1 else None",
        "self._tell(error) if self._depth == 2 else None",
        "tests/ranks/test_endings.py -k begin_again",
    ),
    Fault(
        "all tokens for rows that pass the block which takes a shard",
        "batching/stack.py",
        "spread = as_spread(arguments) if step.keep or",
        "spread = as_spread(arguments) if",
        "tests/ranks/test_context.py",
    ),
    Fault(
        "a blur within a shard",
        "batching/attention.py",
        "if context is not None:",
        "if context is None:",
        "tests/ranks/test_context.py tests/integrations/test_blur.py",
    ),
    # One call of an attention for all rows
    Fault(
        "rows of the wrong input",
        "batching/one_call.py",
        "source=[one * each + i for one in self.source for i in range(each)]",
        "source=[one * each for one in self.source for i in range(each)]",
        "tests/integrations/test_one_call.py -k 'Latte-float32'",
    ),
    Fault(
        "identity rows that attend",
        "batching/one_call.py",
        "[flag for flag in self.masked for _ in range(each)]",
        "[False for flag in self.masked for _ in range(each)]",
        "tests/batching/test_one_call.py",
    ),
    Fault(
        "a size of rows that is kept from before",
        "batching/one_call.py",
        "return args[0], (self.after, *sizes[1:])",
        "return args[0], (self.before, *sizes[1:])",
        "tests/integrations/test_one_call.py -k 'CogVideoX-float32'",
    ),
    Fault(
        "a mask that is lost",
        "batching/one_call.py",
        "bias=scores.mask if keys is None else None",
        "bias=None",
        "tests/integrations/test_one_call.py -k 'HunyuanVideo15-float32 or HunyuanVideo-float32'",
    ),
    Fault(
        "a scale that is lost",
        "batching/one_call.py",
        "scale=scores.scale",
        "scale=0.5",
        "tests/batching/test_one_call.py",
    ),
    Fault(
        "other rows of a processor that is not known",
        "batching/one_call.py",
        'return _processor(unwrapped(attention)).__module__.split(".")[0] == LIBRARY',
        "return True",
        "tests/batching/test_one_call.py",
    ),
    Fault(
        "what another processor does afterwards",
        "batching/attention.py",
        "if identity is identity_attention and not of_library(module) and not unfit(module):",
        "if False:",
        "tests/batching/test_one_call.py",
    ),
    Fault(
        "rows that came apart taken for one",
        "batching/attention.py",
        "self.inputs = range(rows)",
        "pass",
        "tests/integrations/test_one_call.py -k 'Diffusion and XL-float32'",
    ),
    Fault(
        "a call of another thread that is answered",
        "batching/sdpa.py",
        "    if answer is None:\n        return plain(**given)",
        "    if answer is None:\n        return given['value']",
        "tests/batching/test_sdpa.py",
    ),
    Fault(
        "a backend left in the registry",
        "batching/sdpa.py",
        "backends[name] = backends[name].args[0]",
        "pass",
        "tests/batching/test_sdpa.py",
    ),
    Fault(
        "a chosen backend that is not asked",
        "batching/sdpa.py",
        "return answer(_scores(attend, as_given,",
        "return answer(_scores(None, as_given,",
        "tests/batching/test_one_call.py",
    ),
    Fault(
        "one call where more is projected",
        "batching/one_call.py",
        "PROJECTIONS * inputs <= PROJECTIONS * plain + masked",
        "PROJECTIONS * inputs >= PROJECTIONS * plain + masked",
        "tests/batching/test_one_call.py",
    ),
    # The fastest attention
    Fault(
        "a mask with a hole taken for a number",
        "batching/fastest.py",
        "if not right or not all(lengths):",
        "if not all(lengths):",
        "tests/batching/test_fastest.py",
    ),
    Fault(
        "queries that a mask leaves out",
        "batching/fastest.py",
        "row[:, length:] = 0.0",
        "pass",
        "tests/batching/test_fastest.py",
    ),
    Fault(
        "rows of another length",
        "kernels/backends.py",
        "each = [lengths[row] for row in where]",
        "each = list(lengths)[: len(where)]",
        "tests/kernels/test_attention.py -k sdpa",
    ),
    # Plans and rows
    Fault(
        "the order of kept groups",
        "batching/plan.py",
        "[same for *_, same in run] + [same for _, same in keep]",
        "[same for _, same in keep] + [same for *_, same in run]",
        "tests/batching",
    ),
    Fault(
        "a stack that is not full",
        "batching/plan.py",
        "if full or layer == depth - 1:",
        "if layer == depth - 1:",
        "tests/batching tests/integrations/test_latte.py",
    ),
    Fault(
        "a skipped block that runs", "batching/plan.py", "kind_of(mark).passes:", "not kind_of(mark):", "tests/batching"
    ),
    Fault(
        "neighbouring rows merged too far",
        "kernels/layout.py",
        "merged[-1].stop == start",
        "merged[-1].stop <= start",
        "tests/batching",
    ),
    Fault(
        "rows of a sample that has several",
        "batching/rows.py",
        "value[part.start * each : part.stop * each]",
        "value[part.start : part.stop]",
        "tests/integrations/test_latte.py tests/integrations/test_stable_video_diffusion.py",
    ),
    Fault(
        "a bound on rows that is exceeded",
        "batching/rows.py",
        "-(-rows // limit)",
        "max(1, rows // limit)",
        "tests/test_engine.py tests/batching/test_room.py",
    ),
    Fault(
        "packed tokens of another sample",
        "batching/rows.py",
        "for sample in samples[part]], dim=1)",
        "for sample in samples[: part.stop - part.start]], dim=1)",
        "tests/integrations/test_open_sora.py",
    ),
    Fault(
        "arguments taken for other groups",
        "batching/stack.py",
        "key = (name, step.rows_of, id(value))",
        "key = (name, (), id(value))",
        "tests/test_engine.py",
    ),
    # Running a stack
    Fault(
        "a mark along an axis that is dropped",
        "kinds/__init__.py",
        'return mark.axis in ("", axis)',
        'return mark.axis == ""',
        "tests/integrations/test_axes.py",
    ),
    Fault(
        "blocks that are left out",
        "batching/stack.py",
        "if self._done != self.layout.depth:",
        "if self._done > self.layout.depth:",
        "tests/test_install.py",
    ),
    Fault(
        "blocks out of order",
        "batching/stack.py",
        "if number != self._done:",
        "if number < 0:",
        "tests/test_robust.py tests/test_install.py tests/batching",
    ),
    Fault(
        "tokens of a video that come last",
        "kinds/blur.py",
        "if attention.video_last else 0",
        "if False else 0",
        "tests/integrations/test_blur.py tests/integrations/test_families.py -k 'blur and (CogVideoX or Flux)'",
    ),
    Fault(
        "attention that a block goes around",
        "batching/attention.py",
        "if changed and attention not in self.reached:",
        "if False:",
        "tests/test_robust.py -k goes_around",
    ),
    Fault(
        "a compiled module around an attention",
        "batching/attention.py",
        "as_written(arguments.module) if self.perturbed(self.marks) else plain)",
        "plain)",
        "tests/test_robust.py -k inside_of_a_layer",
    ),
    Fault(
        "identity rows in another order",
        "batching/attention.py",
        "back = spans([order.index(row) for row in range(rows)], 1)",
        "back = spans(range(rows), 1)",
        "tests/test_engine.py",
    ),
    Fault(
        "a device that a block's output is not on",
        "batching/stack.py",
        "piece if computed is None else piece.to(computed.device)",
        "piece",
        "tests/batching",
    ),
    # Replacements
    Fault(
        "stand-ins that stay",
        "batching/seam.py",
        "if not _held[module]:",
        "if _held[module] < 0:",
        "tests/test_install.py",
    ),
    Fault(
        "handlers that stay",
        "batching/seam.py",
        "_handlers.reset(token)",
        "pass",
        "tests/test_install.py tests/test_engine.py",
    ),
    Fault(
        "a forward of another library",
        "batching/seam.py",
        'return "" if home',
        'return "" if True or home',
        "tests/test_robust.py -k another_library",
    ),
    Fault(
        "a compiled forward that stays compiled",
        "batching/seam.py",
        "return inner._call_impl if forward is None else call",
        "return inner._call_impl",
        "tests/test_robust.py -k compiled_in_other_ways",
    ),
    # One step
    Fault(
        "a copy that is not noticed",
        "combining.py",
        "(len(held) == len(self.handed) and not self.run.adapter.early)",
        "(not self.run.adapter.early)",
        "tests/test_robust.py -k copies",
    ),
    Fault(
        "the sign of what is returned for u",
        "combining.py",
        "guided - scale * given",
        "guided + scale * given",
        "tests/integrations/test_families.py -k 'Cosmos'",
    ),
    Fault("one copy of g where two are read", "combining.py", "copies = len(self.calls[-1])", "copies = 1", FAMILIES),
    Fault(
        "a run that lost its guidance",
        "engine.py",
        "if (done, self.turn) != (steps, 0) and",
        "if False and",
        "tests/test_robust.py -k 'exchanged or module_raises or facts'",
    ),
    Fault(
        "a learned sigma of one branch",
        "combining.py",
        "combine(sigma, numbers, dtype=dtype)",
        "combine(sigma[:1], [1.0], dtype=dtype)",
        "tests/integrations/test_families.py -k 'Latte'",
    ),
    Fault(
        "the CFG result from the wrong side",
        "combining.py",
        "self.predictions[GUIDED] = uncond + scale",
        "self.predictions[GUIDED] = 0 * uncond + scale",
        "tests/integrations/test_stable_video_diffusion.py",
    ),
    # Guidance and schedules
    Fault(
        "weights of CFG exchanged",
        "guidance.py",
        "guided = {UNCOND: 1.0 - cfg, COND: cfg}",
        "guided = {COND: 1.0 - cfg, UNCOND: cfg}",
        FAMILIES,
    ),
    Fault(
        "the sign of a perturbation",
        "guidance.py",
        "total[name] = -scale",
        "total[name] = scale",
        "tests/test_guidance.py",
    ),
    Fault(
        "the first step of a range",
        "guidance.py",
        "if not self.start <= moment.progress < self.stop:",
        "if not self.start < moment.progress < self.stop:",
        "tests/test_guidance.py tests/test_engine.py",
    ),
    Fault(
        "a schedule one step late",
        "schedules.py",
        "schedule[moment.step * len(schedule) // moment.steps]",
        "schedule[moment.step - 1]",
        "tests/test_guidance.py tests/test_engine.py",
    ),
    Fault(
        "a level of sigma that is left out",
        "schedules.py",
        "if sigma >= level",
        "if sigma > level",
        "tests/test_guidance.py tests/integrations/test_methods.py -k sigma",
    ),
    Fault(
        "sigmas from the wrong end",
        "integrations/steps.py",
        "sigmas_of_scheduler(pipe)[-steps:]",
        "sigmas_of_scheduler(pipe)[:steps]",
        "tests/test_robust.py -k part_of",
    ),
    Fault(
        "sigmas that count data",
        "integrations/steps.py",
        "[1.0 - sigma for sigma in sigmas] if",
        "[0.0 + sigma for sigma in sigmas] if",
        "tests/test_robust.py -k shares",
    ),
    Fault(
        "differences kept one step too long",
        "spacing.py",
        "else step - computed[-1] >= spacing",
        "else step - computed[-1] > spacing",
        "tests/integrations/test_methods.py -k reuse",
    ),
    Fault(
        "a parabola that is a line",
        "reuse.py",
        "weight *= (step - other) / (one - other) if other != one else 1.0",
        "weight *= (step - other) / (one - other) if abs(other - one) == 1 else 1.0",
        "tests/integrations/test_methods.py -k reuse",
    ),
    Fault(
        "what was kept before noise was added",
        "combining.py",
        "if guidance.reuses and moment.step in run.noisier:",
        "if False:",
        "tests/integrations/test_methods.py -k restart",
    ),
    Fault(
        "refreshes that are not staggered",
        "reuse.py",
        "return WARM + number % spacing",
        "return WARM",
        "tests/integrations/test_methods.py -k reuse",
    ),
    Fault(
        "a branch that was off and is carried on",
        "reuse.py",
        "if self.order and self.asked.get(name, step) < step - 1:",
        "if False:",
        "tests/integrations/test_methods.py -k 'reuse and scale'",
    ),
    Fault(
        "sigmas of another schedule",
        "solvers.py",
        "self.timesteps = self.own.timesteps",
        "pass",
        "tests/test_solvers.py",
    ),
    Fault(
        "differences of another model",
        "reuse.py",
        "if model != self.model:",
        "if not self.model:",
        "tests/integrations/test_methods.py -k two_models",
    ),
    Fault(
        "a pass of LTX-2 that is kept as another's",
        "announced.py",
        "return KeptDifferences(guidance, dict.fromkeys(announced.perturbed, COND))",
        "return KeptDifferences(guidance, dict.fromkeys(announced.perturbed[:1], COND))",
        "tests/integrations/test_ltx2.py -k reuse",
    ),
    Fault(
        "a plain copy that is taken for a difference",
        "integrations/spec.py",
        "alike = {COND, *(name for name, part in self.perturbed.items() if part is None)}",
        "alike = {COND}",
        "tests/integrations/test_ltx2.py -k reuse",
    ),
    Fault(
        "named steps that are every step",
        "spacing.py",
        "return step in spacing if isinstance(spacing, tuple)",
        "return True if isinstance(spacing, tuple)",
        "tests/integrations/test_methods.py -k 'reuse or named'",
    ),
    Fault(
        "the wrong one of two denoisers",
        "integrations/spec.py",
        "below is not None and time < below",
        "False",
        "tests/integrations/test_methods.py -k two_models",
    ),
    Fault(
        "blocks that are carried on from another branch",
        "forecast.py",
        "added = iter(torch.cat(parts) for parts in zip(*made, strict=True))",
        "added = iter(torch.cat(parts[::-1]) for parts in zip(*made, strict=True))",
        "tests/integrations/test_forecast.py -k apart",
    ),
    Fault(
        "blocks that some branches are carried on of",
        "forecast.py",
        "computes = any(due(",
        "computes = all(due(",
        "tests/integrations/test_forecast.py -k while",
    ),
    Fault(
        "blocks of a branch that was off",
        "forecast.py",
        "if self.asked.get(name, step) < step - 1:",
        "if False:",
        "tests/integrations/test_forecast.py",
    ),
    Fault(
        "hidden states that are kept for nothing",
        "forecast.py",
        "return None if self.spacing == EVERY else self",
        "return self",
        "tests/integrations/test_forecast.py -k held",
    ),
    # Recipes
    Fault(
        "a recipe for another model",
        "recipes.py",
        "        mine = model_of(pipe, adapter)\n",
        "        mine = self.model\n",
        "tests/test_recipes.py",
    ),
    Fault(
        "a recipe for other steps",
        "recipes.py",
        "if asked != self.steps:",
        "if False:",
        "tests/test_recipes.py",
    ),
    Fault(
        "a solver of a recipe that stays",
        "install.py",
        "if before is not None and before.recipe is not None:",
        "if False:",
        "tests/test_recipes.py",
    ),
    Fault(
        "clips of a solver that are taken for others",
        "queue/job.py",
        'if name not in ("name", "image", "priority")',
        'if name not in ("name", "image", "priority", "solver")',
        "tests/test_recipes.py tests/queue/test_job.py",
    ),
    Fault(
        "clips of a solver by another one",
        "render/batch_run.py",
        "if name := self.batch.tasks[0].job.solver:",
        'if name := "":',
        "tests/render/test_several_models.py -k recipe",
    ),
    Fault(
        "clips of a model by another one",
        "queue/store.py",
        "AND (model = ? OR ? = '') AND (deaths",
        "AND (model = ? OR ? != 'x') AND (deaths",
        "tests/queue/test_store.py -k models tests/render/test_several_models.py",
    ),
    Fault(
        "a run that begins another model when it is to end",
        "render/rendering.py",
        "        self.ending = crew.stopping\n",
        "",
        "tests/render/test_several_models.py -k interrupted",
    ),
    Fault(
        "jobs that came when the last one was done",
        "render/rendering.py",
        "        self.planning.take_in(self.store)  # jobs added since the last check\n",
        "",
        "tests/render/test_several_models.py -k added",
    ),
    Fault(
        "a model that cannot be loaded, and the night with it",
        "render/rendering.py",
        "if self.claimed or self.interrupts or not",
        "if True or not",
        "tests/render/test_several_models.py",
    ),
    Fault(
        "a recipe that is given up too soon",
        "tune/search.py",
        "other.cost <= trial.cost and _ratio(other, trial) < MUCH",
        "_ratio(other, trial) < MUCH",
        "tests/tune/test_search.py",
    ),
    Fault(
        "a search that forgets",
        "tune/run.py",
        "if key not in self.known.rows:",
        "if True:",
        "tests/tune/test_run.py -k goes_on",
    ),
    # Kernels
    Fault(
        "a rescale without its other part",
        "kernels/reference.py",
        "deviations + (1.0 - rescale)) * guided",
        "deviations + rescale) * guided",
        "tests/kernels/test_reference.py",
    ),
    Fault(
        "a direction of length 0",
        "kernels/reference.py",
        "square.where(square != 0, 1.0)",
        "square",
        "tests/kernels/test_reference.py",
    ),
    Fault(
        "one key too many",
        "kernels/reference.py",
        "beyond = torch.arange(k.shape[2], device=device) >= kv_len",
        "beyond = torch.arange(k.shape[2], device=device) > kv_len",
        "tests/kernels/test_attention.py -k triton",
    ),
    Fault(
        "a blur that is too narrow",
        "kernels/blur.py",
        "math.ceil(6 * sigma) // 2",
        "math.ceil(3 * sigma) // 2",
        "tests/kernels/test_blur.py tests/integrations/test_blur.py",
    ),
    Fault(
        "the source of another row",
        "kernels/attention.py",
        "src = tl.load(source_ptr + row)",
        "src = tl.load(source_ptr + 0 * row)",
        "tests/kernels/test_attention.py -k triton",
    ),
    Fault(
        "a weight of the first branch twice",
        "kernels/combination.py",
        "*map(float, weights[1:]),",
        "*map(float, weights[:-1]),",
        "tests/kernels/test_combination.py -k every_count",
    ),
    Fault(
        "a share that is lost in place of left",
        "kernels/reference.py",
        "(1.0 - project.left) * lost",
        "project.left * lost",
        "tests/kernels/test_reference.py",
    ),
    Fault(
        "a direction of other branches",
        "kernels/combination.py",
        "along = [project.along[b] for b in order]",
        "along = list(project.along)",
        "tests/kernels/test_combination.py -k projected",
    ),
    Fault(
        "a formula that is not looked up",
        "combining.py",
        "lost.along.get(name, 0.0)",
        "lost.along.get(names[0], 0.0)",
        "tests/test_one_file.py tests/integrations/test_methods.py -k 'formula or relatives'",
    ),
    # Pipelines
    Fault(
        "a fused projection",
        "batching/values.py",
        'if getattr(attn, "fused_projections", False) else None',
        "if False else None",
        "tests/test_robust.py -k fused",
    ),
    Fault(
        "rows of an IP-Adapter",
        "integrations/families/flux.py",
        '"joint_attention_kwargs",',
        "",
        "tests/test_robust.py -k 'ip_adapter_of_flux'",
    ),
    Fault(
        "a scale of CFG that changes",
        "integrations/families/cogvideox.py",
        "math.cos(math.pi * progress**5.0)",
        "math.cos(math.pi * progress**4.0)",
        "tests/test_call.py -k dynamic",
    ),
    Fault(
        "what is made of an accelerated pipeline",
        "install.py",
        "return original(*args, **kwargs) if cls is guided",
        "return original(*args, **kwargs) if False",
        "tests/test_robust.py -k original",
    ),
    Fault(
        "a pipeline that is not restored",
        "install.py",
        "pipe.__class__ = installed.original",
        "pass",
        "tests/test_install.py",
    ),
    Fault("the paper's rescale", "call.py", "PAPER_RESCALE = 0.7", "PAPER_RESCALE = 0.5", "tests/test_call.py"),
    Fault(
        "memory without anything to spare",
        "batching/room.py",
        "SPARE * self._per_row",
        "self._per_row",
        "tests/batching/test_room.py",
    ),
    Fault(
        "noise of the way back",
        "restart.py",
        "x = (run.ratio * x.to(noise.dtype) + run.std * noise)",
        "x = (run.ratio * x.to(noise.dtype) + noise)",
        "tests/test_restart.py -k marginal",
    ),
    # Rendering
    Fault(
        "two models in memory at once",
        "render/run.py",
        "gc.collect()  # this process loads",
        "pass  # this process loads",
        "tests/render/test_several_models.py -k previous_model",
    ),
    Fault(
        "a job that two runners have",
        "queue/store.py",
        'f"{change} WHERE id = ? AND runner = ?", (*values.values(), *mine)',
        "f\"{change} WHERE id = ? AND ? != ''\", (*values.values(), *mine)",
        "tests/queue/test_store.py",
    ),
    Fault(
        "a lock that is not taken",
        "queue/state.py",
        "fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))",
        "pass",
        "tests/queue/test_store.py",
    ),
    Fault(
        "somebody else's file that is written over",
        "queue/placing.py",
        "if os.path.lexists(final):",
        "if False:",
        "tests/render/test_files.py tests/queue/test_store.py",
    ),
    Fault(
        "a name that runs as code",
        "pages/__init__.py",
        'text.replace("<", "\\\\u003c")',
        'text.replace("\\0", "")',
        "tests/render/test_gallery.py",
    ),
    Fault(
        "a page of another site that asks",
        "serve/guard.py",
        'if site not in ("none", "same-origin") and',
        "if site is None and",
        "tests/serve/test_guard.py",
    ),
    Fault(
        "another site's name for this machine",
        "serve/guard.py",
        "if not self.token and not is_loopback(_name(host)):",
        "if not host:",
        "tests/serve/test_guard.py",
    ),
    Fault(
        "an origin that nobody looks at",
        "serve/guard.py",
        "if origin is not None and not _same(origin, host):",
        "if origin == host:",
        "tests/serve/test_guard.py",
    ),
    Fault(
        "a server that nobody needs a token for",
        "serve/guard.py",
        "if self.token and not self._has_token(scope, headers):",
        "if not headers:",
        "tests/serve/test_guard.py",
    ),
    Fault(
        "what a form of another site can send",
        "serve/app.py",
        'if _type_of(request) != "application/json":',
        "if not body:",
        "tests/serve/test_guard.py",
    ),
    Fault(
        "a clip that is a link",
        "serve/files.py",
        "if path.is_symlink() or not path.is_file() or path.suffix",
        "if not path.is_file() or path.suffix",
        "tests/serve/test_answers.py -k leaves",
    ),
    Fault(
        "a clip of any path",
        "serve/files.py",
        "and Path(file).name == file",
        "and bool(Path(file).name)",
        "tests/serve/test_answers.py -k leaves",
    ),
    Fault(
        "an image of any path",
        "serve/files.py",
        "if not isinstance(name, str) or not IMAGE.fullmatch(name):",
        "if not isinstance(name, str):",
        "tests/serve/test_answers.py -k machine",
    ),
    Fault(
        "a prompt that is read twice",
        "queue/desk.py",
        "_, bad = self.add([",
        "_, bad = self.add(words=Words(), jobs=[",
        "tests/serve/test_answers.py -k again",
    ),
    Fault(
        "a page that is drawn once",
        "serve/live.js",
        "if (number === asked) timer",
        "if (number < 0) timer",
        "tests/serve/test_page.py -k follows",
    ),
    Fault(
        "a clip that begins anew at every look",
        "serve/live.js",
        "if (old && old.element.dataset.address",
        "if (false && old.element.dataset.address",
        "tests/serve/test_page.py -k playing",
    ),
    Fault(
        "a name that leaves the folder",
        "queue/job.py",
        'if strange or not name or name[0] in ".- " or',
        'if not name or name[0] in "- " or',
        "tests/queue/test_job.py",
    ),
    Fault(
        "commands to the terminal",
        "render/screen.py",
        "c if c.isprintable() else",
        "c if True else",
        "tests/render/test_command.py",
    ),
    Fault(
        "a reader who went away",
        "render/events.py",
        "except BrokenPipeError:",
        "except KeyError:",
        "tests/render/test_command.py -k goes_away",
    ),
    Fault(
        "a pipe without a reader",
        "cli.py",
        "not any(state & select.POLLERR",
        "any(True",
        "tests/test_cli.py -k nobody_reads",
    ),
    Fault(
        "a standard file that is closed",
        "cli.py",
        "if getattr(sys, name) is None:",
        "if False:",
        "tests/render/test_faults_of_nights.py -k closed_files",
    ),
    Fault(
        "a seed that is another job's",
        "render/calls.py",
        "torch.Generator().manual_seed(job.seed) for job in jobs",
        "torch.Generator().manual_seed(jobs[0].seed) for job in jobs",
        "tests/render/test_run.py -k 'pipeline_itself or company or nothing or together or alone or depend'",
    ),
    Fault(
        "clips of other models under one name",
        "queue/job.py",
        '{**mine, "model": model, **made}',
        '{**mine, "model": model}',
        "tests/render/test_run.py -k decides",
    ),
    Fault(
        "code in a model's folder",
        "render/loading.py",
        "            if asks:\n",
        "            if False:\n",
        "tests/render/test_models.py tests/render/test_loading.py",
    ),
    Fault(
        "different images in one call",
        "queue/batches.py",
        '"each its own" if images == EACH else job.image_sha256',
        '"each its own"',
        "tests/render/test_run.py tests/queue/test_job.py tests/queue/test_store.py -k image",
    ),
    Fault(
        "a job that is cancelled and rendered",
        "queue/desk.py",
        "\"status = 'cancelled', runner = NULL, error = NULL\"",
        "\"status = 'cancelled', error = NULL\"",
        "tests/queue/test_desk.py",
    ),
    Fault(
        "a pause that nobody keeps",
        "queue/store.py",
        "if self.setting(PAUSED):",
        'if self.setting("pause"):',
        "tests/queue/test_desk.py",
    ),
    Fault(
        "jobs of one priority with those of another",
        "queue/store.py",
        "deaths = ? AND NOT apart AND stack = ? AND priority = ? ",
        "deaths = ? AND NOT apart AND stack = ? AND ? IS NOT NULL ",
        "tests/queue/test_desk.py",
    ),
    Fault(
        "added jobs of runs that make other clips",
        "queue/taking.py",
        'if made.items() <= json.loads(row["identity"]).items()',
        "if True",
        "tests/queue/test_desk.py",
    ),
    Fault(
        "what may kill beside what may not",
        "queue/store.py",
        "(deaths = 0 OR (? AND NOT (? AND place IS ?)))",
        "(deaths = 0 OR ? OR NOT (? AND place IS ?))",
        "tests/queue/test_store.py",
    ),
    Fault(
        "a run that is killed and blames its jobs",
        "queue/store.py",
        "blamed=(self.home / runner / WITHIN).exists()",
        "blamed=True",
        "tests/queue/test_store.py",
    ),
    Fault(
        "a plan that claims names",
        "queue/taking.py",
        '"COMMIT" if keep else "ROLLBACK"',
        '"COMMIT"',
        "tests/render/test_faults_of_nights.py",
    ),
    Fault(
        "a clip that was cut short and counts",
        "queue/taking.py",
        "found is not None and size in (None, found)",
        "found is not None",
        "tests/render/test_faults_of_nights.py -k whole",
    ),
    Fault(
        "a list of another model that is taken for this one's",
        "queue/taking.py",
        "if found == identity:",
        "if found is not None:",
        "tests/render/test_faults_of_nights.py -k list_was_lost",
    ),
    Fault(
        "words that another seed chooses too",
        "queue/words.py",
        'parts[_number(f"{self.key} {number}", len(parts))]',
        'parts[_number(f"{number}", len(parts))]',
        "tests/queue/test_words.py",
    ),
    Fault(
        "words from outside of the folder",
        "queue/words.py",
        "if not path.is_relative_to(base.resolve()) or",
        "if",
        "tests/queue/test_words.py",
    ),
    Fault(
        "keys that come twice",
        "queue/readers.py",
        "if len(made) < len(node.value):",
        "if False:",
        "tests/queue/test_job.py",
    ),
    Fault(
        "a limit that is nobody's",
        "render/limits.py",
        "if batch.limit is not None and progress.seconds > batch.limit:",
        "if batch.limit is not None and progress.seconds > 10 * batch.limit:",
        "tests/render/test_limits.py",
    ),
    Fault(
        "time in which a batch waits for others",
        "render/outcomes.py",
        "return self.before + (0.0 if self.waiting else time.monotonic() - self.since)",
        "return self.before + (time.monotonic() - self.since)",
        "tests/render/test_limits.py",
    ),
    Fault(
        "a process that lives on without its run",
        "render/process.py",
        "handles = (theirs.fileno(), self.lock)",
        "handles = (theirs.fileno(),)",
        "tests/render/test_process.py -k inherits",
    ),
    Fault(
        "encodings on disk without end",
        "render/texts.py",
        "while sum(self.spilled.values()) > self.disk:",
        "while False:",
        "tests/render/test_faults_of_nights.py -k bounded",
    ),
    Fault(
        "layers that the model does not have",
        "render/checks.py",
        "        _check_solver(model, settled_job.solver)\n",
        "        return\n",
        "tests/render/test_faults_of_nights.py -k before_the_model_loads",
    ),
    Fault(
        "LoRAs of the batch before",
        "render/loras.py",
        "            self.pipe.unload_lora_weights()\n        try:",
        "            pass\n        try:",
        "tests/render/test_loras.py",
    ),
    Fault(
        "a LoRA that does nothing",
        "render/loras.py",
        "if not any(name in names for names in self.pipe.get_list_adapters().values()):",
        "if False:",
        "tests/render/test_loras.py",
    ),
    Fault(
        "other LoRAs in one call",
        "queue/batches.py",
        "    if job.loras:\n",
        "    if False:\n",
        "tests/render/test_loras.py",
    ),
    Fault(
        "a last line without the exit code",
        "render/screen.py",
        '{"event": "ended", "code": code, **self.report}',
        '{"event": "ended", **self.report}',
        "tests/render/test_command.py -k machine",
    ),
    Fault(
        "a forecast by the slowest",
        "queue/forecast.py",
        'f"SELECT AVG(wall), AVG(bytes) {done} AND key = ?"',
        'f"SELECT MAX(wall), AVG(bytes) {done} AND key = ?"',
        "tests/queue/test_forecast.py",
    ),
    # Finding and verifying facts
    Fault(
        "a verdict that is always right",
        "proof/verdict.py",
        "return self.error <= self.budget",
        "return True",
        "tests/proof/test_check.py -k 'mark or wrong'",
    ),
    Fault(
        "a protocol that is not compared",
        "proof/claims.py",
        "if combined.groups != groups:",
        "if combined.groups != combined.groups:",
        "tests/proof/test_check.py -k wrong",
    ),
    Fault(
        "wrong facts that are used",
        "facts.py",
        "if not verdict.ok:",
        "if verdict is None:",
        "tests/proof/test_check.py -k 'wrong or switched'",
    ),
    Fault(
        "facts of another call",
        "facts.py",
        "kind = _outline(call), ",
        "kind = len(call), ",
        "tests/proof/test_find.py -k 'another_kind'",
    ),
    Fault(
        "parts of a clip taken for one run",
        "proof/find.py",
        "windowed=len(self.combined) > self.steps,",
        "windowed=False,",
        "tests/proof/test_find.py -k 'Animate or packed'",
    ),
    Fault(
        "a part that begins where the clip began",
        "engine.py",
        "self.part_began, self.part_ends = self.steps_done, self.steps_done + steps",
        "self.part_ends = self.steps_done + steps",
        "tests/integrations/test_families.py -k 'part and plain'",
    ),
    Fault(
        "another order of a guider's passes",
        "integrations/families/ltx2.py",
        "for name in guider.active_predictions())",
        "for name in reversed(guider.active_predictions()))",
        "tests/integrations/test_ltx2_modular.py",
    ),
    Fault(
        "prompts that are handed out are not read ahead",
        "render/worker.py",
        "for job in jobs), *ahead]",
        "for job in jobs[:0]), *ahead]",
        "tests/render/test_run.py -k leaves_the_device",
    ),
    Fault(
        "a weight of the wrong prediction",
        "proof/measure.py",
        "int(group == number)",
        "int(group != number)",
        "tests/proof/test_check.py -k 'family and LTX'",
    ),
]


def seen(fault: Fault) -> tuple[bool, str]:
    """Whether a test fails with this fault, and the output of the tests."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("stgfast", "tests", "bench", "README.md", "pyproject.toml"):
            part = ROOT / name
            (shutil.copytree if part.is_dir() else shutil.copy2)(part, copy / name)
        file = copy / "stgfast" / fault.file
        text = file.read_text(encoding="utf-8")
        if text.count(fault.text) != 1:
            raise ValueError(f"{fault.what}: {fault.file} has its text {text.count(fault.text)} times, expected once")
        file.write_text(text.replace(fault.text, fault.instead), encoding="utf-8")
        command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider -m 'not again' {fault.tests}"
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "NO_SHRINK": "1"}
        try:
            ran = subprocess.run(
                command,
                shell=True,
                cwd=copy,
                env=environment,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False, f"no end after {SECONDS} s"
        return ran.returncode == 1, ran.stdout[-300:]


def main(words: list[str]) -> int:
    chosen = [fault for fault in FAULTS if not words or any(word in fault.what for word in words)]
    started, unseen = time.monotonic(), []
    with ThreadPoolExecutor(2) as pool:
        for fault, (found, said) in zip(chosen, pool.map(seen, chosen), strict=True):
            sys.stdout.write(f"{'seen' if found else 'NOT SEEN'}: {fault.what}\n")
            sys.stdout.flush()
            if not found:
                unseen.append(fault.what)
                sys.stdout.write(f"    {said.strip()[-200:]}\n")
    took = time.monotonic() - started
    sys.stdout.write(f"{len(chosen)} faults, {len(unseen)} that nothing saw, {took:.0f} s\n")
    return len(unseen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
