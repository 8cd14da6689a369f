"""Training on ComfyUI's own models, in this process: the same numbers as in diffusers."""

import runpy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "assets" / "pocket"
CASES = runpy.run_path(str(Path(__file__).with_name("parity_cases.py")))["CASES"]


def pictures(train: ModuleType, count: int = 12, shape: tuple[int, ...] = (16, 8, 8)) -> Any:
    """Random latents of two of the pocket base's words."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, count, *shape, generator=generator)
    return train.TrainingData(latents, torch.arange(count) % 2, ("cat", "house"))


def changed(train: ModuleType, **settings: Any) -> Any:
    defaults: dict[str, Any] = dict(steps=3, batch=4, rank=2, lr=1e-2, warmup=0, seed=3)
    return train.TrainingConfig(**{**defaults, **settings})


def farthest(one: Any, two: Any) -> float:
    assert one.layers.keys() == two.layers.keys()
    return max(
        float((t - two.layers[layer][name]).abs().max())
        for layer, tensors in one.layers.items()
        for name, t in tensors.items()
    )


def test_both_hosts_give_the_same_loss_at_the_same_noise(
    both: Any, train: ModuleType, words: Any
) -> None:
    data = pictures(train)
    losses = [
        train.validation_loss(d, data, train.prompts_for(d, data.prompts, words=words), times=8)
        for d in both
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_fused_layers_train_as_diffusers_separate_ones(
    both: Any, part: Any, train: ModuleType, words: Any
) -> None:
    start = part("diffscaler_core").new_task(both[1].model, rank=2, targets="all", seed=3)
    tasks = [
        train.train_task(d, pictures(train), changed(train), words=words, task=start) for d in both
    ]
    assert any("to_q" in layer for layer in tasks[0].layers)
    assert farthest(*tasks) < 1e-4
    assert any(bool(own["up"].any()) for own in tasks[0].layers.values())


def looked_at(pixels: Tensor) -> Tensor:
    """Stands in for a picture encoder: 4 x 4 tokens of a picture."""
    return torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)


def test_both_hosts_align_the_same_block_with_an_encoder(
    both: Any, part: Any, train: ModuleType, words: Any
) -> None:
    start = part("diffscaler_core").new_task(both[1].model, rank=2, seed=3)
    found, told = [], []
    for denoiser in both:
        for config in (changed(train, repa="toy", repa_until=1.0), changed(train)):
            seen: list[Any] = []
            task = train.train_task(
                replace(denoiser, decode=lambda x0: x0[:, :3]),
                pictures(train), config, words=words, task=start, encoder=looked_at,
                on_step=lambda now, seen=seen: seen.append(now.alignment),
            )  # fmt: skip
            found.append(task)
            told.append(seen)
    assert farthest(found[0], found[2]) < 1e-4
    assert farthest(found[0], found[1]) > 1e-4
    assert told[0] == pytest.approx(told[2], abs=1e-4)
    assert told[1] == [None] * 3


def test_a_new_task_has_the_names_shapes_and_start_that_diffusers_gives_it(
    both: Any, part: Any
) -> None:
    new_task = part("diffscaler_core").new_task
    ours, theirs = new_task(both[0].shape_model, seed=3), new_task(both[1].model, seed=3)
    assert ours.info["base"] == theirs.info["base"]
    shapes = [
        {layer: {n: t.shape for n, t in own.items()} for layer, own in task.layers.items()}
        for task in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    assert farthest(ours, theirs) == 0


class Bench:
    """Trains on tiny models, and knows what it trained."""

    def __init__(self, part: Any, tiny: Any) -> None:
        self.part, self.tiny = part, tiny
        self.train = part("diffscaler_core.training")

    def load(self, name: str) -> Any:
        with torch.inference_mode():  # as a loader node does it
            return self.tiny.load(name)

    def denoiser(self, model: Any, **more: Any) -> Any:
        return self.part("nodes.training").denoiser_of(model, **more)

    def data(self, model: Any) -> tuple[Any, Any]:
        """Latents that one prompt shows again and again, and the prompt."""
        channels = model.model.latent_format.latent_channels
        width = 768 if channels == 4 else 32
        data = pictures(self.train, 4, (channels, 8, 8))
        generator = torch.Generator().manual_seed(1)
        fields = {
            "context": torch.randn(2, 8, width, generator=generator),
            "pooled": torch.randn(2, 16, generator=generator),
        }
        null = {name: torch.zeros_like(tensor[:1]) for name, tensor in fields.items()}
        return data, self.train.Prompts(data.prompts, fields, null)

    def run(self, model: Any, denoiser: Any = None, **settings: Any) -> tuple[Any, list[float]]:
        """Trains; returns the task and its losses."""
        losses: list[float] = []
        data, prompts = self.data(model)
        task = self.train.train_task(
            denoiser or self.denoiser(model),
            data,
            changed(self.train, **{"drop": 0.0, **settings}),
            prompts=prompts,
            on_step=lambda now: losses.append(now.loss),
        )
        return task, losses

    def loss(self, model: Any, task: Any = None) -> float:
        data, prompts = self.data(model)
        return self.train.validation_loss(self.denoiser(model), data, prompts, task)


@pytest.fixture(scope="module")
def bench(part: Any, tiny: Any) -> Bench:
    return Bench(part, tiny)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("tiny_sd3", 12),
        ("tiny_flux", 12),
        ("tiny_unet", 4),
        ("tiny_flux_float8_e4m3fn", 8),
        ("tiny_flux_int8_tensorwise", 8),
    ],
)
def test_every_kind_of_model_learns_and_stays_what_it_was(
    bench: Bench, clean: Any, name: str, steps: int
) -> None:
    import comfy.model_management

    model = clean(bench.load(name))
    before = bench.loss(model)
    task, _ = bench.run(model, steps=steps, lr=2e-2, lr_scale_shift=2e-2)
    assert bench.loss(model, task) < 0.97 * before
    assert bench.loss(model) == before
    idle = [layer for layer, own in task.layers.items() if not own["up"].any()]
    # Gradients came through every layer, quantised ones too. (SD3's last block reads no text.)
    assert [name for name in idle if "transformer_blocks.1.attn.add_q_proj" not in name] == []
    assert not comfy.model_management.in_training  # type: ignore[attr-defined]
    assert not any(p.requires_grad for p in model.model.parameters())


@pytest.mark.parametrize("name", ["tiny_sd3", "tiny_flux", "tiny_unet"])
def test_an_encoder_is_followed_on_every_kind_of_model(bench: Bench, clean: Any, name: str) -> None:
    model = clean(bench.load(name))
    data, prompts = bench.data(model)
    seen: list[float] = []
    bench.train.train_task(
        bench.denoiser(model),
        data,
        changed(bench.train, steps=40, repa="toy", repa_weight=5.0, repa_until=1.0),
        prompts=prompts,
        encoder=looked_at,
        on_step=lambda now: seen.append(now.alignment),
    )
    assert seen[-1] > seen[0] + 0.3


@pytest.mark.parametrize("name", ["tiny_sd3", "tiny_flux"])
def test_checkpointing_and_offloading_change_no_gradient(
    bench: Bench, clean: Any, name: str
) -> None:
    model = clean(bench.load(name))
    plain, _ = bench.run(model)
    checkpointed, _ = bench.run(model, checkpointing=True)
    assert farthest(plain, checkpointed) < 1e-6
    model.model.model_lowvram = True  # as a partial load leaves it
    try:
        offloaded, _ = bench.run(model)
        both, _ = bench.run(model, checkpointing=True)
    finally:
        model.model.model_lowvram = False
    assert max(farthest(plain, offloaded), farthest(plain, both)) < 1e-6


def test_gradients_are_right_where_blocks_work_in_place(bench: Bench, part: Any) -> None:
    """Against torch's own, slower, way to keep what in-place operations overwrite."""
    model = bench.load("tiny_flux")
    ours, _ = bench.run(model)
    held_model = part("nodes.held_model")
    norms, held_model._NORMS = held_model._NORMS, frozenset()
    try:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            bench.run(model)
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            torchs, _ = bench.run(model)
    finally:
        held_model._NORMS = norms
    assert farthest(ours, torchs) < 1e-6


@pytest.mark.parametrize("name", ["tiny_sd3", "tiny_unet", "tiny_flux"])
def test_checkpointing_recomputes_the_blocks(bench: Bench, part: Any, name: str) -> None:
    model = bench.load(name)
    blocks = part("nodes.held_model").blocks_of(model.model.diffusion_model)
    calls: list[int] = []
    inner = [next(m for m in b.modules() if hasattr(m, "weight")) for b in blocks]
    for layer in inner:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    counts = []
    for checkpointing in (False, True):
        bench.run(model, steps=1, checkpointing=checkpointing)
        counts.append(len(calls))
        calls.clear()
    assert len(blocks) >= 2
    assert counts[1] - counts[0] == len(blocks)


def pocket_inputs(part: Any, pocket: Any, words: Any, **changes: Any) -> dict[str, Any]:
    """The training node's inputs: the pack's own pictures on the pocket base."""
    import comfy.sd
    import comfy.utils

    file = POCKET / "vae" / "diffscaler_pocket_vae.safetensors"
    with torch.inference_mode():
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)))  # type: ignore[attr-defined]
    plain = dict(method="diffscaler", rank=2, batch_size=4, learning_rate=1e-2, seed=0)
    settings = dict(sample_every=0, sample_steps=2, warmup=0)
    return {
        **plain,
        "model": pocket,
        "vae": vae,
        "words": words,
        "name": "run",
        "folder": "example: ink drawings",
        "resolution": 64,
        "steps": 6,
        "resume": "auto",
        "settings": settings,
        **changes,
    }


@pytest.fixture
def stop_in(pocket: Any) -> Iterator[Callable[[int], None]]:
    """Presses the stop button in the middle of the model's n-th call."""
    import comfy.model_management

    layer = pocket.model.diffusion_model.joint_blocks[1].x_block.mlp.fc1
    calls = [0, 0]

    def press(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == calls[1]:
            comfy.model_management.interrupt_current_processing()  # type: ignore[attr-defined]

    handle = layer.register_forward_pre_hook(press)

    def stop(n: int) -> None:
        calls[:] = [0, n]

    yield stop
    handle.remove()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_stopping_keeps_the_state_and_the_same_settings_go_on_from_it(
    part: Any, pocket: Any, words: Any, stop_in: Any, checkpointing: bool, caplog: Any
) -> None:
    import comfy.model_management as management

    job = part("nodes.training_job")
    name = f"stopped {checkpointing}"
    inputs = pocket_inputs(part, pocket, words, name=name)
    inputs["settings"] = {**inputs["settings"], "checkpointing": checkpointing}
    stop_in(4)
    with pytest.raises(management.InterruptProcessingException):  # type: ignore[attr-defined]
        job.train(inputs)
    assert "go on from there" in caplog.text
    assert not management.in_training  # type: ignore[attr-defined]
    assert not [n for n, m in pocket.model.named_modules() if "forward" in m.__dict__]
    output = part("nodes.training_folder").folder_paths.get_output_directory()
    (folder,) = Path(output).glob(f"diffscaler/runs/{name}-*")
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert checkpoint.name in [f"step-{step:09}.safetensors" for step in (1, 2, 3, 4)]
    stop_in(0)
    resumed, losses, _, summary = job.train(inputs)
    whole, all_losses, _, _ = job.train({**inputs, "resume": "never"})
    assert farthest(resumed, whole) == 0
    assert losses == all_losses
    assert len(losses["loss"]) == 6
    assert "steps: 6" in summary
    again = job.train(inputs)[0]  # a finished run is not trained twice
    assert farthest(again, whole) == 0


def test_what_was_trained_can_be_applied_at_once(part: Any, pocket: Any, words: Any) -> None:
    import nodes

    job, patching = part("nodes.training_job"), part("nodes.patching")
    before = {name: t.clone() for name, t in pocket.model.state_dict().items()}
    context, pooled = words.prompt("cat")
    cond = [[context, {"pooled_output": pooled}]]

    def sample(model: Any) -> Tensor:
        latent = {"samples": torch.zeros(1, 16, 8, 8)}
        with torch.inference_mode():
            sampled = nodes.KSampler().sample(
                model, 0, 2, 3.0, "euler", "normal", cond, cond, latent, 1.0
            )
            return sampled[0]["samples"].clone()

    base = sample(pocket)
    with torch.inference_mode():  # as a node runs
        task, _, samples, _ = job.train(pocket_inputs(part, pocket, words, name="applied"))
    assert torch.equal(sample(pocket), base)
    assert not torch.equal(sample(patching.apply_task(pocket, task)), base)
    now = pocket.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert samples.shape[0] == 1
    assert samples.max() > 0.2


def test_two_tasks_in_one_run_become_what_each_alone_becomes(bench: Bench) -> None:
    model = bench.load("tiny_sd3")
    data, prompts = bench.data(model)
    other, _ = bench.data(model)
    other = bench.train.TrainingData(other.latents.flip(0, 1) * 0.5, other.index, other.prompts)
    config = changed(bench.train, drop=0.0)
    runs = [
        bench.train.TaskRun(name, own, prompts) for name, own in (("one", data), ("two", other))
    ]
    together = bench.train.train_tasks(bench.denoiser(model), runs, config)
    for run in runs:
        alone = bench.train.train_tasks(bench.denoiser(model), [run], config)
        assert farthest(together[run.name], alone[run.name]) < 1e-5
    assert farthest(together["one"], together["two"]) > 1e-4


def test_ranks_are_chosen_for_a_budget(part: Any, pocket: Any, words: Any) -> None:
    """In ComfyUI's own layers, fused q, k, v among them; the file has diffusers' separate ones."""
    before = {name: t.clone() for name, t in pocket.model.state_dict().items()}
    settings = dict(sample_every=0, sample_steps=2, warmup=0, rank_budget="2")
    inputs = pocket_inputs(part, pocket, words, name="chosen", settings=settings, steps=2)
    with torch.inference_mode():
        task = part("nodes.training_job").train(inputs)[0]
    ranks = {name: len(own["down"]) for name, own in task.layers.items() if "down" in own}
    even = part("diffscaler_core").new_task(
        part("nodes.training").denoiser_of(pocket).shape_model, rank=2, component="transformer"
    )
    assert len(set(ranks.values())) > 1
    spent = sum(
        own["down"].numel() + own["up"].numel() for own in task.layers.values() if "up" in own
    )
    allowed = sum(own["down"].numel() + own["up"].numel() for own in even.layers.values())
    assert 0.9 * allowed < spent <= allowed
    assert all(torch.equal(pocket.model.state_dict()[n], tensor) for n, tensor in before.items())


def test_prompts_are_learned_with_the_task(part: Any, pocket: Any, words: Any) -> None:
    inputs = pocket_inputs(part, pocket, words, name="learned", steps=3)
    inputs["settings"] = {**inputs["settings"], "prompts": "learned"}
    task = part("nodes.training_job").train(inputs)[0]
    assert len(task.prompts) == 20
    start = part("diffscaler_core.training.conditioning").learned_prompts(words, task.prompts)
    for field, learned in task.conditioning.items():
        assert float((learned - getattr(start, field)).abs().max()) > 1e-3


def test_compiled_models_are_refused(part: Any, pocket: Any) -> None:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    compiled = pocket.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager")
    with pytest.raises(part("diffscaler_core").DiffScalerError, match="this model is compiled"):
        part("nodes.training").denoiser_of(compiled)


def test_a_lora_on_the_model_stays_in_force_and_is_not_trained(
    bench: Bench, clean: Any, part: Any
) -> None:
    model = bench.load("tiny_sd3")
    key = "diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"
    shape = model.model.state_dict()[key].shape
    patched = model.clone()
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    patched.add_patches({key: ("diff", (delta,))}, 1.0)
    assert part("nodes.training").base_key(patched) != part("nodes.training").base_key(model)
    before = bench.loss(model)
    assert bench.loss(patched) != pytest.approx(before, rel=1e-4)
    bench.run(patched, steps=2)
    assert bench.loss(model) == before


def memory_of(model: Any) -> dict[str, int]:
    """Where each weight's bytes lie; a quantised one's, its first part's."""
    found = {}
    for name, weight in model.model.named_parameters():
        data = weight.data
        while hasattr(data, "__tensor_flatten__") and type(data) is not Tensor:
            data = getattr(data, data.__tensor_flatten__()[0][0])
        found[name] = data.untyped_storage().data_ptr()
    return found


@pytest.mark.parametrize(
    "name", ["tiny_sd3", "tiny_flux_float8_e4m3fn", "tiny_flux_int8_tensorwise"]
)
def test_the_weights_are_not_copied(bench: Bench, name: str) -> None:
    model = bench.load(name)
    before = memory_of(model)
    assert all(p.is_inference() for p in model.model.parameters())
    bench.run(model, steps=1)
    assert memory_of(model) == before
    assert not any(p.is_inference() for p in model.model.parameters())
