"""Tasks whose hidden units act by noise level, in ComfyUI: as in diffusers, call by call."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from .test_many_tasks_hosts import Hosts, same

EDGE = 0.5
POCKET = Path(__file__).resolve().parents[2] / "assets" / "pocket"


@pytest.fixture(scope="module")
def hosts(pack: ModuleType, tiny: Any) -> Hosts:
    return Hosts(pack, tiny.nodes)


def bare(task: Any, name: str) -> Any:
    """The hidden units of a task alone, four times as strong."""
    layers = {
        layer: {"down": own["down"].float(), "up": 4 * own["up"].float()}
        for layer, own in task.layers.items()
        if "down" in own
    }
    return task.replace(layers=layers, conditioning={}).with_info(
        name=name, method="lora", parts=["subspace"], prompts=[]
    )


@pytest.fixture(scope="module")
def halves(hosts: Hosts) -> list[Any]:
    return [bare(task, name) for task, name in zip(hosts.tasks, ("noisy", "clean"), strict=True)]


@pytest.fixture(scope="module")
def file(part: Any, halves: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shipped tasks in one file: one at high noise, the other at low."""
    core = part("diffscaler_core")
    ranges = [(None, EDGE), (EDGE, None)]
    both = core.combine_tasks(halves, ranges=ranges, name="both")
    saved: Path = core.save_task(both, tmp_path_factory.mktemp("timed") / "both.safetensors")
    return saved


def test_one_file_is_one_picture_in_both_hosts(hosts: Hosts, halves: list[Any], file: Path) -> None:
    core = hosts.pack.diffscaler_core
    hosts.plugin.load_diffscaler(hosts.pipe, str(file), "both")
    hosts.plugin.set_diffscaler(hosts.pipe, ["both"])
    wanted = hosts.in_diffusers()
    drawn = hosts.in_comfyui(hosts.apply(hosts.model, core.load_task(file), 1.0))
    assert same(drawn, wanted)
    for half in halves:  # off: the same units at every noise level are another picture
        other = hosts.in_comfyui(hosts.apply(hosts.model, half, 1.0))
        assert not torch.allclose(other, wanted, atol=0.1)
    base = hosts.in_comfyui(hosts.model)
    off = hosts.in_comfyui(hosts.apply(hosts.model, core.load_task(file), 0.0))
    assert torch.equal(off, base)


def test_a_fused_layer_follows_each_part(part: Any, both: Any, halves: list[Any]) -> None:
    """ComfyUI fuses q, k and v: the units of each lie one after the other there."""
    core, windows = part("diffscaler_core"), part("diffscaler_core.windows")
    words = core.load_task(POCKET / "diffscaler" / "words.safetensors")
    context, pooled = words.prompt("cat")
    x = torch.randn(4, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    told = {"context": context.expand(4, -1, -1), "pooled": pooled.expand(4, -1)}
    task = halves[0]
    ranks = {n: len(own["down"]) for n, own in task.layers.items()}
    plan = windows.sliding_windows(16, 2.0, 0.5)
    task = task.with_info(windows=windows.planned(plan, ranks).facts)
    t = torch.tensor([0.03, 0.4, 0.7, 0.97])
    outputs, plain = [], []
    for denoiser in both:
        timestep, _ = denoiser.objective.noisy(x, x, t)[:2]
        with denoiser.held(), torch.no_grad():
            with denoiser.attached({"t": task}):
                outputs.append(denoiser(x, timestep, told).float())
            with denoiser.attached({"t": task.with_info(windows=None)}):
                plain.append(denoiser(x, timestep, told).float())
    assert torch.allclose(*outputs, atol=2e-4)
    assert torch.allclose(*plain, atol=2e-4)
    assert all(not torch.allclose(a, b, atol=1e-2) for a, b in zip(outputs, plain, strict=True))


def test_each_call_says_its_noise_level(hosts: Hosts, part: Any, file: Path) -> None:
    noise = part("nodes.noise")
    task = hosts.pack.diffscaler_core.load_task(file)
    model = hosts.apply(hosts.model, task, 1.0)
    seen: list[float] = []
    put = part("nodes.carrier").Carrier.set_time

    def noted(self: Any, log_snr: torch.Tensor) -> None:
        seen.append(float(log_snr))
        put(self, log_snr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part("nodes.carrier").Carrier, "set_time", noted)
        hosts.in_comfyui(model)
    sampling = hosts.model.get_model_object("model_sampling")
    sigmas = tiny_sigmas(sampling)
    wanted = noise.log_snr_of(sampling, sigmas)
    assert seen == pytest.approx(wanted.tolist(), abs=1e-4)
    flow = 2 * torch.log((1 - sigmas.clamp(max=1)) / sigmas)
    assert torch.allclose(wanted, flow, atol=1e-4)


def tiny_sigmas(sampling: Any) -> torch.Tensor:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(sampling, "normal", 4)[:-1]  # type: ignore[no-any-return]


def test_noise_models_are_told_by_their_sigma(part: Any) -> None:
    from .test_schedules import SAMPLINGS, _sampling

    log_snr_of = part("nodes.noise").log_snr_of
    for kind in ("discrete eps", "discrete v, zero SNR"):
        sampling = _sampling(SAMPLINGS[kind][0], **SAMPLINGS[kind][1])
        sigma = sampling.sigmas[[0, 300, 999]]
        assert torch.allclose(log_snr_of(sampling, sigma), -2 * sigma.log(), atol=1e-4)
    edm = _sampling("EDM", sigma_max=80.0)
    data = torch.tensor([float(edm.sigma_data)])
    assert float(log_snr_of(edm, data)) == pytest.approx(0.0)
    with pytest.raises(part("diffscaler_core").DiffScalerError, match="cannot tell the noise"):
        log_snr_of(object(), data)


def test_another_range_is_another_task_for_caches(hosts: Hosts, part: Any, file: Path) -> None:
    """What the caches are told differs between two ranges, and not within one."""
    entries = part("nodes.entries")
    task = hosts.pack.diffscaler_core.load_task(file)
    model = hosts.apply(hosts.model, task, 1.0)
    on = part("nodes.patching").tasks_on(model)
    sampling = model.get_model_object("model_sampling")

    def told(sigma: float) -> list[object]:
        return entries.ranges_at(on, entries.levels_at(on, sampling, torch.tensor([sigma] * 2)))

    assert told(0.9) == told(0.8) != told(0.1) == told(0.2)
    plain = part("nodes.patching").tasks_on(hosts.apply(hosts.model, hosts.tasks[0], 1.0))
    assert entries.levels_at(plain, sampling, torch.tensor([0.9])) is None

    class Cache:
        name = "EasyCache"

        def __init__(self) -> None:
            self.kept = 0

        def clone(self) -> "Cache":
            return Cache()

    caches, cache = part("nodes.step_caches"), Cache()
    options, weights = {"easycache": cache, "uuids": ["a"]}, torch.ones(1, 3)
    left = []
    for sigma in (0.9, 0.8, 0.2, 0.1):
        cache.kept = 1
        caches.follow_rows(options, weights, told(sigma))
        left.append(cache.kept)
    assert left == [1, 1, 0, 1]
