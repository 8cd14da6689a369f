"""Tasks whose hidden units act by noise level, in diffusers' pipelines."""

import copy
import itertools
import math
from typing import Any

import diffusers as d
import pytest
import torch

from diffscaler_core import DiffScalerError, MismatchError, attach, load_task, new_task, save_task
from diffscaler_core.peft.tasks import from_task
from diffscaler_core.windows import expert_windows, ranges_of

from .conftest import noisy

EDGES = (1.5, -0.5)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BARS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


def timed(case: Any, model: Any, seed: int = 1, name: str = "timed") -> Any:
    plan = expert_windows(3, EDGES)
    task = new_task(
        model, "lora", 6, case.targets, name, component=case.component, activation="relu",
        windows=plan,
    )  # fmt: skip
    return noisy(task, seed, 0.3)


def cut(task: Any, index: int) -> Any:
    """What of it acts in one range, as a task without windows."""
    units = slice(2 * index, 2 * index + 2)
    layers = {
        name: {"down": own["down"][units], "up": own["up"][:, units]}
        for name, own in task.layers.items()
    }
    return task.replace(layers=layers).with_info(windows=None)


def of_flow(time: float, sigma: float) -> float:
    return 2 * math.log((1 - time / 1000) / (time / 1000)) if time < 1000 else -math.inf


def of_table(time: float, sigma: float) -> float:
    bar = float(BARS[round(time)])
    return math.log(bar / (1 - bar))


def of_edm(time: float, sigma: float) -> float:
    return -2 * math.log(math.exp(4 * time) / 0.5)


SCHEDULERS = {
    "flow": ("sd3", d.FlowMatchEulerDiscreteScheduler(shift=3.0), of_flow),
    "flow, heun": ("sd3", d.FlowMatchHeunDiscreteScheduler(shift=3.0), of_flow),
    "ddim": ("sd15", d.DDIMScheduler(**BETAS), of_table),
    "euler": ("sd15", d.EulerDiscreteScheduler(**BETAS), of_table),
    "dpm": ("sd15", d.DPMSolverMultistepScheduler(**BETAS), of_table),
    "edm": ("sd15", d.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0), of_edm),
}


def calls_of(case: Any, pipe: Any, **kwargs: Any) -> list[tuple[Any, Any, Any]]:
    """What the denoiser is called with, and what comes of it."""
    seen: list[tuple[Any, Any, Any]] = []
    handle = case.model(pipe).register_forward_hook(
        lambda module, args, told, out: seen.append((args, told, out[0].clone())), with_kwargs=True
    )
    case.run(pipe, prompts=1, **kwargs)
    handle.remove()
    return seen


def time_of(call: Any) -> float:
    args, told, _ = call
    return float(
        torch.as_tensor(told.get("timestep", args[1] if len(args) > 1 else 0)).flatten()[0]
    )


@torch.no_grad()
def again(model: Any, task: Any, call: Any) -> Any:
    args, told, _ = call
    with attach(model, task):
        return model(*args, **told)[0]


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_call_runs_the_units_of_its_noise_level(cases, kind, tmp_path):
    name, scheduler, level_of = SCHEDULERS[kind]
    case = cases[name]
    pipe = case.pipe()
    pipe.scheduler = scheduler
    model = copy.deepcopy(case.model(pipe))
    task = timed(case, model)
    pipe.load_diffscaler(save_task(task, tmp_path / "timed.safetensors"), "timed")
    pipe.set_diffscaler("timed")
    calls = calls_of(case, pipe, num_inference_steps=7)
    found = set()
    for call in calls:
        level = torch.tensor(level_of(time_of(call), 0))
        index = int(ranges_of(EDGES, level))
        found.add(index)
        right = again(model, cut(task, index), call)
        assert torch.allclose(call[2], right, atol=1e-5)
        other = again(model, cut(task, (index + 1) % 3), call)
        assert not torch.allclose(call[2], other, atol=1e-4)
    assert found == {0, 1, 2}
    pipe.set_diffscaler("timed", 0.0)
    off = case.run(pipe, prompts=1)
    pipe.unload_diffscaler()
    assert torch.equal(off, case.run(pipe, prompts=1))


def test_rows_of_timed_and_other_tasks_run_in_one_batch(sd3_case):
    pipe = sd3_case.pipe()
    task, other = timed(sd3_case, pipe.transformer), sd3_case.task(pipe, "b", 2)
    pipe.load_diffscaler(task, "timed")
    alone = {}
    pipe.set_diffscaler("timed")
    alone["timed"] = sd3_case.run(pipe, num_inference_steps=5)
    pipe.load_diffscaler(other, "b")
    pipe.set_diffscaler("b")
    alone["b"] = sd3_case.run(pipe, num_inference_steps=5)
    pipe.set_diffscaler([])
    alone[None] = sd3_case.run(pipe, num_inference_steps=5)
    for rows in (["timed", "b"], [None, "timed"]):
        with pipe.diffscaler_rows(rows):
            got = sd3_case.run(pipe, num_inference_steps=5)
        for i, row in enumerate(rows):
            assert torch.allclose(got[i], alone[row][i], atol=1e-5)


def test_a_compiled_model_changes_range_without_a_recompile(sd3_case):
    pipe = sd3_case.pipe()
    pipe.load_diffscaler(timed(sd3_case, pipe.transformer), "timed")
    expected = sd3_case.run(pipe, num_inference_steps=6)
    compiled = sd3_case.compiled(pipe, num_inference_steps=6)
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=0)


def test_another_range_empties_a_cache_of_earlier_steps(sd3_case, monkeypatch):
    pipe = sd3_case.pipe()
    pipe.load_diffscaler(timed(sd3_case, pipe.transformer), "timed")
    emptied: list[int] = []
    monkeypatch.setattr(
        "diffscaler_core.plugin.state.forget_steps", lambda model: emptied.append(1)
    )
    calls = calls_of(sd3_case, pipe, num_inference_steps=12)
    levels = torch.tensor([of_flow(time_of(call), 0) for call in calls])
    ranges = ranges_of(EDGES, levels).tolist()
    changes = sum(a != b for a, b in itertools.pairwise(ranges))
    assert changes == 2
    assert len(emptied) == 1 + changes  # and none at the steps between


def test_what_knows_no_noise_level_refuses_it(sd3_case, tmp_path):
    pipe = sd3_case.pipe()
    task = timed(sd3_case, pipe.transformer)
    with pytest.raises(DiffScalerError, match="an adapter of PEFT is told none"):
        from_task(copy.deepcopy(pipe.transformer), task)
    pipe.load_diffscaler(task, "timed")
    with pytest.raises(DiffScalerError, match="cannot fuse timed"):
        pipe.fuse_diffscaler()
    plain = task.with_info(windows=None)
    with pytest.raises(MismatchError, match="its windows is None"):
        pipe.load_diffscaler(plain, "timed", hotswap=True)
    pipe.scheduler = d.ScoreSdeVeScheduler()
    with pytest.raises(DiffScalerError, match="noise level"):
        sd3_case.run(pipe)
    model = copy.deepcopy(pipe.transformer)
    del pipe
    with pytest.raises(DiffScalerError, match="no pipeline with a scheduler"):
        model(**{"hidden_states": torch.zeros(1, 4, 16, 16), "timestep": torch.ones(1)})


def test_a_saved_task_is_the_same_task(sd3_case, tmp_path):
    pipe = sd3_case.pipe()
    task = timed(sd3_case, pipe.transformer)
    pipe.load_diffscaler(task, "timed")
    pipe.save_diffscaler(tmp_path, "timed")
    (path,) = tmp_path.glob("*.safetensors")
    assert load_task(path).windows == task.windows
