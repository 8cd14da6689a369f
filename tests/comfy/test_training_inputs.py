"""What the training nodes take in: noise, prompts, latents, pictures, settings."""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def error(part: Any) -> type[Exception]:
    return part("diffscaler_core").DiffScalerError


SAMPLINGS = [
    ("EPS", "ModelSamplingDiscrete", {}),
    ("V_PREDICTION", "ModelSamplingDiscrete", {}),
    ("V_PREDICTION", "ModelSamplingDiscrete", {"zsnr": True}),
    ("V_PREDICTION", "ModelSamplingContinuousEDM", {}),
    ("EDM", "ModelSamplingContinuousEDM", {"sigma_data": 0.5, "sigma_max": 80.0}),
    ("X0", "ModelSamplingDiscrete", {}),
    ("CONST", "ModelSamplingDiscreteFlow", {"shift": 3.0}),
    ("CONST", "ModelSamplingFlux", {}),
    ("COSMOS_RFLOW", "ModelSamplingCosmosRFlow", {}),
]


def sampling_of(kind: str, base: str, settings: dict[str, Any]) -> Any:
    import comfy.model_sampling as host

    bases = (getattr(host, base), getattr(host, kind))
    config = type("Config", (), {"sampling_settings": settings})
    return type("Sampling", bases, {})(config)


@pytest.mark.parametrize(("kind", "base", "settings"), SAMPLINGS)
def test_noise_and_predictions_mean_the_same_as_in_comfyui(
    part: Any, kind: str, base: str, settings: dict[str, Any]
) -> None:
    """Whatever a model answers, both read the same clean picture out of it."""
    maths = part("diffscaler_core.training.objective")
    sampling = sampling_of(kind, base, settings)
    noise = part("nodes.noise").noise_of(sampling)
    generator = torch.Generator().manual_seed(0)
    latents, eps, answer = (torch.randn(5, 4, 3, 3, generator=generator) for _ in range(3))
    t = torch.tensor([0.05, 0.3, 0.5, 0.7, 0.95])
    timestep, x_t = noise.objective.noisy(latents * noise.scale, eps, t)
    x, sigma = noise.enter(x_t, timestep)
    _, alpha, spread = noise.objective.at(t)
    clean, _ = maths.separate(noise.objective.kind, answer * noise.sign, x_t, alpha, spread)
    theirs = sampling.calculate_denoised(sigma, answer, x)
    assert torch.allclose(clean / noise.scale, theirs, rtol=1e-3, atol=2e-4)
    # and x is what its samplers would have made of the same picture and noise
    mixed = sampling.noise_scaling(sigma, eps.clone(), latents)
    assert torch.allclose(x, mixed, rtol=1e-4, atol=1e-4)
    if noise.objective.alphas_cumprod is not None:
        index = (t * 1000).long()
        assert torch.allclose(
            sampling.timestep(sigma).float(), sampling.timestep(sampling.sigmas[index]).float()
        )


def test_models_that_denoise_no_noise_are_refused(part: Any, error: type[Exception]) -> None:
    for kind, base in (
        ("IMG_TO_IMG", "ModelSamplingDiscrete"),
        ("IMG_TO_IMG_FLOW", "ModelSamplingDiscreteFlow"),
    ):
        with pytest.raises(error, match=f"{kind}.* cannot be trained here"):
            part("nodes.noise").noise_of(sampling_of(kind, base, {}))


def row(length: int, seed: int, **more: Any) -> tuple[Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, 16, generator=generator)
    return torch.randn(1, length, 32, generator=generator), {"pooled_output": pooled, **more}


def test_prompts_of_different_lengths_are_made_equal(part: Any) -> None:
    conditions = part("nodes.conditions")
    rows, null = [row(4, 1), row(8, 2)], row(4, 3)
    repeated = conditions.prompts_of(("a", "b"), rows, null, repeat=True)
    assert torch.equal(repeated.context[0], torch.cat([rows[0][0][0]] * 2))
    filled = conditions.prompts_of(("a", "b"), rows, null)
    assert torch.equal(filled.context[0, :4], rows[0][0][0])
    assert not filled.context[0, 4:].any()
    assert filled.context.shape == (2, 8, 32)
    assert torch.equal(filled.pooled[1], rows[1][1]["pooled_output"][0])
    assert filled.null(1)["context"].shape == (1, 8, 32)


def test_every_model_is_told_what_its_own_sampler_would_tell_it(part: Any, tiny: Any) -> None:
    """One call for the whole batch, each row with its own prompt."""
    import comfy.samplers

    model = tiny.load("tiny_flux").model
    prompts = [row(6, seed, guidance=2.0) for seed in (1, 2, 3)]
    conditions = part("nodes.conditions")
    batch = conditions.prompts_of(("a", "b", "c"), prompts, row(6, 4))
    facts = conditions.facts_of(prompts)
    assert facts == {"guidance": 2.0}
    x = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    told = conditions.arguments_of(model, x, batch(torch.arange(3)), facts)
    sigma = torch.tensor([0.2, 0.5, 0.8])
    together = model.apply_model(x, sigma, **told)
    for i, (context, more) in enumerate(prompts):
        (cond,) = comfy.samplers.encode_model_conds(
            model.extra_conds,
            [{"cross_attn": context, "model_conds": {}, **more}],
            x[i : i + 1],
            x.device,
            "positive",
        )
        own = {
            name: c.process_cond(batch_size=1, area=None).cond
            for name, c in cond["model_conds"].items()
        }
        alone = model.apply_model(x[i : i + 1], sigma[i : i + 1], **own)
        assert torch.allclose(together[i : i + 1], alone, atol=1e-5)


def test_what_training_cannot_follow_is_refused(part: Any, error: type[Exception]) -> None:
    conditions = part("nodes.conditions")
    with pytest.raises(error, match="carries control, area, which"):
        conditions.rows_of([[*row(4, 1)[:1], {"control": object(), "area": (1, 1, 0, 0)}]])
    with pytest.raises(error, match=r"differ in 'guidance' \(3.5 and 1.0\)"):
        conditions.facts_of([row(4, 1, guidance=3.5), row(4, 2, guidance=1.0)])


def test_latents_of_several_shapes_keep_their_prompts(part: Any, tiny: Any, error: Any) -> None:
    from_latents = part("nodes.training_data").from_latents
    model = tiny.load("tiny_sd3").model
    wide, tall = torch.randn(2, 16, 4, 8), torch.randn(1, 16, 8, 4)
    latents = [{"samples": wide[:1]}, {"samples": tall}, {"samples": wide[1:]}]
    data = from_latents(model, 1.0, latents, ["a", "b", "c"])
    assert [tuple(b.shape) for b in data.buckets] == [(1, 2, 16, 4, 8), (1, 1, 16, 8, 4)]
    assert [data.prompts[i] for i in data.index.tolist()] == ["a", "c", "b"]
    assert torch.allclose(data.buckets[0][0, 1], model.process_latent_in(wide[1]))
    with pytest.raises(error, match="3 latents but 2 prompts"):
        from_latents(model, 1.0, latents, ["a", "b"])
    with pytest.raises(error, match="have 4 channels, this model has 16"):
        from_latents(model, 1.0, [{"samples": torch.zeros(1, 4, 8, 8)}], ["a"])


def test_core_lists_train_as_one_run_with_their_own_prompts(part: Any, tiny: Any) -> None:
    job = part("nodes.training_job")
    prompts = [row(8, seed) for seed in (1, 2, 1)]
    inputs = dict(
        model=tiny.load("tiny_sd3"),
        name="lists",
        folder="(none)",
        resolution=64,
        method="diffscaler",
        rank=2,
        steps=3,
        batch_size=3,
        learning_rate=1e-2,
        seed=0,
        resume="never",
        latents=[{"samples": torch.randn(1, 16, 8, 8)} for _ in prompts],
        positive=[[list(one)] for one in prompts],
        validation_latents=[{"samples": torch.randn(1, 16, 8, 8)}],
        validation_positive=[[list(prompts[1])]],
    )
    task, losses, samples, summary = job.train(inputs)
    assert len(losses["loss"]) == 3
    assert samples.shape == (1, 8, 32, 3)  # rough colours, as there is no VAE: two of each prompt
    assert "validation loss" in summary
    training = task.info["training"]
    assert training["drop"] == 0  # no empty prompt is known
    assert training["images"] == 3
    assert not task.conditioning


def test_folders_outside_the_input_folder_are_refused(part: Any, error: type[Exception]) -> None:
    folder_of = part("nodes.training_data").folder_of
    for choice in ("../output", "/etc", "nowhere"):
        with pytest.raises(error, match=r"no folder .* in ComfyUI's input folder"):
            folder_of(choice)


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "..", ""])
def test_no_name_leads_out_of_the_runs_folder(part: Any, name: str) -> None:
    training = part("diffscaler_core.training")
    data = training.TrainingData(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1).long(), ("a",))
    prompts = training.Prompts(("a",), {}, {})
    inputs = {
        "model": type(
            "M",
            (),
            {
                "patches": {},
                "model": torch.nn.ModuleDict({"diffusion_model": torch.nn.Linear(1, 1)}),
            },
        )()
    }
    inputs["model"].model.diffusion_model = inputs["model"].model["diffusion_model"]
    folders = part("nodes.training_folder")
    config = training.TrainingConfig(name=name or "task")
    folder, _ = folders.run_folder(inputs, config, data, prompts)
    runs = Path(folders.folder_paths.get_output_directory()) / "diffscaler" / "runs"
    assert folder.path.parent == runs
    assert folder.path.name not in ("..", ".")


def test_every_setting_of_the_trainer_is_on_one_of_the_two_nodes(part: Any) -> None:
    inputs = part("nodes.training_inputs")
    config = part("diffscaler_core.training").TrainingConfig
    ours = {"batch": "batch_size", "lr": "learning_rate"}
    on_nodes = {i.id for i in (*inputs.training_inputs(), *inputs.settings_inputs())}
    fields = {ours.get(f.name, f.name) for f in dataclasses.fields(config)}
    # no prior pictures here yet; one process; models without stretched positions; and what wants
    # an encoder or looks for groups is the command's
    command = {name for name in fields if name.startswith(("repa", "debias"))}
    others = {"prior_weight", "prior_share", "shard", "at_resolution"}
    assert fields - on_nodes <= others | command


def test_settings_reach_the_trainer(part: Any, tiny: Any) -> None:
    config_of = part("nodes.training_job").config_of
    settings = part("nodes.training_settings").DiffScalerTrainingSettings
    defaults = {i.id: i.default for i in part("nodes.training_inputs").settings_inputs()}
    told = settings.execute(**{**defaults, "ema": 0.9, "targets": "attention"}).result[0]
    inputs = dict(
        name=" ", method="lora", rank=3, steps=5, batch_size=2, learning_rate=1e-2, seed=7
    )
    config = config_of({**inputs, "settings": told}, tiny.load("tiny_sd3"))
    assert (config.ema, config.targets, config.exclude) == (0.9, "attention", None)
    assert (config.name, config.lr, config.lr_scale_shift) == ("task", 1e-2, 3e-2)
    assert (config.batch, config.precision) == (2, "no")
    assert (config.rank, told["rank_budget"]) == (3, "")
    told = {**told, "rank_budget": " 0.4% "}
    config = config_of({**inputs, "settings": told}, tiny.load("tiny_sd3"))
    assert (config.rank, config.rank_budget) == ("auto", "0.4%")


@pytest.fixture(scope="module")
def clip(comfy: ModuleType) -> Any:
    """SD 1.5's text encoder with random weights, as its loader node makes it."""
    import comfy.sd
    import comfy.sd1_clip

    with torch.inference_mode():
        model = comfy.sd1_clip.SDClipModel(dtype=torch.float32, device="cpu")
        state = {
            name: torch.randn(tensor.shape) * 0.02 + float("norm" in name and "weight" in name)
            for name, tensor in model.transformer.state_dict().items()
        }
        return comfy.sd.load_text_encoder_state_dicts(
            [state], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION
        )


def given(model: Any, **more: Any) -> dict[str, Any]:
    plain = dict(method="diffscaler", rank=2, steps=2, batch_size=3, learning_rate=1e-2, seed=0)
    settings = dict(sample_every=0, sample_steps=2)
    return {
        **plain,
        "model": model,
        "name": "given",
        "folder": "(none)",
        "resolution": 64,
        "resume": "never",
        "settings": settings,
        **more,
    }


def test_texts_are_encoded_by_comfyuis_own_text_encoder(part: Any, tiny: Any, clip: Any) -> None:
    texts = ("a cat", "a dog", " ".join(["word"] * 120))
    with torch.inference_mode():  # as nodes run
        model = tiny.load("tiny_unet")
        positive = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in texts]
        latents = [{"samples": torch.randn(1, 4, 8, 8)} for _ in texts]
        assert [one[0][0].shape[1] for one in positive] == [77, 77, 154]
        inputs = given(model, clip=clip, latents=latents, positive=positive)
        task = part("nodes.training_job").train(inputs)[0]
    assert "drop" not in task.info["training"]  # the empty prompt is known: the default holds
    encoded = part("nodes.training").denoiser_of(model, None, clip).encode_text(list(texts))
    assert encoded["context"].shape == (3, 154, 768)
    assert torch.equal(encoded["context"][0, :77], positive[0][0][0][0])


def test_images_of_several_sizes_train_with_one_prompt(part: Any, comfy: ModuleType) -> None:
    import comfy.sd
    import comfy.utils

    pocket = Path(__file__).resolve().parents[2] / "assets" / "pocket"
    with torch.inference_mode():
        file = pocket / "diffusion_models" / "diffscaler_pocket.safetensors"
        model = comfy.sd.load_diffusion_model(str(file))
        file = pocket / "vae" / "diffscaler_pocket_vae.safetensors"
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)))
        words = part("diffscaler_core").load_task(pocket / "diffscaler" / "words.safetensors")
        context, pooled = words.prompt("cat")
        inputs = given(
            model,
            vae=vae,
            images=[torch.rand(2, 64, 64, 3), torch.rand(1, 96, 64, 3)],
            positive=[[[context, {"pooled_output": pooled}]]],
        )
        task, _, samples, summary = part("nodes.training_job").train(inputs)
        assert "pictures: 3" in summary
        assert samples.shape == (1, 64, 128, 3)  # two of the one prompt
        inputs["images"] = [torch.rand(1, 20, 20, 3)]
        with pytest.raises(ValueError, match="image 1 of 1: 20x20 is too small for 64x64"):
            part("nodes.training_job").train(inputs)
    assert task.name == "given"
