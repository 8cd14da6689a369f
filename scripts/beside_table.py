"""What `make_beside.py` says beside the nodes of `tests/comfy/beside.py`: what other tests hold."""

from __future__ import annotations

from dataclasses import dataclass

RIGHT, REFUSED = "right", "refused"


@dataclass(frozen=True)
class Row:
    """One line of the page.

    Attributes:
        title: What stands beside tasks.
        ours: What of ours was tested with it.
        result: `RIGHT`, `REFUSED`, or a few words.
        tests: `file::function`, or `file::function[case]` for one of its cases.
    """

    title: str
    ours: str
    result: str
    tests: tuple[str, ...]


_NODES = "tests/comfy/test_beside_other_nodes.py::"
_HOSTS = "tests/comfy/test_patching_hosts.py::"
COMFYUI = (
    Row(
        "`EasyCache`, `LazyCache`, where tasks change between steps",
        "range, schedule, one row's schedule, control that ends, prompt with a range, "
        "units that act by noise level, experts that a router chooses",
        "right: emptied at the change",
        (
            _NODES + "test_a_cache_forgets",
            _NODES + "test_a_strength_that_always_changes_leaves_no_step_out",
            _NODES + "test_a_cache_that_sees_no_change_is_left_alone",
        ),
    ),
    Row(
        "context windows over height or width",
        "region, control picture",
        REFUSED,
        (_NODES + "test_windows_over_the_height_refuse_what_has_a_place",),
    ),
    Row(
        "context windows over the batch",
        "one task, one region per latent",
        REFUSED,
        (_NODES + "test_windows_over_the_batch_refuse_what_is_given_per_latent",),
    ),
    Row(
        "context windows over a video's frames",
        "control with a picture per frame",
        REFUSED,
        (_NODES + "test_windows_over_frames_refuse_a_control_video",),
    ),
    Row(
        "a model with tasks as the second of `ModelMergeSimple`, `ModelMergeSubtract`, "
        "`ModelMergeAdd`",
        "strength",
        REFUSED,
        (_NODES + "test_merging_a_model_with_tasks_into_another_is_refused",),
    ),
    Row(
        "`ModelSave`, `CheckpointSave` of a model with tasks",
        "strength",
        REFUSED,
        (_NODES + "test_saving_a_model_with_tasks_is_refused",),
    ),
    Row(
        "`TorchCompileModel`, before or after",
        "strength, regions; no recompilation when they change",
        RIGHT,
        (
            _HOSTS + "test_under_torch_compile_strengths_change_without_recompiling",
            "tests/comfy/test_regions.py::"
            "test_under_torch_compile_masks_and_strengths_change_without_recompiling",
        ),
    ),
    Row(
        "hooks with keyframes (`CreateHookLora`, `CreateHookKeyframe`)",
        "strength, schedule, control",
        RIGHT,
        (
            _HOSTS + "test_under_stock_lora_hooks_with_keyframes",
            "tests/comfy/test_schedules.py::"
            "test_beside_core_hooks_with_keyframes_it_stays_one_schedule_for_all",
            "tests/comfy/test_control_hosts.py::test_hooked_weights_of_the_embedding_are_read_anew",
        ),
    ),
)

_CACHES = "tests/diffusers/test_beside_caches.py::"
_ADAPTERS = (
    "tests/diffusers/test_beside_adapters.py::test_both_orders_are_the_weights_changed_by_hand"
)
_BASES = "tests/diffusers/test_bases.py::"


def _cache(name: str) -> Row:
    return Row(
        f"`{name}Config`" if name != "TaylorSeer" else "`TaylorSeerCacheConfig`",
        "strength, rows; a change by callback, schedule, one row's schedule or a control's end",
        "right: what was kept is forgotten at the change",
        (
            *(
                f"{_CACHES}test_a_change_half_way_is_computed_in_full[{change}-{name}]"
                for change in ("callback", "schedule", "one row's schedule")
            ),
            f"{_CACHES}test_a_control_that_ends[{name}]",
            f"{_CACHES}test_what_does_not_change_is_reused[{name}]",
        ),
    )


DIFFUSERS = (
    *map(
        _cache,
        ("FirstBlockCache", "FasterCache", "PyramidAttentionBroadcast", "TaylorSeer", "MagCache"),
    ),
    Row(
        "`FasterCacheConfig` that leaves the unconditional half of a batch out",
        "strength, schedule, a mask for all rows",
        "right; rows, masks or pictures of their own are refused",
        (_CACHES + "test_half_of_a_batch_left_out",),
    ),
    Row(
        "the package DeepCache",
        "strength, changed by callback",
        "right: computed in full at the change",
        (_CACHES + "test_deepcache",),
    ),
    Row(
        "ControlNet",
        "strength, rows; loaded before or after",
        RIGHT,
        tuple(f"{_ADAPTERS}[{first}-ControlNet]" for first in ("task", "adapter")),
    ),
    Row(
        "IP-Adapter",
        "strength, rows; loaded before or after; its own layers are no targets",
        RIGHT,
        (
            *(f"{_ADAPTERS}[{first}-IP-Adapter]" for first in ("task", "adapter")),
            "tests/diffusers/test_beside_adapters.py::"
            "test_an_ip_adapters_own_layers_are_no_targets",
        ),
    ),
    Row(
        "LoRA (PEFT)",
        "strength, rows; loaded before or after",
        RIGHT,
        (
            "tests/diffusers/test_lora.py::test_they_coexist_in_either_order",
            "tests/diffusers/test_lora.py::test_both_orders_give_the_same_sum",
            "tests/diffusers/test_lora.py::test_a_second_lora_leaves_rows_and_names_alone",
        ),
    ),
    Row(
        "model, sequential and group offloading",
        "strength; loaded before or after; fusing is refused",
        RIGHT,
        (
            _BASES + "test_offloaded_models_carry_tasks",
            _BASES + "test_fusing_into_weights_that_are_elsewhere_is_refused",
        ),
    ),
    Row(
        "layerwise casting to float8",
        "strength; fusing is refused",
        RIGHT,
        (_BASES + "test_float8_storage_shows_the_same_effect_and_refuses_to_fuse",),
    ),
    Row(
        "`torch.compile`",
        "strength, rows, another task in place; no recompilation when they change",
        "right; a task loaded after compiling is refused",
        (
            "tests/diffusers/test_compile.py::test_twenty_changes_need_no_recompile",
            "tests/diffusers/test_compile.py::"
            "test_a_model_compiled_before_would_ignore_a_task_and_raises",
        ),
    ),
)
