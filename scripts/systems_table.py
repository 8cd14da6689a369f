"""What `make_systems.py` says of each related system, and the tests that hold it.

A row with tests works, or composes with what it names; a row without is "not yet". To add a system,
or to say that one works now, change its row here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """One line of the page.

    Attributes:
        title: What it is called.
        paper: Its arXiv number.
        what: What it is here, or would be.
        page: The page of docs/ about it; "": none.
        library: What it composes with, where the system itself is that; "": it is ours.
        tests: `file::function`; none: not yet.
        missed: What it was to reach and does not; "": nothing.
    """

    title: str
    paper: str
    what: str
    page: str = ""
    library: str = ""
    tests: tuple[str, ...] = ()
    missed: str = ""

    @property
    def state(self) -> str:
        """The state that the tests allow to claim."""
        if not self.tests:
            return "not yet"
        if self.missed:
            return f"in part: {self.missed}"
        return f"composes with {self.library}" if self.library else "works"


_NODES = "tests/comfy/test_beside_other_nodes.py::"
_CACHES = "tests/diffusers/test_beside_caches.py::"
_OBJECTIVE = "tests/training/test_objective.py::"
_PROMPTS = "tests/training/test_conditioning.py::"
_WHICH = "tests/systems/test_which_task.py::"
_EXPERTS = "tests/systems/test_experts.py::"
_RANGES = "tests/systems/test_time_ranges.py::"
_TRANSLATE = "tests/systems/test_translate.py::"
_REFINE = "tests/training/test_refine.py::"
_GUIDANCE = "tests/systems/test_guidance.py::"
_ALIGN = "tests/training/test_alignment.py::"
_DEBIAS = "tests/training/test_debias.py::"

SYSTEMS = (
    System(
        "DiffScaler",
        "2404.09976",
        "the method itself: scale, shift and subspace on every layer, many tasks on one base",
        "how_it_works.md",
        tests=(
            "tests/core/test_affiner.py::test_a_layer_equals_the_formula_written_with_its_weight",
            "tests/core/test_affiner.py::test_a_new_task_changes_no_bit",
        ),
    ),
    System(
        "DiffFit",
        "2304.06648",
        "the methods `difffit` and `bitfit`; positions for a higher resolution",
        "methods.md",
        tests=(
            "tests/diffusers/test_methods.py::"
            "test_difffits_gamma_lies_on_the_outputs_of_attention_and_mlp",
            "tests/diffusers/test_resolution.py::test_every_trained_position_is_where_it_was",
        ),
    ),
    System(
        "Latent diffusion",
        "2112.10752",
        "the bases: training on latents, which are encoded once and kept",
        "training.md",
        tests=("tests/training/test_cache.py::test_what_changes_the_latents_is_encoded_anew",),
    ),
    System(
        "Diffusion Classifier",
        "2303.16203",
        "which task fits a picture",
        "which_task.md",
        tests=(
            f"{_WHICH}test_three_tasks_are_told_apart_by_eight_probes",
            f"{_WHICH}test_noise_is_none_of_them",
            f"{_WHICH}test_halving_gives_the_same_answer_with_half_the_forwards",
            f"{_WHICH}test_tasks_at_strength_0_are_not_told_apart",
        ),
    ),
    System(
        "Decentralized Diffusion Models",
        "2501.05450",
        "experts trained apart, and a router on the base's own features",
        "experts.md",
        tests=(
            f"{_EXPERTS}test_with_the_exact_posterior_the_mixture_is_the_field_of_all_data",
            f"{_EXPERTS}test_the_router_knows_at_low_noise_and_guesses_at_pure_noise",
            f"{_EXPERTS}test_together_they_are_better_on_all_data_than_either_alone",
            "tests/comfy/test_experts.py::"
            "test_each_row_runs_the_expert_that_is_chosen_for_it_in_one_call",
        ),
    ),
    System(
        "PPAP, in part",
        "2212.05973",
        "experts for ranges of noise in one task (its guidance networks: not yet)",
        "time_ranges.md",
        tests=(
            f"{_RANGES}test_experts_share_no_unit_and_leave_none_out",
            f"{_RANGES}test_ranges_are_half_open_and_a_boundary_is_in_one_only",
        ),
    ),
    System(
        "Denoising Task Routing",
        "2310.07138",
        "a window of a task's units that moves with the noise",
        "time_ranges.md",
        tests=(
            f"{_RANGES}test_a_sliding_window_has_its_width_and_slides_late",
            f"{_RANGES}test_units_outside_their_window_get_no_gradient_at_all",
            f"{_RANGES}test_a_routed_task_beats_an_unrouted_one_of_its_rank",
        ),
    ),
    System(
        "CycleDiffusion",
        "2210.05559",
        "one task's picture drawn again by another",
        "translate.md",
        tests=(
            f"{_TRANSLATE}test_the_same_task_gives_the_pictures_back",
            f"{_TRANSLATE}test_red_becomes_blue_and_keeps_its_edges",
            f"{_TRANSLATE}test_fresh_noise_loses_the_edges",
            "tests/comfy/test_translate.py::test_pocket_pictures_come_back_in_both_hosts",
        ),
    ),
    System(
        "Guided sampling",
        "2408.02078",
        "any differentiable loss on the predicted picture; no face identity, on purpose",
        "guidance.md",
        tests=(
            f"{_GUIDANCE}test_guided_samples_have_a_smaller_loss",
            f"{_GUIDANCE}test_outside_the_mask_lies_the_source",
            f"{_GUIDANCE}test_switched_off_it_is_plain_sampling_to_the_bit",
            "tests/comfy/test_guidance.py::test_through_the_vae_on_the_pocket_base",
        ),
    ),
    System(
        "DiffuseVAE, form 1",
        "2201.00308",
        "refine: a coarse picture as control; a heavy JPEG comes 1 dB nearer to the true picture, "
        "soft pictures become sharp, and not that much nearer",
        "refine.md",
        tests=(
            f"{_REFINE}test_heavy_jpeg_comes_a_decibel_nearer_to_the_true_pictures",
            f"{_REFINE}test_soft_pictures_become_sharp_and_stay_as_near",
            f"{_REFINE}test_a_wrong_coarse_picture_is_followed",
            f"{_REFINE}test_a_path_between_two_coarse_pictures_is_a_path_between_two_results",
        ),
    ),
    System(
        "Diffusion features",
        "2307.08702",
        "features of any block and noise level, and a linear probe",
        "features.md",
        tests=(
            "tests/systems/test_features.py::test_features_are_the_means_of_what_a_block_gives",
            "tests/systems/test_features.py::"
            "test_a_trained_base_tells_apart_what_a_random_one_and_mean_colours_do_not",
        ),
    ),
    System(
        "REPA",
        "2410.06940",
        "an alignment loss while training (no gain on the pocket base)",
        "training_helpers.md",
        tests=(
            f"{_ALIGN}test_the_block_comes_to_see_what_the_encoder_sees",
            f"{_ALIGN}test_the_term_alone_moves_the_blocks_up_to_its_own_and_no_other",
            f"{_ALIGN}test_no_weight_is_no_flag_bit_for_bit_and_a_weight_is_not",
        ),
    ),
    System(
        "Condition embedding perturbation",
        "2405.20494",
        "the setting `perturb`",
        "training_helpers.md",
        tests=(
            f"{_PROMPTS}test_perturbations_have_the_papers_size",
            f"{_PROMPTS}test_what_reaches_the_base_is_perturbed_but_never_its_null_prompt",
            f"{_PROMPTS}test_no_perturbation_draws_nothing_and_changes_no_bit",
        ),
    ),
    System(
        "InvDiff",
        "2412.08480",
        "a task that treats inferred groups alike",
        "training_helpers.md",
        tests=(
            f"{_DEBIAS}test_a_planted_minority_is_found_prompt_by_prompt",
            f"{_DEBIAS}test_the_few_do_as_well_as_the_many_and_without_it_they_do_not",
            f"{_DEBIAS}test_no_weight_is_the_usual_training_bit_for_bit",
        ),
    ),
    System(
        "Subspace clustering view",
        "2409.02426",
        "the rank `auto`: a spectrum says where ranks are worth most",
        "auto_rank.md",
        tests=("tests/core/test_auto_rank.py::test_planted_rank_is_found",),
    ),
    System(
        "One parameterisation",
        "2510.21890",
        "epsilon, v, clean data and flows, with one clock of log-SNR",
        "how_it_works.md",
        tests=(
            f"{_OBJECTIVE}test_conversions_agree_with_the_definitions",
            f"{_OBJECTIVE}test_one_log_snr_is_the_same_noise_on_every_base",
        ),
    ),
    System(
        "DeepCache",
        "2312.00858",
        "tasks inside cached blocks; the cache is emptied when a task changes",
        "compatibility_nodes.md",
        "the DeepCache package",
        (f"{_CACHES}test_deepcache",),
    ),
    System(
        "Video-Infinity",
        "2406.16260",
        "long videos in windows",
        "compatibility_nodes.md",
        "ComfyUI's context windows",
        (f"{_NODES}test_both_orders_are_the_formula[context windows]",),
    ),
    System("Faster Diffusion", "2312.09608", "the U-Net's encoder at key steps alone"),
    System("Region-adaptive sampling", "2502.10389", "fewer tokens where little happens"),
    System("DivControl", "2507.23620", "shared and own parts of many control tasks"),
    System("Switch-DiT", "2403.09176", "a learned gate over experts by noise"),
    System("DiT-MoE", "2407.11633", "tasks on bases with experts of their own"),
    System("DDAE++", "2505.10999", "a base told of its own features"),
    System("MMD-DDM", "2301.07969", "tasks for few steps"),
    System("BOOT", "2306.05544", "tasks for one step, trained without data"),
    System("EchoDistill", "2510.20512", "a concept for a base of many steps and one of few"),
    System("MT-Diffusion", "2407.17571", "pictures with their masks or labels"),
    System("DiffDis", "2308.09306", "texts found for pictures"),
    System("D2NWG", "2402.18153", "tasks drawn from a model of tasks"),
    System("Reward-directed generation", "2404.07771", "a task told how much of a reward to give"),
)
