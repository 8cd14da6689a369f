"""Tasks beside caches of an earlier step: after a change, nothing old is given again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_faster_cache
from torch import Tensor

from diffscaler_core import DiffScalerError, attach, new_task
from diffscaler_core.plugin.caches import forget_steps

STEPS = 8


def _first_block(pipe: Any) -> Any:
    return FirstBlockCacheConfig(threshold=1e9)


def _faster(pipe: Any) -> Any:
    return FasterCacheConfig(
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(-1, 901),
        current_timestep_callback=lambda: pipe.current_timestep,
        attention_weight_callback=lambda _: 0.5,
        tensor_format="BCHW",
        is_guidance_distilled=True,
    )


def _pyramid(pipe: Any) -> Any:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def _taylor(pipe: Any) -> Any:
    return TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, max_order=1)


def _mag(pipe: Any) -> Any:
    return MagCacheConfig(
        threshold=1e9,
        max_skip_steps=STEPS,
        retention_ratio=0.1,
        num_inference_steps=STEPS,
        mag_ratios=[1.0] * STEPS,
    )


CONFIGS: dict[str, Callable[[Any], Any]] = {
    "FirstBlockCache": _first_block,
    "FasterCache": _faster,
    "PyramidAttentionBroadcast": _pyramid,
    "TaylorSeer": _taylor,
    "MagCache": _mag,
}
CACHES = pytest.mark.parametrize("cache", CONFIGS)
#: Those that keep the unconditional call's features apart.
TWO_CALLS = ("FirstBlockCache", "TaylorSeer", "MagCache")


class Sampling:
    """A pipeline whose denoiser's calls are kept, and how much of it they ran.

    Args:
        case: How to build and call it.
        cache: Of `CONFIGS`, or None.
    """

    def __init__(self, case: Any, cache: str | None) -> None:
        self.case, self.pipe = case, case.pipe()
        self.model = self.pipe.transformer
        self.cfg = 2.0 if cache in TWO_CALLS else 1.0
        self.calls: list[tuple[dict[str, Any], Tensor]] = []
        self.full = 0
        self.tasks = {}
        for seed, name in enumerate("ab", start=1):
            self.tasks[name] = case.task(self.pipe, name, seed)
            self.pipe.load_diffscaler(self.tasks[name], name)
        self.model.register_forward_hook(self._keep, with_kwargs=True)
        # a layer of the last block, which all the caches leave out together with the rest
        layer = self.model.single_transformer_blocks[-1].attn.to_q
        layer.register_forward_hook(self._count)
        if cache is not None:
            self.model.enable_cache(CONFIGS[cache](self.pipe))

    def _keep(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.calls.append((kwargs, output[0]))

    def _count(self, *_: Any) -> None:
        self.full += 1

    def run(self, **kwargs: Any) -> Tensor:
        self.calls, self.full = [], 0
        told = {"num_inference_steps": STEPS, "true_cfg_scale": self.cfg, **kwargs}
        return self.case.run(self.pipe, 2, **told)  # type: ignore[no-any-return]

    @property
    def per_step(self) -> int:
        return len(self.calls) // STEPS

    def anew(self, call: int, rows: Sequence[Any]) -> Tensor:
        """What a call gives without the plugin and without a cache."""
        kwargs, _ = self.calls[call]
        if getattr(self.model, "_cache_config", None) is not None:
            self.model.disable_cache()
        self.pipe.unload_diffscaler()
        with attach(self.model, self.tasks) as attachment, torch.no_grad():
            attachment.set_rows(rows)
            output = self.model(**kwargs)[0]
        return output  # type: ignore[no-any-return]


@contextmanager
def _callback(sampling: Sampling) -> Iterator[dict[str, Any]]:
    sampling.pipe.set_diffscaler("a", 0.3)

    def change(pipe: Any, step: int, time: Any, kwargs: Any) -> dict[str, Any]:
        if step == STEPS // 2 - 1:
            pipe.set_diffscaler("b", 0.8)
        return {}

    yield {"callback_on_step_end": change}


@contextmanager
def _schedule(sampling: Sampling) -> Iterator[dict[str, Any]]:
    sampling.pipe.set_diffscaler(["a", "b"], [0.3, 0.8], schedules=["step\n0: 1\n0.5: 0", HALF])
    yield {}


@contextmanager
def _one_row(sampling: Sampling) -> Iterator[dict[str, Any]]:
    sampling.pipe.set_diffscaler(["a", "b"], schedules=[None, HALF])
    with sampling.pipe.diffscaler_rows(["a", {"b": 0.8}]):
        yield {}


HALF = "step\n0: 0\n0.5: 1"
#: name -> how it changes half way, and what the rows run from there.
CHANGES: dict[str, tuple[Any, list[Any]]] = {
    "callback": (_callback, [{"b": 0.8}] * 2),
    "schedule": (_schedule, [{"b": 0.8}] * 2),
    "one row's schedule": (_one_row, ["a", {"b": 0.8}]),
}


@CACHES
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_half_way_is_computed_in_full(
    cases: Any, monkeypatch: pytest.MonkeyPatch, cache: str, change: str
) -> None:
    begin, rows = CHANGES[change]
    strengths: list[Any] = []
    sampling = Sampling(cases["flux"], cache)

    def see(*_: Any) -> None:
        attachment = sampling.model._diffscaler.attachment
        now = attachment.rows
        strengths.append(str(attachment.weights if now is None else now.tolist()))

    handle = sampling.model.register_forward_pre_hook(see)
    with begin(sampling) as kwargs:
        sampling.run(**kwargs)
    handle.remove()
    changed = [i for i in range(1, len(strengths)) if strengths[i] != strengths[i - 1]]
    assert len(changed) == 1
    first, after = changed[0], sampling.per_step
    assert 2 * after <= first <= len(strengths) - 2 * after
    assert sampling.full < len(sampling.calls) - after  # it leaves calls out before and after
    found = [sampling.calls[i][1] for i in range(first, first + after)]
    for i, output in enumerate(found):
        assert torch.allclose(output, sampling.anew(first + i, rows), atol=1e-5)

    monkeypatch.setattr("diffscaler_core.plugin.state.forget_steps", lambda model: None)
    stale = Sampling(cases["flux"], cache)
    with begin(stale) as kwargs:
        stale.run(**kwargs)
    assert not torch.allclose(stale.calls[first][1], stale.anew(first, rows), atol=1e-3)


@CACHES
def test_what_does_not_change_is_reused(cases: Any, cache: str) -> None:
    """Tasks at constant strengths, rows of several: as many calls are left out as without any."""
    plain = Sampling(cases["flux"], cache)
    plain.pipe.disable_diffscaler()
    base = plain.run()
    sampling = Sampling(cases["flux"], cache)
    sampling.pipe.set_diffscaler(["a", "b"], [0.5, 0.5])
    together = sampling.run()
    assert sampling.full == plain.full < len(plain.calls)
    with sampling.pipe.diffscaler_rows(["a", "b"]):
        mixed = sampling.run()
    assert sampling.full == plain.full
    assert not torch.allclose(together, base, atol=1e-3)
    assert not torch.allclose(mixed, together, atol=1e-3)


@CACHES
def test_a_sampling_after_another_task_starts_anew(cases: Any, cache: str) -> None:
    sampling = Sampling(cases["flux"], cache)
    sampling.pipe.set_diffscaler("a")
    first = sampling.run()
    sampling.pipe.set_diffscaler("b")
    assert not torch.allclose(sampling.run(), first, atol=1e-3)
    sampling.pipe.set_diffscaler("a")
    assert torch.equal(sampling.run(), first)


@CACHES
def test_a_control_that_ends(
    cases: Any, make_noisy: Any, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    """From the step where it ends on, what the control left behind is gone."""
    picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def sampled() -> Sampling:
        sampling = Sampling(cases["flux"], cache)
        pipe = sampling.pipe
        task = new_task(sampling.model, rank=2, targets="blocks", control="edges", name="edges")
        pipe.load_diffscaler(make_noisy(task, 3), "edges")
        pipe.set_diffscaler("edges")
        with pipe.diffscaler_control(picture, end=0.5):
            sampling.run()
        return sampling

    sampling = sampled()
    assert sampling.full < len(sampling.calls) - sampling.per_step
    end = len(sampling.calls) // 2
    assert torch.allclose(sampling.calls[end][1], sampling.anew(end, [None] * 2), atol=1e-5)
    monkeypatch.setattr("diffscaler_core.plugin.state.forget_steps", lambda model: None)
    stale = sampled()
    assert not torch.allclose(stale.calls[end][1], stale.anew(end, [None] * 2), atol=1e-3)


def test_a_change_without_the_plugin_is_told_by_hand(cases: Any) -> None:
    sampling = Sampling(cases["flux"], "FirstBlockCache")
    sampling.run(num_inference_steps=1)
    kwargs, model = sampling.calls[0][0], sampling.model
    sampling.pipe.unload_diffscaler()
    with attach(model, sampling.tasks["a"]) as attachment, model.cache_context("cond"):
        with torch.no_grad():
            model(**kwargs)
            attachment.set_weights(0.2)
            stale = model(**kwargs)[0]
            forget_steps(model)
            anew = model(**kwargs)[0]
            model._reset_stateful_cache()
    with attach(model, sampling.tasks["a"], 0.2), model.cache_context("cond"), torch.no_grad():
        wanted = model(**kwargs)[0]
    assert torch.equal(anew, wanted)
    assert not torch.allclose(stale, wanted, atol=1e-3)


def _faster_by_halves(pipe: Any) -> Any:
    """FasterCache that leaves out the unconditional half of the batch."""
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        unconditional_batch_skip_range=3,
        unconditional_batch_timestep_skip_range=(-1, 901),
        current_timestep_callback=lambda: float(pipe.scheduler.timesteps[_step(pipe)]),
        attention_weight_callback=lambda _: 0.5,
        tensor_format="BCHW",
        _unconditional_conditional_input_kwargs_identifiers=(
            *("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"),
        ),
    )


def _step(pipe: Any) -> int:
    return pipe.scheduler.step_index or 0


def test_half_of_a_batch_left_out(sd3_case: Any) -> None:
    """FasterCache drops the unconditional rows inside the model: what differs by row is refused."""
    pipe = sd3_case.pipe()
    rows: list[int] = []
    for seed, name in enumerate("ab", start=1):
        pipe.load_diffscaler(sd3_case.task(pipe, name, seed), name)
    apply_faster_cache(pipe.transformer, _faster_by_halves(pipe))
    pipe.transformer.pos_embed.register_forward_hook(lambda _, args, y: rows.append(len(y)))
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0}

    def run() -> Tensor:
        pipe.transformer._diffusers_hook.reset_stateful_hooks()
        return sd3_case.run(pipe, 2, **options)  # type: ignore[no-any-return]

    pipe.set_diffscaler("a")
    run()
    assert {2, 4} == set(rows)
    with pipe.diffscaler_rows(["a", "b"]):
        with pytest.raises(DiffScalerError, match="FasterCache leaves the unconditional half"):
            run()
    pipe.set_diffscaler("a", masks=torch.ones(1, 8, 8))
    run()

    rows.clear()
    pipe.set_diffscaler("a")
    run()
    constant = rows.copy()
    rows.clear()
    pipe.set_diffscaler("a", schedules="step\n0: 1\n0.5: 0.2")
    run()
    assert constant == [4, 2, 2, 4, 2, 2, 4, 2]
    assert rows == [4, 2, 2, 4, 4, 2, 2, 4]  # the whole batch out of its turn


def test_deepcache(cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package DeepCache: a change half way is computed in full, out of its turn."""
    package = pytest.importorskip("DeepCache")
    case = cases["sd15"]

    def run(change: bool) -> tuple[list[int], float]:
        """Which calls are computed in full, and how far the call after the change is off."""
        pipe, calls, full = case.pipe(), [], []
        pipe.load_diffscaler(case.task(pipe, "a", 1), "a")
        pipe.set_diffscaler("a")

        def changed(pipe: Any, step: int, time: Any, kwargs: Any) -> dict[str, Any]:
            if step == 3 and change:
                pipe.set_diffscaler("a", 0.2)
            return {}

        def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            calls.append((args, kwargs, output[0]))

        handle = pipe.unet.register_forward_hook(keep, with_kwargs=True)
        deep = pipe.unet.mid_block.resnets[0]
        deep.register_forward_hook(lambda *_: full.append(len(calls)))
        helper = package.DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=3, cache_branch_id=0)
        helper.enable()
        case.run(pipe, 2, num_inference_steps=STEPS, callback_on_step_end=changed)
        helper.disable()
        handle.remove()
        found, (args, kwargs, output) = full.copy(), calls[4]
        with torch.no_grad():
            anew = pipe.unet(*args, **kwargs)[0]
        return found, float((output - anew).abs().max())

    assert run(change=False)[0] == [0, 3, 6]
    full, off = run(change=True)
    assert full == [0, 3, 4, 7]
    assert off < 1e-5
    monkeypatch.setattr("diffscaler_core.plugin.state.forget_steps", lambda model: None)
    assert run(change=True)[1] > 1e-3
