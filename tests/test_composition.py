"""Guidance together with other changes of a pipeline: LoRA, compilation, caches, offloading, callbacks. It is compared
with the plain method on a pipeline with the same changes.
"""

import threading
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import hooks

import stgfast
from stgfast import Guidance, Perturbation, SettingsError
from tests.integrations import test_ltx2 as ltx2
from tests.integrations.families import hunyuan_video, images, ltx, mochi, stable_video_diffusion, wan
from tests.precision import distance, same

pytestmark = pytest.mark.usefixtures("float64")

MODULES = (ltx, mochi, wan, hunyuan_video, images, stable_video_diffusion)
FAMILIES = {family.name: family for module in MODULES for family in module.FAMILIES}
GUIDANCE = Guidance([Perturbation([2]), Perturbation([3], kind="attention")], rescale=0.5)
IN_ORDER = pytest.mark.parametrize("first", [False, True], ids=["before accelerate", "after accelerate"])


def families(*names):
    return pytest.mark.parametrize("family", [FAMILIES[name] for name in names], ids=names)


def on(family, pipe):
    """The same calls of an existing pipeline."""
    return replace(family, build=lambda other=False: pipe, shared=False)


def calling(family, steps=3, **more):
    """Calls with this number of steps and further arguments."""

    def arguments(prompts, cfg=True):
        return {**family.arguments(prompts, cfg=cfg), "num_inference_steps": steps, **more}

    return replace(family, arguments=arguments, steps=(steps, steps))


# LoRA


def saved_lora(family, folder):
    """A random adapter in a file, as users have them."""
    from peft import LoraConfig, get_peft_model_state_dict

    pipe = family.build()
    torch.manual_seed(3)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    type(pipe).save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))


LORA = {
    "loaded": lambda pipe, path: pipe.load_lora_weights(path, adapter_name="one"),
    "at half strength": lambda pipe, path: pipe.set_adapters("one", 0.5),
    "disabled": lambda pipe, path: pipe.disable_lora(),
    "enabled again": lambda pipe, path: pipe.enable_lora(),
    "fused": lambda pipe, path: pipe.fuse_lora(components=["transformer"]),
    "unfused": lambda pipe, path: pipe.unfuse_lora(components=["transformer"]),
    "deleted": lambda pipe, path: pipe.delete_adapters("one"),
    "loaded again": lambda pipe, path: pipe.load_lora_weights(path),
    "unloaded": lambda pipe, path: pipe.unload_lora_weights(),
}


@families("Wan", "Mochi", "LTX")
def test_whatever_is_done_with_a_lora(family, tmp_path):
    """All of it on one pipeline that stays accelerated, and step by step on one that is accelerated just before its
    use.
    """
    saved_lora(family, tmp_path)
    pipe, late, plain = stgfast.accelerate(family.build(), GUIDANCE), family.build(), family.build()
    bare = on(family, plain).plain(GUIDANCE)
    differs = {}
    for done, do in LORA.items():
        for each in (pipe, late, plain):
            do(each, tmp_path)
        expected = on(family, plain).plain(GUIDANCE)
        same(family.run(pipe), expected)
        same(family.run(stgfast.accelerate(late, GUIDANCE)), expected)
        stgfast.restore(late)
        differs[done] = distance(expected, bare) > 1e-3
    without = ("disabled", "deleted", "unloaded")
    assert differs == {done: done not in without for done in LORA}


# Other libraries that wrap calls


def group_offload(pipe, kind):
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    hooks.apply_group_offloading(pipe.transformer, onload_device=torch.device("cpu"), offload_type=kind, **options)


def compile_blocks(pipe):
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager")


def compile_whole(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


OWNERS = {
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "group offload by block": lambda pipe: group_offload(pipe, "block_level"),
    "group offload by leaf": lambda pipe: group_offload(pipe, "leaf_level"),
    "layerwise casting": lambda pipe: pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float32, compute_dtype=torch.float32
    ),
    "compiled blocks": compile_blocks,
    "compiled whole": compile_whole,
}


@pytest.mark.float32
@IN_ORDER
@pytest.mark.parametrize("owner", OWNERS)
def test_works_with_whatever_else_owns_calls(owner, first):
    torch.compiler.reset()
    family = FAMILIES["LTX"]
    pipe = family.build()
    if first:
        stgfast.accelerate(pipe, GUIDANCE)
    OWNERS[owner](pipe)
    if not first:
        stgfast.accelerate(pipe, GUIDANCE)
    denoiser = pipe.transformer
    guided = [family.run(pipe, 2) for _ in range(2)]
    assert pipe.transformer is denoiser
    assert torch.equal(*guided)
    family.check(guided[0], GUIDANCE, 2)


@pytest.mark.float32
def test_moved_to_another_type_before_or_after():
    family = FAMILIES["LTX"]
    embeds = {name: value.bfloat16() for name, value in family.arguments(2).items() if name.endswith("prompt_embeds")}
    family = calling(family, steps=2, **embeds)
    before, after = family.build().to(torch.bfloat16), family.build()
    for pipe in (before, after):
        stgfast.accelerate(pipe, GUIDANCE)
    assert torch.equal(family.run(before, 2), family.run(after.to(torch.bfloat16), 2))


# Compilation


def counting():
    """A backend of torch.compile, the graphs that it received, and how often they ran."""
    graphs, runs = [], []

    def backend(graph, inputs):
        graphs.append(graph)

        def run(*args):
            runs.append(graph)
            return graph(*args)

        return run

    return backend, graphs, runs


@pytest.mark.float32
@pytest.mark.parametrize(("name", "prompts"), [("LTX", 2), ("Wan", 1), ("Wan", 2)])
def test_blocks_compiled_by_diffusers_are_compiled_once_more(name, prompts):
    """Twice in all: for the rows of the first block that ran, and then for any number of rows. Compiling the first for
    any number of rows (`mark_dynamic`) would save one of two, and cost the static shapes of all blocks before the fork:
    it is left to the user, who may set `dynamic=True`.
    """
    torch.compiler.reset()
    family = FAMILIES[name]
    backend, graphs, runs = counting()
    pipe = family.build()
    pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)  # which raises at a graph break
    stock = family.run(pipe, prompts)
    assert len(graphs) == 1
    ran = len(runs)
    guidance = Guidance(Perturbation([2]))
    made = family.run(stgfast.accelerate(pipe, guidance, max_rows="all"), prompts)
    assert len(graphs) == 2
    assert len(runs) == 2 * ran  # every block, also block 2, which only the perturbed rows skip
    family.check(made, guidance, prompts)
    for settings in (
        {},  # a second call compiles nothing, like a second step
        {"stg_scale": 2.0},
        {"stg_scale": [1.0, 0.0]},
        {"stg_scale": [0.0, 3.0], "stg_rescale": 0.7},
        {"stg_layers": [1]},
        {"stg_mode": "attention"},
        {"stg": GUIDANCE},
        {"stg": Guidance(Perturbation([2]), cfg=[3.0, 5.0], start=0.5)},
    ):
        family.run(pipe, prompts, **settings)
        assert len(graphs) == 2, settings
    assert torch.equal(family.run(pipe, prompts, stg_scale=0.0), stock)
    assert torch.equal(family.run(stgfast.restore(pipe), prompts), stock)
    assert len(graphs) == 2


@pytest.mark.again
@pytest.mark.float32
@pytest.mark.parametrize(("dynamic", "most"), [(True, 1), (False, 2)], ids=["dynamic", "static"])
def test_a_user_may_choose_dynamic_shapes_or_static_ones(dynamic, most):
    """One graph for any number of rows, or one for each of the two."""
    torch.compiler.reset()
    family = FAMILIES["Wan"]
    backend, graphs, _ = counting()
    pipe = family.build()
    pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True, dynamic=dynamic)
    stgfast.accelerate(pipe, Guidance(Perturbation([2])), max_rows="all")
    for settings in ({}, {"stg_scale": [1.0, 0.0]}, {"stg_layers": [1]}):
        family.run(pipe, 2, **settings)
    assert len(graphs) == most


@pytest.mark.again
@pytest.mark.float32
def test_two_kinds_of_blocks_are_compiled_once_more_each():
    """The five graphs of HunyuanVideo are those of its blocks and of its text refiner; guidance does not add more."""
    torch.compiler.reset()
    family = FAMILIES["HunyuanVideo"]
    backend, graphs, _ = counting()
    pipe = family.build()
    pipe.transformer.compile_repeated_blocks(backend=backend)
    family.run(pipe)
    own = len(graphs)
    stgfast.accelerate(pipe, Guidance(Perturbation([2])), max_rows="all")
    family.run(pipe)
    assert own < len(graphs) <= 2 * own
    twice = len(graphs)
    for settings in ({}, {"stg_scale": [0.0, 2.0]}, {"stg_layers": [4]}):
        family.run(pipe, **settings)
    assert len(graphs) == twice


@pytest.mark.float32
def test_blocks_of_a_model_that_is_compiled_whole_are_compiled_one_by_one():
    torch.compiler.reset()
    family = FAMILIES["Wan"]
    backend, graphs, runs = counting()
    pipe = family.build()
    pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    stgfast.accelerate(pipe, Guidance(Perturbation([2])), max_rows="all")
    for _ in range(2):
        runs.clear()
        family.run(pipe)
        # Every block in both calls of both steps; also block 2, which only the perturbed rows skip.
        assert len(runs) == 2 * (4 + 4)
        assert len(graphs) == 2


@pytest.mark.float32
@families("LTX", "Wan", "Stable Video Diffusion")
def test_accelerate_compiles(family, monkeypatch):
    """The blocks, for guided calls only: two compilations, or two for each width of a UNet, and none later."""
    torch.compiler.reset()
    backend, graphs, runs = counting()
    told = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: told.append(True))
    guidance = Guidance(Perturbation([2]))
    pipe = stgfast.accelerate(family.build(), guidance, compile={"backend": backend, "fullgraph": True}, max_rows="all")
    clip = family.run(pipe, 2)
    assert len(told) == family.steps[0] * (1 if family.facts.stacked else 2)
    family.check(clip, guidance, 2)
    made, ran = len(graphs), len(runs)
    layers = pipe._stgfast.adapter.layouts(pipe)[family.facts.denoisers[0]].layers
    assert ran == family.steps[0] * layers * (1 if family.facts.stacked else 2)
    widths = family.name == "Stable Video Diffusion"
    assert made <= layers if widths else made == 2
    for settings in ({}, {"stg_scale": [1.0, 0.0]}, {"stg_scale": 0.0}, *([] if widths else [{"stg_layers": [1]}])):
        family.run(pipe, 2, **settings)
    assert len(graphs) == made
    assert torch.equal(family.run(stgfast.restore(pipe)), family.run(family.build()))


@pytest.mark.float32
@pytest.mark.parametrize("owner", ["accelerate", "compiled blocks", "compiled whole", "nobody"])
def test_cuda_graphs_are_told_of_every_call_of_the_denoiser(owner, monkeypatch):
    """The output of one block still exists for the next, even if its launches were recorded."""
    torch.compiler.reset()
    family, told = FAMILIES["LTX"], []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: told.append(True))
    pipe = family.build()
    if owner in OWNERS:
        OWNERS[owner](pipe)
    compilation = {"backend": "eager"} if owner == "accelerate" else False
    family.run(stgfast.accelerate(pipe, Guidance(Perturbation([2])), compile=compilation, max_rows="all"))
    assert len(told) == (0 if owner == "nobody" else family.steps[0])


@pytest.mark.again
@pytest.mark.float32
def test_blocks_that_are_compiled_already_stay_so():
    torch.compiler.reset()
    family = FAMILIES["Wan"]
    (mine, graphs, _), (other, others, _) = counting(), counting()
    pipe = family.build()
    pipe.transformer.compile_repeated_blocks(backend=mine)
    family.run(stgfast.accelerate(pipe, Guidance(Perturbation([2])), compile={"backend": other}, max_rows="all"))
    assert graphs
    assert not others


def test_a_denoiser_compiled_in_place_is_refused():
    pipe = FAMILIES["Wan"].build()
    pipe.transformer.compile(backend="eager")
    with pytest.raises(SettingsError, match=r"pipe\.transformer = torch\.compile\(pipe\.transformer\)"):
        stgfast.accelerate(pipe, GUIDANCE)


# Caches


def time_of(pipe):
    return lambda: pipe.current_timestep


# The function that applies a cache, and its settings, such that it acts in a call of a few steps.
CACHES = {
    "apply_first_block_cache": lambda pipe: hooks.FirstBlockCacheConfig(threshold=100.0),
    "apply_taylorseer_cache": lambda pipe: hooks.TaylorSeerCacheConfig(
        cache_interval=9, disable_cache_before_step=1, cache_identifiers=[r"blocks\.\d\.attn1"]
    ),
    "apply_mag_cache": lambda pipe: hooks.MagCacheConfig(
        mag_ratios=[1.0] * 4, num_inference_steps=4, retention_ratio=0.0
    ),
    "apply_sea_cache": lambda pipe: hooks.SeaCacheConfig(threshold=100.0),
    "apply_text_kv_cache": lambda pipe: hooks.TextKVCacheConfig(),
    "apply_pyramid_attention_broadcast": lambda pipe: hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=time_of(pipe),
    ),
    "apply_faster_cache": lambda pipe: hooks.FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 1001),
        unconditional_batch_timestep_skip_range=(-1, 1001),
        current_timestep_callback=time_of(pipe),
    ),
}
NO_EFFECT = ("apply_text_kv_cache",)  # it knows the blocks of one image model only
NO_CACHES = (
    "apply_group_offloading",
    "apply_layerwise_casting",
    "apply_layerwise_casting_hook",
    "apply_layer_skip",
    "apply_context_parallel",
    "apply_tensor_parallel",
)


def test_every_cache_of_diffusers_is_tested():
    assert {name for name in dir(hooks) if name.startswith("apply_")} - set(NO_CACHES) <= CACHES.keys()


@pytest.mark.parametrize("by", ["enable_cache", "function"])
@pytest.mark.parametrize("cache", [name for name in CACHES if hasattr(hooks, name)])
def test_a_cache_is_refused_before_anything_runs(cache, by):
    family = calling(FAMILIES["Mochi" if cache == "apply_faster_cache" else "Wan"], steps=4)
    bare, pipe = family.run(family.pipe()), family.build()
    config = CACHES[cache](pipe)
    if by == "function":
        getattr(hooks, cache)(pipe.transformer, config)
    else:
        pipe.transformer.enable_cache(config)
    stock = family.run(pipe)
    assert (distance(stock, bare) > 1e-3) is (cache not in NO_EFFECT), "a cache that does nothing shows nothing"
    stgfast.accelerate(pipe, GUIDANCE)
    assert torch.equal(family.run(pipe, stg_scale=0), stock)
    ran = []
    hook = pipe.transformer.register_forward_pre_hook(lambda module, args: ran.append(module))
    with pytest.raises(SettingsError, match=r"pipe\.transformer has a cache \(\w+") as refused:
        family.run(pipe)
    # A cache also takes calls with a part of the rows for steps.
    with pytest.raises(SettingsError, match="has a cache"):
        family.run(stgfast.accelerate(pipe, GUIDANCE, max_rows=1), stg_scale=0)
    assert not ran
    hook.remove()
    _, advice = str(refused.value).split(", so switch it off: ")
    assert ("disable_cache()" in advice) is (by == "enable_cache")
    exec(advice, {"pipe": pipe, "diffusers": diffusers})
    expected = stgfast.accelerate(family.pipe(), GUIDANCE)
    assert torch.equal(family.run(stgfast.accelerate(pipe, GUIDANCE)), family.run(expected))
    assert torch.equal(family.run(stgfast.restore(pipe)), bare)


def test_the_cache_of_a_second_denoiser_is_found():
    family = FAMILIES["Wan of two transformers"]
    pipe = stgfast.accelerate(family.build(), GUIDANCE)
    hooks.apply_first_block_cache(pipe.transformer_2, hooks.FirstBlockCacheConfig())
    with pytest.raises(SettingsError, match=r"pipe\.transformer_2 has a cache \(fbc_block_hook, fbc_leader_block_hook"):
        family.run(pipe)


# Callbacks


def scaled(factors):
    """A callback that scales tensors after the first step."""

    def change(pipe, step, time, tensors):
        return {name: tensor * factors[name] for name, tensor in tensors.items() if step == 0}

    return {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": list(factors)}


EMBEDS = {"prompt_embeds": 1.5}
BOTH = {"prompt_embeds": 1.5, "negative_prompt_embeds": 0.5}
CALLBACKS = {
    "stacked": ("LTX", EMBEDS),
    "stacked, masked text": ("Mochi", EMBEDS),
    "sequential": ("Wan", BOTH),
    "embedded": ("HunyuanVideo", EMBEDS),
}


@pytest.mark.parametrize("changed", ["embeds", "latents"])
@pytest.mark.parametrize("protocol", CALLBACKS)
def test_a_callback_that_changes_tensors(protocol, changed):
    name, embeds = CALLBACKS[protocol]
    family = FAMILIES[name]
    cfg = protocol != "embedded"  # with true CFG it is sequential
    given = scaled(embeds if changed == "embeds" else {"latents": 1.25})
    expected = calling(family, **given).plain(GUIDANCE, 2, cfg)
    made = calling(family, **given).run(stgfast.accelerate(family.pipe(), GUIDANCE), 2, cfg)
    same(made, expected)
    unchanged = calling(family).run(stgfast.accelerate(family.pipe(), GUIDANCE), 2, cfg)
    assert distance(made, unchanged) > 1e-3


def test_a_callback_that_changes_latents_where_the_pipeline_asks_for_weak_branches():
    """LTX-2 encodes what its blocks attend to before the first step, so later changes of embeddings have no effect
    there.
    """
    given = {"num_inference_steps": 3, **scaled({"latents": 1.25})}
    expected = ltx2.call(ltx2.pipeline(), **given)
    pipe = stgfast.accelerate(ltx2.pipeline())
    for one, other in zip(ltx2.call(pipe, **given), expected, strict=True):
        same(one, other)
    assert distance(ltx2.call(pipe, num_inference_steps=3)[0], expected[0]) > 1e-3


def stopping(pipe, step, time, tensors):
    pipe._interrupt = step == 1
    return {}


def stop_from_a_thread(pipe, at):
    """Another thread stops the run during call number `at` of the denoiser. Returns a function that removes it."""
    calls = []

    def stop():
        pipe._interrupt = True

    def hook(module, args):
        calls.append(module)
        if len(calls) == at:
            thread = threading.Thread(target=stop)
            thread.start()
            thread.join()

    return pipe.transformer.register_forward_pre_hook(hook).remove


@pytest.mark.parametrize("by", ["callback", "thread"])
@pytest.mark.parametrize("protocol", CALLBACKS)
def test_a_run_that_is_interrupted(protocol, by):
    """It ends like the plain one, and leaves nothing for the next run."""
    family, cfg = FAMILIES[CALLBACKS[protocol][0]], protocol != "embedded"
    whole = calling(family, steps=4)
    part = calling(family, steps=4, callback_on_step_end=stopping) if by == "callback" else whole
    # In the second step; if it has two calls, at the first.
    at = 3 if protocol == "sequential" else 2
    build = family.build if by == "thread" else family.pipe  # whose models have other calls too
    plain, pipe = build(), stgfast.accelerate(build(), GUIDANCE)
    removes = [stop_from_a_thread(each, at) for each in (plain, pipe) if by == "thread"]
    expected = on(part, plain).plain(GUIDANCE, cfg=cfg)
    made = part.run(pipe, cfg=cfg)
    assert pipe.interrupt
    same(made, expected)
    for remove in removes:
        remove()
    assert all("_compiled_call_impl" not in vars(module) for module in pipe.transformer.modules())
    after = whole.run(pipe, cfg=cfg)
    assert torch.equal(after, whole.run(stgfast.accelerate(family.pipe(), GUIDANCE), cfg=cfg))
    assert distance(after, made) > 1e-3


@pytest.mark.parametrize("at", [None, 6, 8], ids=lambda at: "callback" if at is None else f"call {at}")
def test_a_run_that_is_interrupted_where_the_pipeline_asks_for_weak_branches(at):
    """At any call of a step: the later calls of that step are answered."""
    given = {"num_inference_steps": 4} | ({"callback_on_step_end": stopping} if at is None else {})
    stock, pipe = ltx2.build(), stgfast.accelerate(ltx2.build())
    whole = ltx2.call(pipe, num_inference_steps=4)
    if at is not None:
        # The stock pipeline calls its denoiser three times a step; here it is called once.
        stop_from_a_thread(stock, at)
        stop_from_a_thread(pipe, -(-at // 3))
    expected, made = ltx2.call(stock, **given), ltx2.call(pipe, **given)
    assert pipe.interrupt
    for one, other in zip(made, expected, strict=True):
        same(one, other)
    assert distance(made[0], whole[0]) > 1e-3
    assert all(map(torch.equal, ltx2.call(pipe, num_inference_steps=4), whole))


def test_a_callback_of_diffusers_that_switches_cfg_off():
    """From then on the unconditional branch is neither computed nor needed."""
    family = FAMILIES["Stable Diffusion XL"]
    cutoff = diffusers.callbacks.SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    guidance = Guidance(Perturbation([3], kind="attention"), rescale=0.5)
    pipe = stgfast.accelerate(family.pipe(), guidance)
    made = calling(family, callback_on_step_end=cutoff).run(pipe)
    by_schedule = stgfast.accelerate(family.pipe(), replace(guidance, cfg=[4.0, 1.0, 1.0]))
    same(made, calling(family).run(by_schedule))
