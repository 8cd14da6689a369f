"""Strength over sampling time: the percents are ComfyUI's, whatever scheduler counts the steps."""

import copy
import math
import pickle
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from diffscaler_core import DiffScalerError, UnknownNameError, new_task
from diffscaler_core.schedule import Schedule

RISING = "0: 0, 1: 1"  # the strength is the percent
PARTS = ("scale", "shift", "subspace")


class Seen:
    """What the denoiser was called with: its times, and the strengths in force."""

    def __init__(self, case: Any, pipe: Any) -> None:
        self.times: list[float] = []
        self.weights: list[dict[str, dict[str, float]]] = []
        self.rows: list[Tensor | None] = []
        self.pipe, self.component = pipe, case.component
        case.model(pipe).register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: Any, args: Any, kwargs: Any) -> None:
        time = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        self.times.append(float(torch.as_tensor(time).flatten()[0]))
        attachment = self.attachment
        self.weights.append(attachment.weights)
        self.rows.append(None if attachment.rows is None else attachment.rows.clone())

    @property
    def attachment(self) -> Any:
        return getattr(self.pipe, self.component)._diffscaler.attachment

    def percents(self, name: str = "a") -> list[float]:
        found = [[weights[name][part] for part in PARTS] for weights in self.weights]
        assert all(len(set(own)) == 1 for own in found)
        return [own[0] for own in found]


def loaded(case: Any, *names: str) -> tuple[Any, Seen]:
    pipe = case.pipe()
    for seed, name in enumerate(names, start=1):
        pipe.load_diffscaler(case.task(pipe, name, seed), name)
    return pipe, Seen(case, pipe)


def time_snr_shift(alpha: float, t: float) -> float:
    """ComfyUI's ModelSamplingDiscreteFlow: percent p is at sigma time_snr_shift(shift, 1 − p)."""
    return alpha * t / (1 + (alpha - 1) * t)


def flux_time_shift(mu: float, t: float) -> float:
    """ComfyUI's ModelSamplingFlux: percent p is at sigma flux_time_shift(mu, 1 − p)."""
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1))


@pytest.mark.parametrize(
    ("scheduler", "calls"),
    [
        (d.FlowMatchEulerDiscreteScheduler(), 5),
        (d.FlowMatchEulerDiscreteScheduler(shift=3.0), 5),
        (d.FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True), 5),
        (d.FlowMatchHeunDiscreteScheduler(shift=3.0), 9),
        (d.FlowMatchLCMScheduler(shift=3.0), 5),
        (d.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"), 5),
        (d.UniPCMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"), 5),
        (d.DEISMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"), 5),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else str(value),
)  # fmt: skip
def test_flow_matching_counts_the_time_before_its_shift(sd3_case, scheduler, calls):
    pipe, seen = loaded(sd3_case, "a")
    pipe.scheduler = scheduler
    pipe.set_diffscaler("a", schedules=RISING)
    sd3_case.run(pipe, num_inference_steps=5)
    shift = scheduler.config.get("shift", scheduler.config.get("flow_shift"))
    percents = seen.percents()
    assert len(percents) == calls
    sigmas = [time / 1000 for time in seen.times]
    # some of these schedulers tell the model a time rounded to 1/1000
    assert [time_snr_shift(shift, 1 - p) for p in percents] == pytest.approx(sigmas, abs=1.1e-3)
    assert percents == sorted(percents)
    assert percents[0] == pytest.approx(0, abs=2e-3)
    assert len({round(p, 6) for p in percents}) == 5


def test_a_shift_that_was_set_later_counts(sd3_case):
    pipe, seen = loaded(sd3_case, "a")
    pipe.scheduler = d.FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe.scheduler.set_shift(5.0)
    pipe.set_diffscaler("a", schedules=RISING)
    sd3_case.run(pipe)
    sigmas = [time / 1000 for time in seen.times]
    assert [time_snr_shift(5.0, 1 - p) for p in seen.percents()] == pytest.approx(sigmas, abs=1e-5)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_shift_by_the_size_that_is_drawn_is_undone(cases, kind):
    case = cases["flux"]
    pipe, seen = loaded(case, "a")
    pipe.scheduler = d.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind, base_image_seq_len=1
    )
    pipe.set_diffscaler("a", schedules=RISING)
    case.run(pipe, num_inference_steps=4)
    # 8x8 pixels are 8x8 latents here, so 16 tokens; this model is told sigma itself
    mu = calculate_shift(16, base_seq_len=1)
    assert mu > 0.5
    alpha = math.exp(mu) if kind == "exponential" else mu
    sigmas = [time_snr_shift(alpha, 1 - p) for p in seen.percents()]
    assert sigmas == pytest.approx(seen.times, abs=1e-5)
    if kind == "exponential":
        comfy = [flux_time_shift(mu, 1 - p) for p in seen.percents()]
        assert comfy == pytest.approx(seen.times, abs=1e-5)
    # guidance by two calls: both of a step are at one percent
    assert len(seen.times) == 8
    assert seen.percents()[0::2] == seen.percents()[1::2]


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LOG_SIGMAS = (
    (1 / (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2).cumprod(0) - 1).log()
    / 2
)  # fmt: skip


def discrete_sigma(percent: float) -> float:
    """ComfyUI's ModelSamplingDiscrete.percent_to_sigma."""
    t = (1 - percent) * 999
    low, high = math.floor(t), math.ceil(t)
    share = t - low
    return float(((1 - share) * LOG_SIGMAS[low] + share * LOG_SIGMAS[high]).exp())


DISCRETE = [
    d.DDIMScheduler, d.DDPMScheduler, d.PNDMScheduler, d.EulerDiscreteScheduler,
    d.EulerAncestralDiscreteScheduler, d.DPMSolverMultistepScheduler,
    d.DPMSolverSinglestepScheduler, d.HeunDiscreteScheduler, d.KDPM2DiscreteScheduler,
    d.LMSDiscreteScheduler, d.UniPCMultistepScheduler, d.DEISMultistepScheduler,
    d.SASolverScheduler, d.LCMScheduler, d.TCDScheduler,
]  # fmt: skip
KARRAS = [d.EulerDiscreteScheduler, d.DPMSolverMultistepScheduler, d.HeunDiscreteScheduler]


@pytest.mark.parametrize(
    ("kind", "options"),
    [*((kind, {}) for kind in DISCRETE), *((kind, {"use_karras_sigmas": True}) for kind in KARRAS)],
)
def test_noise_prediction_counts_the_timestep_the_model_is_told(cases, kind, options):
    case = cases["sd15"]
    pipe, seen = loaded(case, "a")
    pipe.scheduler = kind(**BETAS, **options)
    pipe.set_diffscaler("a", schedules=RISING)
    case.run(pipe, num_inference_steps=5)
    assert len(seen.times) >= 5
    assert seen.percents() == pytest.approx([1 - time / 999 for time in seen.times], abs=1e-6)
    assert seen.percents() == sorted(seen.percents())
    if kind in (d.EulerDiscreteScheduler, d.DPMSolverMultistepScheduler):
        sigmas = [discrete_sigma(p) for p in seen.percents()]
        # of DPM-Solver's Karras times only whole ones are told
        precise = pytest.approx(pipe.scheduler.sigmas[:5].tolist(), rel=1e-2 if options else 1e-4)
        assert sigmas == precise


@pytest.mark.parametrize(
    "scheduler",
    [
        d.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0),
        d.EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0),
        d.EulerDiscreteScheduler(
            sigma_min=0.002, sigma_max=80.0, timestep_type="continuous",
            prediction_type="v_prediction", use_karras_sigmas=True,
        ),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)  # fmt: skip
def test_continuous_noise_levels_are_counted_by_their_logarithm(cases, scheduler):
    case = cases["sd15"]
    pipe, seen = loaded(case, "a")
    pipe.scheduler = scheduler
    pipe.set_diffscaler("a", schedules=RISING)
    case.run(pipe, num_inference_steps=4)
    # ComfyUI's ModelSamplingContinuousEDM, whose timestep is log(sigma) / 4
    low, high = math.log(0.002), math.log(80.0)
    levels = [math.exp((high - low) * (1 - p) + low) for p in seen.percents()]
    assert levels == pytest.approx([math.exp(4 * time) for time in seen.times], rel=1e-4)


def test_a_picture_to_start_from_starts_late(sd3_case, cases):
    for case, kind in (
        (sd3_case, d.StableDiffusion3Img2ImgPipeline),
        (cases["sd15"], d.StableDiffusionImg2ImgPipeline),
    ):
        pipe = case.pipe()
        pipe.load_diffscaler(case.task(pipe, "a", 1), "a")
        pipe.set_diffscaler("a", schedules=RISING)
        seen = Seen(case, pipe)
        own = {} if case is sd3_case else {"requires_safety_checker": False}
        late = kind(**pipe.components, **own)
        late.set_progress_bar_config(disable=True)
        picture = np.zeros((2, 8, 8, 3), np.float32)
        inputs = {k: v for k, v in case.inputs(2).items() if k not in ("height", "width")}
        late(**inputs, image=picture, strength=0.5, num_inference_steps=6, output_type="np")
        last = 1000 if case is sd3_case else 999
        assert len(seen.times) == 3
        assert seen.percents() == pytest.approx([1 - t / last for t in seen.times], abs=1e-3)
        assert seen.percents()[0] > 0.3


def test_a_schedule_is_what_setting_the_strength_before_every_step_would_be(sd3_case):
    schedule = Schedule.parse("0: 0.2, 0.5: 1, 1: 0, scale 0: 1, scale 1: -1")
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=2.0)
    pipe, seen = loaded(sd3_case, "a", "b")
    pipe.scheduler = scheduler
    weights = [0.7, {"shift": 0.5, "subspace": 2.0}]
    pipe.set_diffscaler(["a", "b"], weights, schedules={"b": schedule})
    scheduled = sd3_case.run(pipe, num_inference_steps=4)
    assert seen.weights[0]["a"] == seen.weights[3]["a"] == dict.fromkeys(PARTS, 0.7)

    def by_hand(step: int) -> None:
        sigma = float(scheduler.sigmas[step])
        factors = dict(zip(PARTS, schedule.at(1 - sigma / (2 - sigma)), strict=True))
        own = {"scale": 1.0, "shift": 0.5, "subspace": 2.0}
        pipe.set_diffscaler(["a", "b"], [0.7, {p: own[p] * factors[p] for p in PARTS}])

    def after(pipe: Any, step: int, time: Any, tensors: Any) -> Any:
        by_hand(step + 1)
        return tensors

    scheduler.set_timesteps(4)
    by_hand(0)
    stepped = sd3_case.run(pipe, num_inference_steps=4, callback_on_step_end=after)
    torch.testing.assert_close(scheduled, stepped, atol=1e-6, rtol=0)
    pipe.set_diffscaler(["a", "b"], weights)
    assert not torch.allclose(scheduled, sd3_case.run(pipe, num_inference_steps=4), atol=1e-4)


def test_any_pipeline_follows_a_schedule(case):
    pipe, seen = loaded(case, "a")
    base = case.run(pipe)
    pipe.set_diffscaler("a", 0.6, schedules="0: 0.5")
    halved = case.run(pipe)
    pipe.set_diffscaler("a", 0.3)
    assert torch.equal(halved, case.run(pipe))
    pipe.set_diffscaler("a", schedules="0: 0")
    resting = case.run(pipe)
    pipe.disable_diffscaler()
    assert torch.equal(resting, case.run(pipe))
    assert not torch.equal(resting, base)
    pipe.enable_diffscaler()
    seen.weights.clear()
    pipe.set_diffscaler("a", schedules=RISING)
    case.run(pipe, num_inference_steps=3)
    percents = seen.percents()
    assert percents == sorted(percents)
    assert len(set(percents)) == 3
    assert 0 <= percents[0] < 0.4 < percents[-1] <= 1


def test_rows_follow_the_schedules_of_their_tasks(sd3_case):
    pipe, seen = loaded(sd3_case, "a", "b")
    schedules = {"a": "step, 0: 0, 0.4: 1", "b": RISING}
    alone = []
    for name, row in (("a", 0), ("b", 1)):
        pipe.set_diffscaler(name, 0.5, schedules={name: schedules[name]})
        alone.append(sd3_case.run(pipe, num_inference_steps=3)[row])
    pipe.set_diffscaler(["a", "b"], schedules=schedules)
    seen.rows.clear()
    with pipe.diffscaler_rows([{"a": 0.5}, {"b": 0.5}]):
        mixed = sd3_case.run(pipe, num_inference_steps=3)
    torch.testing.assert_close(mixed, torch.stack(alone), atol=1e-5, rtol=0)
    b = [float(rows[1, 1, 0]) for rows in seen.rows if rows is not None]
    assert b == sorted(b)
    assert len(set(b)) == 3
    assert seen.attachment.rows is None  # after the context, the strengths alone
    assert seen.attachment.weights["b"] == dict.fromkeys(PARTS, 1.0)


def test_a_control_task_follows_its_schedule_in_embedding_and_blocks(sd3_case, make_noisy):
    pipe = sd3_case.pipe()
    task = new_task(pipe.transformer, name="edges", control="edges", rank=2)
    pipe.load_diffscaler(make_noisy(task, 1, 0.3))
    base = sd3_case.run(pipe)
    picture = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    with pipe.diffscaler_control(picture, 0.5):
        half = sd3_case.run(pipe)
    pipe.set_diffscaler("edges", schedules="0: 0.25")
    with pipe.diffscaler_control(picture, 2.0):
        torch.testing.assert_close(sd3_case.run(pipe), half, atol=1e-6, rtol=0)
    pipe.set_diffscaler("edges", schedules="0: 0")
    with pipe.diffscaler_control(picture):
        assert torch.equal(sd3_case.run(pipe), base)
    pipe.set_diffscaler("edges", schedules=Schedule.window(0.0, 0.4))
    with pipe.diffscaler_control(picture):
        early = sd3_case.run(pipe)  # two steps, at 0 and about 1/2
    pipe.set_diffscaler("edges")
    with pipe.diffscaler_control(picture, end=0.5):
        torch.testing.assert_close(sd3_case.run(pipe), early, atol=1e-6, rtol=0)


def test_a_task_brings_its_own_schedule(sd3_case):
    pipe = sd3_case.pipe()
    base = sd3_case.run(pipe)
    task = sd3_case.task(pipe, "a", 1)
    pipe.load_diffscaler(task.replace(schedule=Schedule.parse("0: 0")))
    assert torch.equal(sd3_case.run(pipe), base)
    pipe.set_diffscaler("a")
    assert torch.equal(sd3_case.run(pipe), base)
    pipe.set_diffscaler("a", schedules="0: 1")  # instead of its own
    full = sd3_case.run(pipe)
    assert not torch.equal(full, base)
    pipe.set_diffscaler("a", schedules=[None])
    assert torch.equal(sd3_case.run(pipe), base)
    pipe.unload_diffscaler()
    pipe.load_diffscaler(task)
    assert torch.equal(sd3_case.run(pipe), full)


def test_schedules_are_given_for_all_by_name_or_in_a_list(sd3_case):
    pipe, seen = loaded(sd3_case, "a", "b")
    half = Schedule.parse("0: 0.5")
    for given, expected in (
        ("0: 0.5", [0.5, 0.5]),
        ([(0, 0.5)], [0.5, 0.5]),
        (half, [0.5, 0.5]),
        ([half, None], [0.5, 1]),
        ([None, [(0, 0.25)]], [1, 0.25]),
        ({"b": "0: 0.25"}, [1, 0.25]),
        ({"a": None, "b": half}, [1, 0.5]),
        (None, [1, 1]),
    ):
        pipe.set_diffscaler(["a", "b"], schedules=given)
        sd3_case.run(pipe)
        assert [seen.weights[-1][name]["shift"] for name in "ab"] == expected
    pipe.set_diffscaler("a", schedules={"scale": [(0, 0.0)]})
    sd3_case.run(pipe)
    assert seen.weights[-1]["a"] == {"scale": 0.0, "shift": 1.0, "subspace": 1.0}
    assert seen.weights[-1]["b"] == dict.fromkeys(PARTS, 0.0)


def test_what_is_no_schedule_or_for_no_task_is_refused_and_changes_nothing(sd3_case):
    pipe, seen = loaded(sd3_case, "a", "b")
    pipe.set_diffscaler("a", 0.4)
    for wrong, message in (
        ("0: x", "line 1 of the schedule"),
        (["0: 1"], "1 schedules for 2 tasks"),
        ([], "0 schedules for 2 tasks"),
        (3, "a schedule is text"),
    ):
        with pytest.raises(DiffScalerError, match=message):
            pipe.set_diffscaler(["a", "b"], schedules=wrong)
    with pytest.raises(UnknownNameError, match="schedules: 'c'"):
        pipe.set_diffscaler(["a", "b"], schedules={"c": "0: 1"})
    sd3_case.run(pipe)
    assert seen.percents() == [0.4, 0.4]


def test_a_scheduled_task_does_not_fuse(sd3_case):
    pipe, _ = loaded(sd3_case, "a")
    pipe.set_diffscaler("a", schedules=RISING)
    with pytest.raises(DiffScalerError, match=r"cannot fuse a: .* schedule"):
        pipe.fuse_diffscaler(partial=True)


def test_a_scheduler_whose_time_nobody_knows_is_named(cases):
    case = cases["sd15"]
    pipe, _ = loaded(case, "a")
    pipe.scheduler = d.IPNDMScheduler()
    pipe.set_diffscaler("a", schedules=RISING)
    with pytest.raises(DiffScalerError, match="in sampling a IPNDMScheduler is"):
        case.run(pipe)
    pipe.set_diffscaler("a")
    case.run(pipe)


@pytest.mark.parametrize("kind", [d.IPNDMScheduler, d.ScoreSdeVeScheduler, d.KarrasVeScheduler])
def test_no_percent_is_made_up_for_times_that_mean_something_else(sd3_case, kind):
    pipe, _ = loaded(sd3_case, "a")
    pipe.set_diffscaler("a", schedules=RISING)
    pipe.scheduler = kind()
    pipe.scheduler.set_timesteps(4)
    inputs = sd3_case.inputs(1)
    with pytest.raises(DiffScalerError, match=f"in sampling a {kind.__name__} is"):
        pipe.transformer(
            torch.randn(1, 4, 8, 8),
            inputs["prompt_embeds"],
            inputs["pooled_prompt_embeds"],
            torch.ones(1),
        )


def test_without_a_schedule_no_call_is_looked_at(sd3_case, monkeypatch):
    pipe, seen = loaded(sd3_case, "a")
    state = pipe.transformer._diffscaler
    settled: list[float] = []
    counted = type(state).settle
    monkeypatch.setattr(type(state), "settle", lambda *args: (settled.append(1), counted(*args))[1])
    pipe.set_diffscaler("a", 0.5, schedules="0: 1")
    sd3_case.run(pipe)
    assert not settled
    pipe.set_diffscaler("a", 0.5, schedules="step, 0: 1, 0.6: 0")
    put: list[float] = []
    weigh = type(seen.attachment).set_weights
    monkeypatch.setattr(
        type(seen.attachment), "set_weights", lambda *args: (put.append(1), weigh(*args))[1]
    )
    sd3_case.run(pipe, num_inference_steps=10)
    assert len(settled) == 10
    assert len(put) == 2  # when the factor changes, not at every step


def test_a_loop_without_a_pipeline_asks_the_scheduler_of_the_pipeline_that_chose(sd3_case):
    pipe, seen = loaded(sd3_case, "a")
    pipe.set_diffscaler("a", schedules=RISING)
    scheduler, inputs = pipe.scheduler, sd3_case.inputs(1)
    scheduler.set_timesteps(4)
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        for time in scheduler.timesteps:
            noise = pipe.transformer(
                x, inputs["prompt_embeds"], inputs["pooled_prompt_embeds"], time[None]
            )[0]
            x = scheduler.step(noise, time, x)[0]
    assert seen.percents() == pytest.approx([1 - float(s) for s in scheduler.sigmas[:4]])
    pipe.scheduler = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe.scheduler.set_timesteps(4, mu=1.0)
    with pytest.raises(DiffScalerError, match="use_dynamic_shifting=False"):
        pipe.transformer(x, inputs["prompt_embeds"], inputs["pooled_prompt_embeds"], time[None])


def test_copied_and_pickled_models_keep_their_schedules(sd3_case):
    pipe, _ = loaded(sd3_case, "a")
    pipe.set_diffscaler("a", schedules=RISING)
    expected = sd3_case.run(pipe)
    pipe.set_diffscaler("a")
    assert not torch.equal(sd3_case.run(pipe), expected)
    pipe.set_diffscaler("a", schedules=RISING)
    for model in (
        copy.deepcopy(pipe.transformer),
        pickle.loads(pickle.dumps(pipe.transformer)),
    ):
        other = sd3_case.pipe()
        other.transformer = model
        assert torch.equal(sd3_case.run(other), expected)


def test_a_compiled_model_follows_a_schedule_without_a_recompile(sd3_case):
    pipe = sd3_case.pipe()
    for seed, name in enumerate("ab"):
        pipe.load_diffscaler(sd3_case.task(pipe, name, seed), name)
    pipe.set_diffscaler(["a", "b"], schedules={"a": RISING})
    expected = sd3_case.run(pipe, num_inference_steps=6)
    compiled = sd3_case.compiled(pipe, num_inference_steps=6)
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=0)


def test_a_model_whose_pipeline_is_gone_says_that_it_needs_one(sd3_case):
    pipe, _ = loaded(sd3_case, "a")
    pipe.set_diffscaler("a", schedules=RISING)
    model, inputs = copy.deepcopy(pipe.transformer), sd3_case.inputs(1)
    with pytest.raises(DiffScalerError, match="no pipeline with a scheduler"):
        model(
            torch.randn(1, 4, 8, 8),
            inputs["prompt_embeds"],
            inputs["pooled_prompt_embeds"],
            torch.ones(1),
        )
