"""Tests that repeat, for another family or size, what other tests cover. They run in `make test-all` only.

For each test function in this list, the tests whose parameters match its pattern stay in `make test`. These notice
every deliberate fault of `tests/faults.py`.
"""

import re

import pytest

# One for each protocol and structure of blocks.
FIRST = "CogVideoX|HunyuanVideo15|Latte|LTX|Mochi|Stable Video Diffusion|Wan|Wan of two transformers|HunyuanVideo, .*"
RUNS = "Wan, UniPC|CogVideoX, DPM"
FEW = "Cosmos 2 from an image|Flux|Kandinsky 5|Latte|Mochi|Stable Video Diffusion|Wan"
KEPT = {
    "bench/test_growth.py::test_arithmetic_follows_the_plan": "mochi",
    "bench/test_growth.py::test_nothing_is_timed_where_a_point_disagrees": "mochi",
    "bench/test_steps.py::test_a_time_that_is_not_predicted_fails_the_check": "mochi",
    "bench/test_steps.py::test_all_variants": "wan-14b",
    "ranks/test_endings.py::test_one_that_has_gone": "2-(is killed|exits)|4-is killed as it sends",
    "render/test_process.py::test_a_job_that_hangs_fails_within_its_limit": "blocks",
    "render/test_process.py::test_a_job_that_hangs_in_the_process_of_the_run": "a pipeline-blocks",
    "render/test_process.py::test_a_job_that_takes_its_process_down_fails": "is killed",
    "render/test_together.py::test_a_group_of_actors_that_loses_one": "a follower",
    "bench/test_steps.py::test_the_blocks_predict_the_arithmetic": "svd",
    "integrations/test_adapters.py::test_identity_attention_is_attention_that_returns_values": FEW,
    "batching/test_fastest.py::test_gives_the_same": "HunyuanVideo|Latte|Wan",
    "integrations/test_axes.py::test_no_history_along_an_axis_runs_twice": "both-.*|whole and one-Latte",
    "integrations/test_blur.py::test_all_kinds_at_one_layer": "Mochi|Flux",
    "integrations/test_cosmos.py::test_a_scale_of_its_own_counts_as_one_more": "Cosmos|Cosmos 2 from an image",
    "integrations/test_axes.py::test_an_axis_equals_the_plain_method": "spatial-1-.*|whole and one-1-.*",
    "integrations/test_families.py::test_a_call_without_the_cfg_.*": FIRST,
    "integrations/test_families.py::test_blur_equals_the_plain_method": FEW,
    "integrations/test_families.py::test_equals_the_plain_method": f"attention, .*|.*-({FEW}|CogVideoX|LTX)",
    "integrations/test_families.py::test_explain_counts_what_runs": FIRST,
    "integrations/test_families.py::test_explain_counts_what_runs_where_.*": FEW,
    "integrations/test_forecast.py::test_equals_what_is_written_apart": "LTX-in .*|Mochi-.*|Wan-held",
    "integrations/test_families.py::test_no_history_runs_twice": FIRST,
    "integrations/test_families.py::test_no_worse_than_the_plain_method": FEW,
    "integrations/test_one_call.py::test_however_many_branches_and_prompts": "Wan",
    "integrations/test_one_call.py::test_one_launch_for_every_marked_attention": (
        "(CogVideoX|HunyuanVideo|Latte|Stable Diffusion XL|Wan)-float32|Mochi-float16"
    ),
    "integrations/test_families.py::test_scale_0_and_restore_leave_the_stock_result": FIRST,
    "integrations/test_forecast.py::test_explain_counts_what_runs_or_says_why_not": FIRST,
    "integrations/test_forecast.py::test_ltx2_too": "line",
    "integrations/test_ltx2.py::test_reuse": "1",
    "integrations/test_images.py::test_several_in_one_call": ".*Wan.*|.*HunyuanVideo.*|.*LTX.*|.*Kandinsky.*",
    "integrations/test_guiders.py::test_shared_passes_are_the_guiders_own": ".*(original formulation|part.*|CFG)",
    "integrations/test_ltx2.py::test_equals_its_own_four_passes": "2.0-its defaults|2.3-(its|two|CFG).*",
    "integrations/test_ltx2_modular.py::test_equals_its_own_passes": ".*-(all of it|modality alone|for half.*)-.*",
    "integrations/test_open_sora.py::test_equals_the_plain_method": "2-.*|1-1.2, (attention|spatial)|1-2.0, one.*",
    "integrations/test_methods.py::test_reuse": (
        "Mochi-(both|.*parabola|with.*(line|while)|in .*)|Wan-against.*|.*Diffusion-rescaled"
    ),
    "integrations/test_methods.py::test_two_terms": "0.7-True-.*",
    "integrations/test_methods.py::test_what_is_carried_on_is_what_explain_counts": "1-Wan|2-Mochi|2-HunyuanVideo",
    "kernels/test_combination.py::test_a_large_mean_does_not_disturb_the_factor": ".*-1000.0-.*|.*bfloat16-.*-plain",
    "kernels/test_combination.py::test_every_count_as_it_is_cut": "bf16-[2357]|.*-8",
    "kernels/test_combination.py::test_projected": "orthogonal-.*|along a sum-bf16.*",
    "kernels/test_compiled.py::test_default_configurations_fit_the_chip": "90",
    "proof/test_check.py::test_a_pipeline_that_was_changed_passes": "LTX-.*|Wan-a LoRA",
    "proof/test_check.py::test_as_it_is_accelerated": ".*(max_rows|attention).*",
    "proof/test_check.py::test_every_family_passes": "CogVideoX|HunyuanVideo15|Latte|LTX|Wan",
    "proof/test_check.py::test_wrong_facts_raise_or_do_no_harm": (
        ".*-LTX-residual|the path of attention-.*-attention|state.*-CogVideoX-residual"
    ),
    "proof/test_find.py::test_what_is_found_gives_the_plain_result": (
        "CogVideoX|Latte|modular LTX|Motif Video|Wan of two transformers|HunyuanVideo, frames packed"
    ),
    "proof/test_untabled.py::test_refused": "(?!AnyFlowFAR|HeliosPyramid).*",
    "proof/test_untabled.py::test_found": "AnimateDiff|Flux.2 Klein|modular.*",
    "integrations/test_ltx2.py::test_with_a_reference_too": "LTX2InContextPipeline-2-True",
    "proof/test_find.py::test_what_is_said_is_python_that_makes_it": FEW,
    "render/test_run.py::test_a_clip_is_the_same_in_any_company": "cogvideox|ltx, carried on",
    "render/test_run.py::test_text_encoder_leaves_the_device": "more .*",
    "render/test_run.py::test_where_there_is_no_memory_for_one_others_like_it_are_not_tried": "1",
    "render/test_wholes.py::test_a_clip_is_what_the_pipeline_makes": (
        "(LTX2|CogVideoXVideoToVideo|HunyuanVideo|Latte|StableVideoDiffusion)Pipeline"
    ),
    "test_composition.py::test_a_cache_is_refused_before_anything_runs": "apply_(taylor|faster).*-fun.*|apply_first.*",
    "test_composition.py::test_a_callback_that_changes_tensors": "(stacked, masked text|sequential)-.*",
    "test_composition.py::test_a_run_that_is_interrupted": ".*-thread|stacked-callback",
    "test_composition.py::test_a_run_that_is_interrupted_where_.*": "call 6",
    "test_composition.py::test_accelerate_compiles": "Wan",
    "test_composition.py::test_blocks_compiled_by_diffusers_are_compiled_once_more": "Wan-2",
    "test_composition.py::test_cuda_graphs_are_told_of_every_call_of_the_denoiser": "nobody",
    "test_composition.py::test_whatever_is_done_with_a_lora": "Wan",
    "test_composition.py::test_works_with_whatever_else_owns_calls": (
        "(.*offload|compiled whole).*-before.*|.*leaf-after.*"
    ),
    "test_gpu.py::test_neither_steps_nor_schedules_compile_anew": "wan-14b-.*",
    "test_gpu.py::test_steps_of_the_released_sizes_stay_on_the_device": "mochi",
    "test_install.py::test_(scale_0_is|steps_out_of_range|restore_leaves)_.*": "mochi|wan|hunyuan",
    "test_recipes.py::test_every_pipeline_takes_one": FEW,
    "test_restart.py::test_equals_the_loop_written_out": RUNS,
    "test_restart.py::test_guided_and_explained_over_the_longer_run": RUNS,
    "test_restart.py::test_steps_are_known_beforehand": FEW,
    "test_robust.py::test_an_ip_adapter_of_flux": "residual-0|blur-1",
    "test_robust.py::test_blocks_compiled_inside_of_a_layer": "attention",
    "test_robust.py::test_blocks_compiled_in_other_ways": "LTX-.*(forwards|attentions)-attention|Wan-.*blocks-residual",
    "test_solvers.py::test_every_pipeline_takes_it_or_says_why_not": FIRST,
}


def mark(items: list[pytest.Item]) -> None:
    """Mark the tests that repeat what others cover as `again`."""
    patterns = {re.compile(f"tests/{name}"): re.compile(kept) for name, kept in KEPT.items()}
    for item in items:
        name, _, parameters = item.nodeid.partition("[")
        kept = next((kept for test, kept in patterns.items() if test.fullmatch(name)), None)
        # The id of a test with an xdist group ends with the group.
        if kept is not None and not kept.fullmatch(parameters.partition("]@")[0].removesuffix("]")):
            item.add_marker(pytest.mark.again)
