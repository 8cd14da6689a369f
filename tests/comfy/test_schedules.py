"""Tasks whose strength follows sampling time, on real ComfyUI models."""

import math
from typing import Any

import pytest
import torch

from .controls import Controls
from .formula import close, lora_for
from .routes import Routes, calls_of


@pytest.fixture(scope="session")
def routes(tiny: Any, pack: Any) -> Routes:
    return Routes(tiny, pack)


def _sampling(model_type: str, **settings: float) -> Any:
    """One of ComfyUI's samplings, with the settings a node may give it."""
    import comfy.model_base

    class Config:
        sampling_settings = settings

    return comfy.model_base.model_sampling(Config(), comfy.model_base.ModelType[model_type])


SAMPLINGS = {
    "discrete eps": ("EPS", {}),
    "discrete v, zero SNR": ("V_PREDICTION", {"zsnr": True}),
    "EDM": ("EDM", {"sigma_max": 80.0}),
    "continuous v": ("V_PREDICTION_CONTINUOUS", {}),
    "cascade": ("STABLE_CASCADE", {"shift": 2.0}),
    "flow": ("FLOW", {"shift": 1.0}),
    "flow, shifted": ("FLOW", {"shift": 3.0}),
    "flux": ("FLUX", {"shift": 1.15}),
    "cosmos": ("FLOW_COSMOS", {}),
}


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_percent_is_the_inverse_of_comfyuis_own_function(part: Any, kind: str) -> None:
    model_type, settings = SAMPLINGS[kind]
    sampling = _sampling(model_type, **settings)
    percent_at = part("nodes.sampling_time").percent_at
    for percent in (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98):
        sigma = float(
            torch.tensor(float(sampling.percent_to_sigma(percent)))
        )  # as samplers have it
        assert percent_at(sampling, sigma) == pytest.approx(percent, abs=2e-5)
    assert percent_at(sampling, math.inf) == percent_at(sampling, 1e9) == 0
    assert percent_at(sampling, 0.0) == 1
    ordered = [percent_at(sampling, float(sigma)) for sigma in sampling.sigmas.flip(0)]
    assert ordered == sorted(ordered)


def test_percents_that_samplers_stop_at_are_exact(part: Any) -> None:
    """So that a jump at 0.5 is made at 0.5, though sigmas are float32."""
    percent_at = part("nodes.sampling_time").percent_at
    for model_type, settings in SAMPLINGS.values():
        if model_type == "STABLE_CASCADE":
            continue  # its own sigmas are not that fine
        sampling = _sampling(model_type, **settings)
        for percent in (0.125, 0.25, 0.3, 0.5, 0.6, 0.75):
            sigma = torch.tensor(float(sampling.percent_to_sigma(percent)))
            assert percent_at(sampling, float(sigma)) == percent


def test_a_call_runs_at_the_strengths_of_its_noise_level(routes: Routes, clean: Any) -> None:
    tiny = routes.tiny
    model = clean(tiny.load("tiny_sd3"))
    task = tiny.task(model)
    text = "0: 0.2\nscale 0: 0\nscale 0.8: 1\n1: 1.2"
    sampling = model.get_model_object("model_sampling")
    percent = routes.pack.nodes.sampling_time.percent_at(sampling, 0.5)  # where `call` is
    assert 0.1 < percent < 0.9
    schedule = routes.core.schedule.Schedule.parse(text)
    factors = zip(("scale", "shift", "subspace"), schedule.at(percent), strict=True)
    by_hand = tiny.apply(model, task, {part: 0.5 * factor for part, factor in factors})
    result = tiny.call(tiny.apply(model, routes.schedule(task, text), 0.5))
    assert close(result, tiny.call(by_hand))
    assert not close(result, tiny.call(tiny.apply(model, task, 0.5)), 1e-3)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_the_strengths_in_force_follow_the_schedule(
    routes: Routes, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    found: list[tuple[float, list[float]]] = []
    weights_at = tiny.patching.weights_at

    def noted(entries: Any, sampling: Any, sigma: Any, rows: Any) -> Any:
        result = weights_at(entries, sampling, sigma, rows)
        found.append((float(sigma[0]), result[0].tolist()))
        return result

    monkeypatch.setattr(tiny.patching, "weights_at", noted)
    scheduled = routes.schedule(tiny.task(model), "0: 0\n0.5: 1\n1: 0", "smooth")
    tiny.run(tiny.apply(model, scheduled, 2.0), steps=6, sampler=sampler)
    shift = model.get_model_object("model_sampling").shift
    assert shift != 1
    assert len(found) >= 6
    for sigma, strengths in found:
        percent = 1 - sigma / (shift - (shift - 1) * sigma)
        side = 2 * min(percent, 1 - percent)
        assert strengths == pytest.approx([2 * side * side * (3 - 2 * side)] * 3, abs=1e-4)


def test_factor_zero_is_the_base_and_one_is_the_task_bit_for_bit(routes: Routes) -> None:
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    task = tiny.task(model)
    assert torch.equal(
        tiny.run(tiny.apply(model, routes.schedule(task, "0.5: 0"))), tiny.run(model)
    )
    whole = tiny.run(tiny.apply(model, task))
    assert torch.equal(tiny.run(tiny.apply(model, routes.schedule(task))), whole)
    assert torch.equal(tiny.run(tiny.apply(model, routes.schedule(task, "0: 1"))), whole)


def test_another_schedule_is_no_other_copy_of_the_task(routes: Routes) -> None:
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    task = tiny.task(model)
    first = tiny.apply(model, routes.schedule(task, "0: 1\n1: 0"))
    second = tiny.apply(model, routes.schedule(task, "0: 0\n1: 1"))
    held = [tiny.patching.tasks_on(applied)[0].parameters for applied in (first, second)]
    assert held[0] is held[1]
    assert tiny.patching.tasks_on(tiny.apply(model, tiny.task(model)))[0].parameters is not held[0]
    results = [tiny.run(applied, steps=4) for applied in (first, second, first)]
    assert not close(results[0], results[1], 1e-3)
    assert torch.equal(results[0], results[2])
    assert len(tiny.patching._carriers[model.model]) == 1


def test_a_window_is_the_range_of_sampling(routes: Routes) -> None:
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    task = tiny.task(model)
    ranged = tiny.run(tiny.apply(model, task, 1.0, 0.21, 0.66), steps=5)
    window = tiny.run(tiny.apply(model, routes.schedule(task, start=0.21, end=0.66)), steps=5)
    assert torch.equal(window, ranged)
    both = tiny.apply(model, routes.schedule(task, start=0.21), 1.0, 0.0, 0.66)
    assert torch.equal(tiny.run(both, steps=5), ranged)
    faded = routes.schedule(task, start=0.21, end=0.66, fade=0.2)
    assert not close(tiny.run(tiny.apply(model, faded), steps=5), ranged, 1e-3)


def test_a_schedule_follows_the_control_and_the_stack_too(routes: Routes, pack: Any) -> None:
    tiny, control = routes.tiny, Controls(routes.tiny, pack)
    model = tiny.load("tiny_sd3")
    task = control.task(model)
    late = control.run(control.apply(model, routes.schedule(task, start=0.5)), steps=4)
    assert close(late, control.run(control.apply(model, task, start_percent=0.5), steps=4))
    assert not close(late, control.run(control.apply(model, task), steps=4), 1e-3)
    a, b = tiny.task(model, 1), tiny.task(model, 2)
    stacked = tiny.patching.apply_tasks(model, [routes.schedule(a, end=0.5), b], [1.0, 0.5])
    by_hand = tiny.apply(tiny.apply(model, a, 1.0, 0.0, 0.499), b, 0.5)
    assert close(tiny.run(stacked, steps=4), tiny.run(by_hand, steps=4))


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # ComfyUI's own
def test_comfyuis_own_keyframes_are_points(routes: Routes) -> None:
    """Two nodes of ComfyUI's: each keyframe holds until the next."""
    import comfy_extras.nodes_hooks as hooks

    (first,) = hooks.CreateHookKeyframe().create_hook_keyframe(0.25, 0.0)
    (both,) = hooks.CreateHookKeyframe().create_hook_keyframe(1.0, 0.5, first)
    task = routes.tiny.task(routes.tiny.load("tiny_sd3"))
    schedule = routes.schedule(task, "0: 7", keyframes=both).schedule
    values = [schedule.at(percent)[0] for percent in (0.0, 0.49, 0.5, 1.0)]
    assert values == [0.25, 0.25, 1.0, 1.0]
    (many,) = hooks.CreateHookKeyframesInterpolated().create_hook_keyframes(
        0.0, 1.0, "ease_in", 0.0, 1.0, 5, False
    )
    assert routes.schedule(task, keyframes=many).schedule.at(0.8)[0] == pytest.approx(0.5625)


def test_beside_core_hooks_with_keyframes_it_stays_one_schedule_for_all(routes: Routes) -> None:
    """A stock LoRA scheduled by hooks under a task scheduled by ours: both as alone."""
    import comfy.hooks

    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    lora, task = lora_for(tiny, model), tiny.task(model)

    def hooked(seed: int) -> Any:
        group = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)  # type: ignore[attr-defined]
        frames = comfy.hooks.HookKeyframeGroup()  # type: ignore[attr-defined]
        for strength, start in ((0.0, 0.0), (1.0, 0.5)):
            frames.add(comfy.hooks.HookKeyframe(strength, start))  # type: ignore[attr-defined]
        group.set_keyframes_on_hooks(frames)
        return comfy.hooks.set_hooks_for_conditioning(tiny.prompt(seed), group)  # type: ignore[attr-defined]

    early = tiny.apply(model, routes.schedule(task, "0: 1\n0.45: 0", "step"))
    ranged = tiny.apply(model, task, 1.0, 0.0, 0.449)
    with calls_of(model) as calls:
        result = tiny.run(early, hooked(1), hooked(2), steps=4)
    assert close(result, tiny.run(ranged, hooked(1), hooked(2), steps=4))
    assert len(calls) == 8  # the positive and the negative have hooks of their own
    assert not close(result, tiny.run(early, steps=4), 1e-3)
    assert not close(result, tiny.run(model, hooked(1), hooked(2), steps=4), 1e-3)


@pytest.mark.parametrize("scope", ["AllConditioning", "HookedOnly"])
def test_a_hook_that_brings_a_task_itself_works_beside(routes: Routes, scope: str) -> None:
    """As other packs do: a model's wrapper and entries in a `TransformerOptionsHook`."""
    import comfy.hooks

    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    a, b = routes.schedule(tiny.task(model, 1), "0: 0.5"), tiny.task(model, 2)
    with_a, with_b = tiny.apply(model, a), tiny.apply(model, b, 0.5)
    brought = {
        "diffscaler": with_b.model_options["transformer_options"]["diffscaler"],
        "wrappers": {"apply_model": dict(with_b.wrappers["apply_model"])},
    }
    scopes = comfy.hooks.EnumHookScope  # type: ignore[attr-defined]
    group = comfy.hooks.HookGroup()  # type: ignore[attr-defined]
    hook = comfy.hooks.TransformerOptionsHook(brought, getattr(scopes, scope))  # type: ignore[attr-defined]
    group.add(hook)
    set_hooks = comfy.hooks.set_hooks_for_conditioning  # type: ignore[attr-defined]
    hooked = [set_hooks(tiny.prompt(seed), group) for seed in (1, 2)]
    both = tiny.apply(with_a, b, 0.5)
    assert close(tiny.run(with_a, *hooked), tiny.run(both))
