"""What every node of the pack promises, checked over NODES."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FROZEN = {
    "DiffScalerLoadTask": ["task_name"],
    "DiffScalerApplyTask": [
        "model",
        "task",
        "strength",
        "start_percent",
        "end_percent",
        "scale",
        "shift",
        "subspace",
        "component",
        "region",
    ],
    "DiffScalerControl": [
        *("model", "positive", "negative", "task", "vae", "image", "strength", "start_percent"),
        *("end_percent", "mask", "control_in_uncond", "component"),
    ],
    "DiffScalerStackTasks": ["model", "tasks", "strengths", "component"],
    "DiffScalerRouteTasks": [
        *("model", "positive", "tasks", "strengths", "mode", "negative", "component"),
    ],
    "DiffScalerRouteExperts": ["model", "router_name", "tasks", "mode", "strength", "component"],
    "DiffScalerScheduleTask": [
        *("task", "points", "interpolation", "start", "end", "fade", "keyframes"),
    ],
    "DiffScalerCompareTasks": [
        *("model", "positive", "negative", "latent", "tasks", "strengths", "include_base"),
        "component",
    ],
    "DiffScalerTaskGrid": ["images", "names", "columns"],
    "DiffScalerScaleTask": ["task", "strength", "scale", "shift", "subspace", "blocks"],
    "DiffScalerCombineTasks": ["tasks", "strengths", "name"],
    "DiffScalerTaskInfo": ["task"],
    "DiffScalerSaveTask": [
        "task",
        "filename_prefix",
        "dtype",
        "thumbnail",
        "title",
        "author",
        "description",
    ],
    "DiffScalerExtractTask": [
        *("tuned", "base", "name", "rank", "energy", "scale", "targets", "exclude"),
    ],
    "DiffScalerImportLoRA": ["lora_name", "text_encoder"],
    "DiffScalerTranslate": [
        *("source_model", "target_model", "source_positive", "target_positive", "negative"),
        *("latent", "seed", "steps", "cfg", "scheduler", "strength", "eta"),
    ],
    "DiffScalerGuidanceLoss": ["kind", "weight", "colour", "image", "mask", "losses"],
    "DiffScalerGuideModel": [
        *("model", "losses", "strength", "start_percent", "end_percent", "gradient", "vae"),
    ],
    "DiffScalerPickTask": [
        *("model", "vae", "image", "tasks", "probes", "threshold", "if_none", "seed"),
        *("conditioning", "least", "halving", "batch_size"),
    ],
    "DiffScalerTaskConditioning": ["task", "prompt"],
    "DiffScalerTrainTask": [
        *("model", "name", "folder", "resolution", "method", "rank", "steps", "batch_size"),
        *("learning_rate", "seed", "resume", "vae", "clip", "words", "images", "captions"),
        *("latents", "positive", "negative", "task", "validation_folder"),
        *("validation_latents", "validation_positive", "settings"),
        *("control_images", "control", "control_from", "control_folder"),
    ],
    "DiffScalerTrainingSettings": [
        *("targets", "exclude", "lr_scale_shift", "lr_prompts", "optimizer", "schedule"),
        *("warmup", "restarts", "weight_decay", "beta1", "beta2", "clip", "ema", "accumulate"),
        *("flip", "crops", "buckets", "skip_bad", "prompts", "drop", "prompt_noise", "perturb"),
        *("perturb_gamma", "timesteps", "timestep_mean", "timestep_std", "timestep_shift"),
        *("timestep_uniform", "weighting", "snr_gamma", "chain_tau", "validation_share"),
        *("validate_every", "validation_times", "sample_every", "sample_steps", "guidance"),
        *("save_every", "keep", "precision", "checkpointing", "keep_latents"),
        *("control_drop", "lr_control", "control_rank", "control_activation", "control_embedding"),
        *("gamma_blocks", "rank_budget", "activation"),
        *("experts", "time_route", "route_alpha", "route_beta"),
    ],
}


@pytest.fixture(scope="module")
def schemas(pack: ModuleType) -> list[Any]:
    return [node.GET_SCHEMA() for node in pack.nodes.NODES]


def test_ids_and_inputs_are_frozen(schemas: list[Any]) -> None:
    ids = [schema.node_id for schema in schemas]
    assert len(set(ids)) == len(ids)
    found = {schema.node_id: [i.id for i in schema.inputs] for schema in schemas}
    assert {name: found[name] for name in FROZEN} == FROZEN


def test_every_node_says_what_it_is(pack: ModuleType, schemas: list[Any]) -> None:
    for node, schema in zip(pack.nodes.NODES, schemas, strict=True):
        assert schema.node_id == node.__name__
        assert re.fullmatch(r"DiffScaler[A-Z]\w+", schema.node_id)
        assert schema.category.split("/")[0] == "DiffScaler"
        assert "DiffScaler" in schema.display_name
        assert len(schema.description) > 40
        assert "diffscaler" in schema.search_aliases


def test_every_input_and_output_has_a_tooltip(schemas: list[Any]) -> None:
    for schema in schemas:
        for socket in [*schema.inputs, *schema.outputs]:
            assert socket.tooltip, (schema.node_id, socket.id)
            assert socket.tooltip.strip()[-1] == ".", (schema.node_id, socket.id)
        for output in schema.outputs:
            assert output.display_name, schema.node_id


def test_defaults_lie_in_their_ranges(schemas: list[Any]) -> None:
    for schema in schemas:
        for one in schema.inputs:
            low, high = getattr(one, "min", None), getattr(one, "max", None)
            if low is not None and high is not None:
                assert low <= one.default <= high
            options = getattr(one, "options", None)
            if options and one.default is not None:
                assert one.default in options


def test_every_schema_builds_as_comfyui_asks_for_it(pack: ModuleType) -> None:
    for node in pack.nodes.NODES:
        info = node.GET_NODE_INFO_V1()
        assert info["name"] == node.__name__
        assert info["input"]


def test_node_files_are_named_after_their_node_and_stay_thin(pack: ModuleType) -> None:
    for node in pack.nodes.NODES:
        words = re.findall(r"LoRA|[A-Z][a-z]+", node.__name__.removeprefix("DiffScaler"))
        file = ROOT / "nodes" / f"{'_'.join(words).lower()}.py"
        lines = file.read_text().splitlines()
        assert len(lines) <= 120, file
        body = next(i for i, line in enumerate(lines) if line.endswith("-> io.NodeOutput:"))
        assert len(lines) - body <= 16, file
