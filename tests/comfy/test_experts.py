"""Experts that a router chooses row by row, in a real ComfyUI model."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from .formula import close
from .routes import calls_of, router_site

NAMES = ("one", "two")


class Experts:
    """Two random tasks and a router that sends about half of pure noise to each."""

    def __init__(self, tiny: Any, pack: ModuleType, family: str) -> None:
        self.tiny, self.pack = tiny, pack
        self.routing = pack.nodes.expert_routing
        self.model = tiny.load(family)
        self.is_unet = family == "tiny_unet"
        width = 768 if self.is_unet else 32
        self.positive, self.negative = tiny.prompt(1, width), tiny.prompt(2, width)
        self.tasks = [
            tiny.task(self.model, 1 + i, std=0.05, name=name) for i, name in enumerate(NAMES)
        ]
        core = pack.diffscaler_core.systems
        name, site = router_site(pack, self.model)
        null = tiny.prompt(9, width)[0]
        self.width = 320 if self.is_unet else 128
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.router = core.router.Router(
                NAMES, site, self.width, 0,
                {"context": null[0], "pooled": null[1]["pooled_output"]},
            )  # fmt: skip
        self.router.last.weight.requires_grad_(False).normal_(
            generator=torch.Generator().manual_seed(4)
        )
        self.router.last.bias.requires_grad_(False).zero_()
        self.null, self.name = null, name

    def features(self, x: Tensor, sigma: Tensor) -> Tensor:
        """What the block gives, by a plain hook and a plain call, written anew."""
        seen: list[Any] = []
        module = self.model.model.diffusion_model.get_submodule(self.name)
        module = module[-1] if self.is_unet else module
        handle = module.register_forward_hook(lambda m, i, o: seen.append(o))
        context, more = self.null
        told = {} if self.is_unet else {"y": more["pooled_output"].expand(len(x), -1)}
        try:
            self.model.model.apply_model(
                x, sigma, c_crossattn=context.expand(len(x), -1, -1),
                transformer_options={"cond_or_uncond": [0]}, **told,
            )  # fmt: skip
        finally:
            handle.remove()
        # SD3's blocks give the text first, Flux' the picture
        first = hasattr(self.model.model.diffusion_model, "double_blocks")
        own = seen[0] if self.is_unet else seen[0][0 if first else 1]
        return own.float().mean((2, 3)) if self.is_unet else own.float().mean(1)

    def balance(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Sets the router so that these rows are halved; returns their posterior."""
        features = self.features(x, sigma)
        self.router.mean.copy_(features.mean(0))
        self.router.std.copy_(features.std(0).clamp(min=1e-6))
        flow = not self.is_unet
        alpha = 1 - sigma if flow else torch.ones_like(sigma)
        logits = self.router(features, alpha, sigma)
        gap = (logits[:, 0] - logits[:, 1]).median()
        self.router.last.bias.copy_(torch.tensor([-float(gap) - 1e-3, 0.0]))
        return self.router.posterior(features, alpha, sigma)

    def put(self, mode: str = "top1", **more: Any) -> Any:
        return self.routing.route_experts(self.model, self.tasks, self.router, mode, **more)

    def calls(self, model: Any, steps: int = 1, rows: int = 4) -> list[SimpleNamespace]:
        """What each model call of a sampling was given and gave."""
        found: list[SimpleNamespace] = []

        def record(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
            output = executor(*args, **kwargs)
            found.append(SimpleNamespace(x=args[0].clone(), sigma=args[1], output=output.clone()))
            return output

        watched = model.clone()
        wrappers = watched.wrappers.get("apply_model", {})
        watched.wrappers["apply_model"] = {"record": [record], **wrappers}
        self.tiny.run(watched, self.positive, self.negative, steps=steps, rows=rows)
        return found


@pytest.fixture(scope="module", params=("tiny_sd3", "tiny_unet"))
def experts(request: Any, tiny: Any, pack: ModuleType) -> Iterator[Experts]:
    with torch.inference_mode():
        yield Experts(tiny, pack, request.param)


def test_each_row_runs_the_expert_that_is_chosen_for_it_in_one_call(
    experts: Experts, clean: Any
) -> None:
    clean(experts.model)
    (plain,) = experts.calls(experts.model)
    posterior = experts.balance(plain.x[:4], plain.sigma[:4])
    chosen = posterior.argmax(1).tolist()
    assert sorted(chosen) == [0, 0, 1, 1]
    with calls_of(experts.model) as rows:
        (mixed,) = experts.calls(experts.put())
    assert rows == [4, 8]  # guidance's two halves are looked at once, and run in one call
    alone = [experts.calls(experts.tiny.apply(experts.model, t))[0] for t in experts.tasks]
    for row in range(8):
        own, other = chosen[row % 4], 1 - chosen[row % 4]
        assert close(mixed.output[row], alone[own].output[row])
        assert not close(mixed.output[row], alone[other].output[row], 1e-3)


def test_the_full_mix_is_the_weighted_sum_with_a_call_for_each(experts: Experts) -> None:
    (plain,) = experts.calls(experts.model)
    posterior = experts.balance(plain.x[:4], plain.sigma[:4])
    with calls_of(experts.model) as rows:
        (mixed,) = experts.calls(experts.put("full"))
    assert rows == [4, 8, 8]
    alone = [experts.calls(experts.tiny.apply(experts.model, t))[0] for t in experts.tasks]
    share = posterior.repeat(2, 1).view(8, 2, 1, 1, 1)
    expected = sum(share[:, k] * alone[k].output for k in range(2))
    assert close(mixed.output, expected)
    (top1,) = experts.calls(experts.put())
    assert not close(mixed.output, top1.output, 1e-4)


def test_at_strength_0_it_is_the_base_and_the_console_is_silent(
    experts: Experts, caplog: pytest.LogCaptureFixture
) -> None:
    (plain,) = experts.calls(experts.model)
    (off,) = experts.calls(experts.put(strength=0.0))
    assert torch.equal(off.output, plain.output)
    assert "routes" not in caplog.text


def test_what_does_not_belong_together_is_refused(experts: Experts) -> None:
    refusal = experts.pack.diffscaler_core.DiffScalerError
    route, router, tasks = experts.routing.route_experts, experts.router, experts.tasks
    with pytest.raises(refusal, match="no task is called 'two'"):
        route(experts.model, tasks[:1], router)
    with pytest.raises(refusal, match="connect each expert once"):
        route(experts.model, [*tasks, tasks[0]], router)
    with pytest.raises(refusal, match="has a router already"):
        route(experts.put(), tasks, router)
    other = experts.tiny.load("tiny_unet" if not experts.is_unet else "tiny_sd3")
    with pytest.raises(refusal, match="was trained on a"):
        route(other, tasks, router)
    null, router.null = router.null, {}
    try:
        with pytest.raises(refusal, match="no empty prompt"):
            experts.put()
    finally:
        router.null = null


def test_the_pocket_base_shows_both_hosts_the_same(
    both: Any, pocket: Any, words: Any, part: Any
) -> None:
    """So that a router trained in diffusers is right in ComfyUI."""
    features = part("diffscaler_core.systems.features")
    blocks = part("diffscaler_core.blocks")
    native, diffusers = both
    told = features.untold(diffusers, words)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 8, 8, generator=generator)
    t = torch.tensor([0.3, 0.8])
    seen = []
    for denoiser, scale in ((native, 1.0), (diffusers, 1000.0)):
        assert len(blocks.blocks_of(denoiser.model)) == 3
        for place in range(3):
            name = blocks.block_named(denoiser.model, place)
            with denoiser.held():
                own = features.noisy_features(denoiser, x, t * scale, told, [name])
            seen.append(own[name])
    for place in range(3):
        assert torch.allclose(seen[place], seen[3 + place], atol=2e-4), place
        assert float(seen[place].std()) > 1e-2
    assert not torch.allclose(seen[0], seen[4], atol=1e-2)


def test_routers_are_files_of_a_folder_of_their_own(
    experts: Experts, comfy_base: Path, pack: ModuleType
) -> None:
    node = pack.nodes.route_experts.DiffScalerRouteExperts
    folder = comfy_base / "models" / "diffscaler_routers"
    folder.mkdir(parents=True, exist_ok=True)
    save = pack.diffscaler_core.systems.router.save_router
    (plain,) = experts.calls(experts.model)
    experts.balance(plain.x[:4], plain.sigma[:4])
    save(experts.router, folder / "tiny.safetensors")
    slots = {f"task{i}": task for i, task in enumerate(reversed(experts.tasks))}
    before = node.fingerprint_inputs(router_name="tiny.safetensors")
    assert "tiny.safetensors" in pack.nodes.router_files.router_files()
    (patched,) = node.execute(experts.model, "tiny.safetensors", slots).args
    assert close(experts.calls(patched)[0].output, experts.calls(experts.put())[0].output)
    save(experts.router, folder / "tiny.safetensors")
    assert node.fingerprint_inputs(router_name="tiny.safetensors") != before
    save(experts.router, folder.parent / "outside.safetensors")
    with pytest.raises(FileNotFoundError):
        node.execute(experts.model, "../outside.safetensors", slots)
    (folder.parent / "outside.safetensors").unlink()
    (folder / "tiny.safetensors").unlink()
