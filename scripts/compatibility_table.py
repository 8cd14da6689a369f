"""What docs/compatibility.md asks of the tests: its columns and rows. Data only.

A mark in a column comes from one of its tests having run for that family; nothing is marked by
hand. To add a column, add it here and run `make_compatibility.py`.
"""

from __future__ import annotations

from typing import NamedTuple


class Column(NamedTuple):
    """One feature of one host, over the families.

    Attributes:
        title: What stands over the column.
        meaning: What a mark means.
        tests: The tests behind a mark, `file::function`; they run once for each family.
        refused: A test that holds that some families are refused.
        only: For a test without families in its parameters: the one it runs on.
    """

    title: str
    meaning: str
    tests: tuple[str, ...]
    refused: str = ""
    only: str = ""


class Kind(NamedTuple):
    """One kind of base, over the hosts: the tests behind it, and which tiny base they run on."""

    title: str
    diffusers: tuple[str, ...] = ()
    comfyui: tuple[str, ...] = ()
    bases: str = ""


_PIPELINES = "tests/diffusers/test_every_pipeline.py::"
_CONTROLLED = "tests/diffusers/test_control_pipelines.py::"
_LEARNING = "tests/training/test_families.py::"
_PARITY = "tests/comfy/test_keymap_parity.py::"

DIFFUSERS = (
    Column(
        "task",
        "a task acts in the denoiser, each row of a batch with a mask of its own, and leaves the "
        "base bit for bit where its strength is 0",
        (
            "tests/diffusers/test_regions.py::"
            "test_every_family_shows_its_size_frames_and_text_in_its_call",
        ),
    ),
    Column(
        "pipeline",
        "the same through the stock pipeline's own call, with tasks told apart by row",
        (
            _PIPELINES + "test_rows_equal_separate_runs",
            _CONTROLLED + "test_rows_and_controls_go_together",
        ),
    ),
    Column(
        "schedule",
        "strengths that follow sampling time, in the stock pipeline",
        ("tests/diffusers/test_schedules.py::test_any_pipeline_follows_a_schedule",),
    ),
    Column(
        "region",
        "every layer sees the mask where the picture is",
        ("tests/diffusers/test_region_layouts.py::test_every_layer_of_every_family",),
    ),
    Column(
        "control",
        "a control task starts as nothing, follows its picture, and leaves no trace",
        (
            "tests/diffusers/test_control_families.py::"
            "test_a_new_control_changes_no_bit_and_a_trained_one_does",
        ),
    ),
    Column(
        "control, pipeline",
        "the same through the stock pipeline's own call",
        (_CONTROLLED + "test_a_list_of_pictures_equals_separate_calls",),
    ),
    Column(
        "train",
        "the trainer's calls are the stock pipeline's own, and a task learns",
        (_LEARNING + "test_a_task_trains_and_the_base_stays",),
    ),
    Column(
        "train control",
        "a control task learns",
        (_LEARNING + "test_a_control_starts_as_nothing_and_learns",),
    ),
    Column(
        "DiffFit",
        "its γ lies on the outputs of attention and MLP",
        (
            "tests/diffusers/test_methods.py::"
            "test_difffits_gamma_lies_on_the_outputs_of_attention_and_mlp",
        ),
    ),
    Column(
        "extract",
        "a fine-tune minus its base is a task",
        (
            "tests/diffusers/test_extract.py::"
            "test_state_dicts_of_every_family_tell_their_class_and_layers",
        ),
    ),
    Column(
        "fuse",
        "what folds is folded into the weights and gives the same picture",
        ("tests/diffusers/test_fuse.py::test_a_fused_task_gives_the_same_picture",),
    ),
    Column(
        "LoRA files",
        "a LoRA as a task does what diffusers' own loader does with the file",
        ("tests/diffusers/test_lora_files.py::test_diffusers_files_do_what_its_loader_does",),
    ),
    Column(
        "PEFT",
        "the method as a PEFT tuner does what `attach` does",
        (
            "tests/diffusers/test_peft.py::"
            "test_a_new_adapter_changes_no_bit_and_a_trained_one_is_what_attach_does",
        ),
    ),
    Column(
        "resolution",
        "positions stretched to larger pictures",
        ("tests/diffusers/test_resolution.py::test_afterwards_the_model_is_what_it_was",),
        refused="tests/diffusers/test_resolution.py::test_other_families_are_refused_in_one_line",
    ),
    Column(
        "new classes",
        "a task with classes of its own, in the stock pipeline",
        ("tests/diffusers/test_classes.py::test_ditpipeline_draws_new_classes_with_guidance",),
        only="dit",
    ),
)

COMFYUI = (
    Column(
        "layers",
        "every layer of the published configurations has its place, with its shape (full size, "
        "without weights)",
        ("tests/comfy/test_keymap_full_size.py::test_every_layer_has_its_place",),
    ),
    Column(
        "as diffusers",
        "on the same weights a task does the same in both hosts",
        (_PARITY + "test_a_task_does_the_same_in_both_hosts",),
    ),
    Column(
        "rows",
        "each row of a batch runs its own task",
        (
            _PARITY + "test_rows_run_their_own_task",
            "tests/comfy/test_routes.py::"
            "test_rows_of_one_batch_run_their_own_tasks_in_one_call_a_step",
        ),
    ),
    Column(
        "region",
        "every layer sees the mask where the picture is (full size, without weights)",
        ("tests/comfy/test_region_layouts.py::test_layers_see_the_picture_where_regions_put_it",),
    ),
    Column(
        "region, run",
        "sampled: the task where the mask is 1, the base where it is 0",
        ("tests/comfy/test_regions.py::test_full_and_empty_masks_are_the_task_and_the_base",),
    ),
    Column(
        "control",
        "the embedding gets what a control picture becomes (full size, without weights)",
        (
            "tests/comfy/test_control_embeddings.py::"
            "test_the_embedding_receives_what_a_control_becomes",
        ),
    ),
    Column(
        "control, run",
        "sampled: the formula, and the base at strength 0",
        ("tests/comfy/test_control.py::test_it_computes_the_formula",),
    ),
    Column(
        "train",
        "a task learns, and the model stays what it was",
        ("tests/comfy/test_training.py::test_every_kind_of_model_learns_and_stays_what_it_was",),
    ),
    Column(
        "train control",
        "a control task learns",
        (
            "tests/comfy/test_training_control.py::"
            "test_a_control_starts_as_nothing_learns_and_leaves_the_model_alone",
        ),
    ),
    Column(
        "LoRA names",
        "every name that ComfyUI's own loader reads is read (full size)",
        ("tests/comfy/test_lora_names.py::test_every_name_comfyui_reads_is_read",),
    ),
    Column(
        "LoRA files",
        "a LoRA as a task does what ComfyUI's own loader does with the file, two in one batch too",
        ("tests/comfy/test_lora_files.py::test_two_imported_loras_in_one_batch",),
    ),
    Column(
        "extract",
        "a model with a LoRA on it minus the model is the task",
        ("tests/comfy/test_extract.py::test_a_lora_of_any_layers_is_its_task",),
    ),
)

_BASES = "tests/diffusers/test_bases.py::"
_HOSTS = "tests/comfy/test_patching_hosts.py::"
KINDS = (
    Kind(
        "fp8 weights",
        (_BASES + "test_float8_storage_shows_the_same_effect_and_refuses_to_fuse",),
        (_HOSTS + "test_on_quantised_layers", _HOSTS + "test_on_an_fp8_cast_by_the_stock_loader"),
        "SD3 in diffusers, FLUX.1 in ComfyUI",
    ),
    Kind(
        "int8 weights",
        (_BASES + "test_an_int8_base_shows_the_same_effect_and_refuses_to_fuse",),
        (_HOSTS + "test_on_quantised_layers",),
        "SD3 in diffusers (torchao), FLUX.1 in ComfyUI",
    ),
    Kind(
        "bfloat16",
        (_BASES + "test_a_bfloat16_base_runs_a_float32_task",),
        (),
        "SD3",
    ),
    Kind(
        "offloaded or partly loaded weights",
        (_BASES + "test_offloaded_models_carry_tasks",),
        (_HOSTS + "test_on_partially_loaded_models_with_patched_biases",),
        "SD3",
    ),
    Kind(
        "torch.compile, strengths changed without a recompile",
        (
            "tests/diffusers/test_compile.py::test_twenty_changes_need_no_recompile",
            "tests/diffusers/test_compile.py::test_hotswap_after_compiling_needs_no_recompile",
        ),
        (_HOSTS + "test_under_torch_compile_strengths_change_without_recompiling",),
        "SD3",
    ),
    Kind(
        "with a LoRA on the model",
        ("tests/diffusers/test_lora.py::test_they_coexist_in_either_order",),
        (
            _HOSTS + "test_over_a_stock_lora_that_patches_weights_and_biases",
            _HOSTS + "test_over_a_stock_bypass_lora",
        ),
        "SD3",
    ),
    Kind(
        "trained on: fp8, int8",
        ("tests/training/test_loop.py::test_a_quantised_base_is_trained_on_as_it_is",),
        ("tests/comfy/test_training.py::test_the_weights_are_not_copied",),
        "SD3 (int8) in diffusers, FLUX.1 in ComfyUI",
    ),
    Kind("GGUF"),
    Kind("SVDQuant (nunchaku), NF4 (bitsandbytes)"),
    Kind("published weights of any family"),
    Kind("CUDA, ROCm, Metal, XPU"),
)

#: What tests call a family -> its row; names that are a row's own need no entry.
ALIASES = {
    "tiny_sd3": "sd3",
    "tiny_flux": "flux",
    "tiny_unet": "sd15",
    "ddpm": "unet2d",
    "hunyuan": "hunyuan_dit",
    "ltx": "ltx_video",
    "pixart sigma": "pixart",
    "sd": "sd15",
}
#: Rows of which a family has more than one, and ComfyUI's architectures that are in no family.
TITLES = {
    "sd15": "Stable Diffusion 1.x / 2.x",
    "sdxl": "Stable Diffusion XL",
    "WanVACETransformer3DModel": "Wan VACE",
    "LTX2VideoTransformer3DModel": "LTX-2",
    "Krea2Transformer2DModel": "Krea 2",
}
