"""Prompts and latents with tasks of their own, in one batch of a real ComfyUI model."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from .controls import Controls
from .formula import close
from .routes import BY_ROW, Routes, calls_of

FAMILIES = ("tiny_sd3", "tiny_flux", "tiny_unet")


@pytest.fixture(scope="session")
def routes(tiny: Any, pack: Any) -> Routes:
    return Routes(tiny, pack)


def prompts(routes: Routes, model: Any) -> tuple[Any, Any]:
    width = 768 if hasattr(model.model.diffusion_model, "input_blocks") else 32
    return routes.tiny.prompt(1, width), routes.tiny.prompt(2, width)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_one_batch_run_their_own_tasks_in_one_call_a_step(
    routes: Routes, clean: Any, family: str
) -> None:
    tiny = routes.tiny
    model = clean(tiny.load(family))
    positive, negative = prompts(routes, model)
    a, b, c = (tiny.task(model, seed) for seed in (1, 2, 3))
    routed = routes.route(
        model, positive, a, b, a, c, strengths="1, 0.5, 0.25, 0", mode=BY_ROW, negative=negative
    )
    with calls_of(model) as calls:
        result = tiny.run(*routed, rows=4, steps=3)
    assert calls == [8] * 3
    for row, (task, strength) in enumerate([(a, 1.0), (b, 0.5), (a, 0.25), (c, 0.0)]):
        alone = tiny.run(tiny.apply(model, task, strength), positive, negative, rows=4, steps=3)
        assert close(result[row], alone[row])
    assert not close(result[0], tiny.run(model, positive, negative, rows=4, steps=3)[0], 1e-2)


def test_all_together_is_the_mix_where_the_prompt_is_drawn(routes: Routes, clean: Any) -> None:
    tiny = routes.tiny
    model = clean(tiny.load("tiny_sd3"))
    positive, negative = prompts(routes, model)
    a, b = tiny.task(model, 1), tiny.task(model, 2)
    stacked = tiny.patching.apply_tasks(model, [a, b], [1.0, 0.5])
    both = routes.route(model, positive, a, b, strengths="1, 0.5", negative=negative)
    with calls_of(model) as calls:
        assert close(tiny.run(*both), tiny.run(stacked, positive, negative))
    assert calls == [4] * 4
    off = routes.route(model, positive, a, b, strengths="0", negative=negative)
    assert torch.equal(tiny.run(*off), tiny.run(model, positive, negative))


def test_without_a_negative_the_negative_runs_the_base_in_the_same_call(routes: Routes) -> None:
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    positive, negative = prompts(routes, model)
    task = tiny.task(model)
    routed, with_task, blocked = routes.route(model, positive, task)
    assert "no negative to give" in blocked.message
    with calls_of(model) as calls:
        result = denoised(routes, routed, with_task, negative)
    assert calls == [4]
    base = denoised(routes, model, positive, negative)
    everywhere = denoised(routes, tiny.apply(model, task), positive, negative)
    assert close(result[:2], base[:2])  # ComfyUI puts the negative prompt first
    assert close(result[2:], everywhere[2:])
    assert not close(result[2:], base[2:], 1e-3)


def denoised(routes: Routes, model: Any, positive: Any, negative: Any) -> Tensor:
    """What the denoiser gives in the first step, by rows."""
    found: list[Tensor] = []

    def record(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        found.append(executor(*args, **kwargs).clone())
        return found[-1]

    watched = model.clone()
    watched.add_wrapper_with_key("apply_model", "record", record)
    routes.tiny.run(watched, positive, negative, steps=1)
    return found[0]


def test_combined_prompts_with_different_tasks_share_the_call(routes: Routes, clean: Any) -> None:
    """Their rows are what each would be alone; masks weigh them as ever."""
    tiny = routes.tiny
    model = clean(tiny.load("tiny_sd3"))
    one, two, negative = (tiny.prompt(seed) for seed in (1, 3, 2))
    a, b = tiny.task(model, 1), tiny.task(model, 2)
    routed, first, _ = routes.route(model, one, a)
    routed, second, _ = routes.route(routed, two, b, strengths="0.5")
    assert len(tiny.patching.tasks_on(routed)) == 2
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    set_mask = tiny.nodes.ConditioningSetMask().append
    (here,) = set_mask(first, left, "default", 1.0)
    (there,) = set_mask(second, 1 - left, "default", 1.0)
    (both,) = tiny.nodes.ConditioningCombine().combine(here, there)
    with calls_of(model) as calls:
        rows = denoised(routes, routed, both, negative)
        result = tiny.run(routed, both, negative, steps=3)
    assert calls == [6] * 4
    assert close(rows[:2], denoised(routes, model, one, negative)[:2])  # the negative
    with_b = denoised(routes, tiny.apply(model, b, 0.5), two, negative)
    with_a = denoised(routes, tiny.apply(model, a), one, negative)
    assert close(rows[2:4], with_b[2:])  # the later conditioning comes first
    assert close(rows[4:], with_a[2:])
    assert not close(result, tiny.run(routed, here, negative, steps=3), 1e-3)


def test_areas_run_their_own_tasks(routes: Routes) -> None:
    """The same calls and rows as ComfyUI makes of the areas without tasks."""
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    one, two, negative = (tiny.prompt(seed) for seed in (1, 3, 2))
    a, b = tiny.task(model, 1), tiny.task(model, 2)
    set_area = tiny.nodes.ConditioningSetArea().append

    def halves(first: Any, second: Any) -> Any:
        return set_area(first, 32, 64, 0, 0, 1.0)[0] + set_area(second, 32, 64, 32, 0, 1.0)[0]

    routed, first, _ = routes.route(model, one, a)
    routed, second, _ = routes.route(routed, two, b)
    with calls_of(model) as plain:
        tiny.run(model, halves(one, two), negative, steps=3)
    with calls_of(model) as calls:
        result = tiny.run(routed, halves(first, second), negative, steps=3)
    assert calls == plain
    assert sorted(calls[: len(calls) // 3]) == [2, 8]  # the halves and their negatives; the whole
    same = routes.route(model, one, a)
    again = tiny.run(same[0], halves(same[1], same[1]), negative, steps=3)
    everywhere = tiny.run(tiny.apply(model, a), halves(one, one), negative, steps=3)
    assert not close(again, everywhere, 1e-3)  # its negative runs the base
    assert not close(result, again, 1e-3)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
def test_a_repeated_latent_runs_one_task_each(routes: Routes, cfg: float, sampler: str) -> None:
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    positive, negative = prompts(routes, model)
    tasks = [tiny.task(model, seed) for seed in (1, 2, 3)]
    one = {"samples": torch.zeros(1, 16, 8, 8)}
    (three,) = tiny.nodes.RepeatLatentBatch().repeat(one, 3)
    routed = routes.route(model, positive, *tasks, mode=BY_ROW, negative=negative)
    options = {"cfg": cfg, "sampler": sampler, "steps": 3}
    with calls_of(model) as calls:
        result = routes.sample(*routed, three, **options)
    assert set(calls) == {3 if cfg == 1 else 6}
    for row, task in enumerate(tasks):
        applied = tiny.apply(model, task)
        alone = routes.sample(applied, positive, negative, three, **options)
        assert close(result[row], alone[row], 2e-5)


def test_a_task_beside_routed_ones_runs_everywhere(routes: Routes) -> None:
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    positive, negative = prompts(routes, model)
    a, b, style = (tiny.task(model, seed) for seed in (1, 2, 3))
    styled = tiny.apply(model, style, 0.5)
    routed = routes.route(styled, positive, a, b, mode=BY_ROW, negative=negative)
    result = tiny.run(*routed)
    for row, task in enumerate((a, b)):
        assert close(result[row], tiny.run(tiny.apply(styled, task), positive, negative)[row])


def test_routes_of_a_conditioning_add_up(routes: Routes) -> None:
    """Also the same task again, which is on the model only once."""
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    positive, negative = prompts(routes, model)
    a, b = tiny.task(model, 1), tiny.task(model, 2)
    routed = routes.route(model, positive, a, b, mode=BY_ROW, negative=negative)
    routed = routes.route(*routed[:2], a, strengths="0.5", negative=routed[2])
    assert len(tiny.patching.tasks_on(routed[0])) == 2
    result = tiny.run(*routed)
    both = tiny.patching.apply_tasks(model, [a, b], [0.5, 1.0])
    assert close(result[0], tiny.run(tiny.apply(model, a, 1.5), positive, negative)[0])
    assert close(result[1], tiny.run(both, positive, negative)[1])


def test_control_tasks_go_on_beside_routes(routes: Routes, pack: Any) -> None:
    tiny, control = routes.tiny, Controls(routes.tiny, pack)
    model = tiny.load("tiny_sd3")
    a, b = tiny.task(model, 1), tiny.task(model, 2)
    edges = control.apply(model, control.task(model))
    routed = routes.route(*edges[:2], a, b, mode=BY_ROW, negative=edges[2])
    with calls_of(model) as calls:
        result = tiny.run(*routed)
    assert calls == [4] * 2
    for row, task in enumerate((a, b)):
        alone = tiny.run(tiny.apply(edges[0], task), *edges[1:])
        assert close(result[row], alone[row])


def test_ranges_and_schedules_of_routed_tasks(routes: Routes) -> None:
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    positive, negative = prompts(routes, model)
    early = routes.schedule(tiny.task(model, 1), "0: 1\n0.6: 0", "step")
    late = tiny.task(model, 2)
    routed = routes.route(model, positive, early, late, mode=BY_ROW, negative=negative)
    with calls_of(model) as calls:
        result = tiny.run(*routed, steps=5)
    assert calls == [4] * 5
    for row, task in enumerate((early, late)):
        alone = tiny.run(tiny.apply(model, task), positive, negative, steps=5)
        assert close(result[row], alone[row])
    plain = tiny.apply(model, early.replace(schedule=None))
    assert not close(result[0], tiny.run(plain, positive, negative, steps=5)[0], 1e-3)
    part = [[c, {**more, "start_percent": 0.5, "end_percent": 1.0}] for c, more in routed[1]]
    whole = [[c, {**more, "start_percent": 0.0, "end_percent": 0.5}] for c, more in positive]
    switched = tiny.run(routed[0], part + whole, routed[2], steps=5)
    assert not close(switched, result, 1e-3)


def test_another_order_of_tasks_or_strengths_makes_no_new_carrier(routes: Routes) -> None:
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    positive, negative = prompts(routes, model)
    tasks = [tiny.task(model, seed) for seed in (1, 2)]
    patched, _, _ = routes.route(model, positive, *tasks)
    for strengths in ("1, 0", "0, 0.5", "0.2, 0.3"):
        routed = routes.route(patched, positive, *tasks, strengths=strengths, negative=negative)
        tiny.run(*routed)
    assert len(tiny.patching._carriers[model.model]) == 1


def test_one_clear_error_for_another_number_of_latents(routes: Routes, clean: Any) -> None:
    tiny = routes.tiny
    model = clean(tiny.load("tiny_sd3"))
    positive, negative = prompts(routes, model)
    tasks = [tiny.task(model, seed) for seed in (1, 2, 3)]
    routed = routes.route(model, positive, *tasks, mode=BY_ROW, negative=negative)
    error = routes.core.DiffScalerError
    for rows in (2, 6):
        with pytest.raises(error, match=f"for 3 latents, but the latent batch has {rows}"):
            tiny.run(*routed, rows=rows)
    with pytest.raises(error, match="for 2 latents and for 3"):
        routes.route(routed[0], routed[1], *tasks[:2], mode=BY_ROW)
    one = routes.route(model, positive, tasks[0], mode=BY_ROW, negative=negative)
    assert close(tiny.run(*one), tiny.run(tiny.apply(model, tasks[0]), positive, negative))


def test_a_control_task_is_refused(routes: Routes, pack: Any) -> None:
    control = Controls(routes.tiny, pack)
    model = routes.tiny.load("tiny_sd3")
    with pytest.raises(routes.core.DiffScalerError, match="takes a control picture"):
        routes.route(model, routes.tiny.prompt(1), control.task(model))


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_without_the_routed_task_warns_once_and_is_unharmed(
    routes: Routes, caplog: pytest.LogCaptureFixture, monkeypatch: Any, strict: bool
) -> None:
    """Also one whose forward refuses arguments it does not know, as HiDream's does."""
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    positive, negative = prompts(routes, model)
    a, b = tiny.task(model, 1, name="ink"), tiny.task(model, 2, name="neon")
    base = tiny.run(model, positive, negative)
    if strict:
        forward = model.model.diffusion_model.forward

        def narrow(x, timesteps, context=None, y=None, control=None, transformer_options=None):  # type: ignore[no-untyped-def]
            return forward(x, timesteps, context, y, control, transformer_options)

        monkeypatch.setattr(model.model.diffusion_model, "forward", narrow)
    _, with_a, _ = routes.route(model, positive, a)
    only_b, _, _ = routes.route(model, positive, b)
    with caplog.at_level(logging.WARNING):
        assert close(tiny.run(model, with_a, negative), base)  # in two calls, as they differ
        assert warnings(caplog, "routes the task 'ink', but the model") == (0 if strict else 1)
        caplog.clear()
        assert torch.equal(tiny.run(only_b, with_a, negative), base)
    assert warnings(caplog, "routes the task 'ink', but the model") == 1
    assert warnings(caplog, "runs the task 'neon' where a conditioning routes it, but none") == 1
    model_a, with_a, _ = routes.route(model, positive, a, negative=negative)
    assert not close(tiny.run(model_a, with_a, negative), base, 1e-3)


def warnings(caplog: pytest.LogCaptureFixture, words: str) -> int:
    return sum(words in record.getMessage() for record in caplog.records)


def test_the_inputs_stay_as_they_were(routes: Routes) -> None:
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    positive, negative = prompts(routes, model)
    options, wrappers = repr(model.model_options), repr(model.wrappers)
    before = [list(more) for cond in (positive, negative) for _, more in cond]
    routed = routes.route(model, positive, tiny.task(model), negative=negative)
    kept = [dict(more["model_conds"]) for cond in routed[1:] for _, more in cond]
    first = tiny.run(*routed)
    assert torch.equal(tiny.run(*routed), first)
    assert (repr(model.model_options), repr(model.wrappers)) == (options, wrappers)
    assert [list(more) for cond in (positive, negative) for _, more in cond] == before
    assert [more["model_conds"] for cond in routed[1:] for _, more in cond] == kept


def test_on_another_model_object_and_another_gpu(routes: Routes) -> None:
    tiny = routes.tiny
    model, other = tiny.load("tiny_sd3"), tiny.load("tiny_sd3")
    positive, negative = prompts(routes, model)
    tasks = [tiny.task(model, seed) for seed in (1, 2)]
    routed, *conds = routes.route(model, positive, *tasks, mode=BY_ROW, negative=negative)
    wanted = tiny.run(routed, *conds)
    moved = routed.clone(model_override=(other.model, ({}, {}, {}, set())))
    assert torch.equal(tiny.run(moved, *conds), wanted)
    clone = routed.deepclone_multigpu(new_load_device=torch.device("cpu"))
    assert torch.equal(tiny.run(clone, *conds), wanted)


@pytest.mark.slow
def test_under_torch_compile_routes_change_without_recompiling(
    routes: Routes, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._dynamo
    from comfy.ldm.modules import attention
    from comfy.ldm.modules.diffusionmodules import mmdit
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    # On the CPU the default attention looks at the free memory, and recompiles when it changes.
    monkeypatch.setattr(mmdit, "optimized_attention", attention.attention_pytorch)
    torch._dynamo.reset()
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    positive, negative = prompts(routes, model)
    a, b, c = (tiny.task(model, seed) for seed in (1, 2, 3))
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, "eager")

    def run(start: Any, *tasks: Any, strengths: str = "") -> Tensor:
        start, _, _ = routes.route(start, positive, a, b, c)
        options = {"strengths": strengths, "mode": BY_ROW, "negative": negative}
        return tiny.run(*routes.route(start, positive, *tasks, **options), rows=2)

    assert close(run(compiled, a, b), run(model, a, b), 2e-5)
    run(compiled, b, c, strengths="0.5, 1")
    torch._dynamo.utils.counters.clear()
    for tasks, strengths in (((c, a), "0.7, 0.2"), ((b, b), "1, 0.5"), ((a, c), "0, 1")):
        result = run(compiled, *tasks, strengths=strengths)
        assert close(result, run(model, *tasks, strengths=strengths), 2e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    torch._dynamo.reset()
