"""Tasks beside ComfyUI's other nodes, in both orders: the formula's picture, or one clear error."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from . import test_control_hosts as hosts
from .beside import NODES, Beside
from .beside import cache as cache_node
from .controls import Controls, image
from .formula import close, replaced
from .routes import BY_ROW, Routes, router_site

CASES, BY_ROWS = (
    pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in own])
    for own in (NODES, [case for case in NODES if case.by_row])
)


@pytest.fixture
def routes(tiny: Any, pack: Any) -> Routes:
    return Routes(tiny, pack)


class Chain:
    """One case: how to put its node in a chain, and how to sample.

    Args:
        case: The case.
        tiny: Tiny models.
    """

    def __init__(self, case: Beside, tiny: Any) -> None:
        self.case, self.tiny = case, tiny

    def load(self) -> Any:
        return self.tiny.load(self.case.family)

    def node(self, model: Any) -> Any:
        return model if self.case.model is None else self.case.model(self.tiny, model)

    def prompts(self, model: Any) -> list[Any]:
        width = 768 if self.case.family == "tiny_unet" else 32
        return [self.tiny.prompt(seed, width) for seed in (1, 2)]

    def conds(self, model: Any, conds: Any) -> Any:
        return conds if self.case.conds is None else self.case.conds(self.tiny, model, *conds)

    def sample(self, model: Any, conds: Any = None, nodes: bool = True) -> Tensor:
        conds = self.prompts(model) if conds is None else conds
        conds = self.conds(model, conds) if nodes else conds
        channels = 4 if self.case.family == "tiny_unet" else 16
        latent = {"samples": torch.zeros(self.case.rows, channels, 8, 8)}
        if self.case.masked:
            latent["noise_mask"] = torch.linspace(0, 1, 64).repeat(64, 1)[None]
            latent["samples"] += 0.3
        return self.tiny.nodes.KSampler().sample(
            model, 0, self.case.steps, 4.0, "euler", "normal", *conds, latent, 1.0
        )[0]["samples"]

    def reference(self, *tasks: tuple[Any, float]) -> Tensor:
        """The case written out: the formula's layers in a model of its own."""
        model = self.load()
        if self.case.by_hand is not None:
            return self.sample(replaced(self.case.by_hand(self.tiny, model), *tasks), nodes=False)
        return self.sample(self.node(replaced(model, *tasks)))


@CASES
def test_both_orders_are_the_formula(tiny: Any, case: Beside) -> None:
    chain = Chain(case, tiny)
    model = chain.load()
    a, b = tiny.task(model, 1), tiny.task(model, 2)
    base = chain.sample(model, nodes=False)

    def both(start: Any) -> Any:
        return tiny.patching.apply_tasks(start, [a, b], [1.0, 0.5])

    after = chain.sample(both(chain.node(model)))
    before = chain.sample(chain.node(both(model)))
    wanted = chain.reference((a, 1.0), (b, 0.5))
    assert close(after, wanted, 2e-5)
    assert close(before, wanted, 2e-5)
    plain = chain.sample(chain.node(model))
    assert not close(after, plain, 1e-3)  # the tasks do something
    assert not close(plain, base, 1e-4)  # so does the node
    assert torch.equal(chain.sample(model, nodes=False), base)
    _unload()


@BY_ROWS
def test_one_task_per_latent(routes: Routes, case: Beside) -> None:
    tiny = routes.tiny
    chain = Chain(case, tiny)
    model = chain.load()
    tasks = tiny.task(model, 1), tiny.task(model, 2)
    prompts = chain.prompts(model)

    def routed(start: Any, conds: Any) -> tuple[Any, ...]:
        return routes.route(start, conds[0], *tasks, mode=BY_ROW, negative=conds[1])

    first, *conds = routed(chain.node(model), prompts)
    after = chain.sample(first, conds)
    second, *conds = routed(model, chain.conds(model, prompts))
    before = chain.sample(chain.node(second), conds, nodes=False)
    for row, task in enumerate(tasks):
        alone = chain.sample(tiny.apply(chain.node(model), task))
        assert close(after[row], alone[row], 2e-5)
        assert close(before[row], alone[row], 2e-5)
    assert not close(alone[0], after[0], 1e-3)
    _unload()


def _unload() -> None:
    import comfy.model_management

    comfy.model_management.unload_all_models()  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["ModelMergeSimple", "ModelSubtract", "ModelAdd"])
def test_merging_a_model_with_tasks_into_another_is_refused(tiny: Any, kind: str) -> None:
    import comfy_extras.nodes_model_merging as merging

    model, other = tiny.load("tiny_sd3"), tiny.load("tiny_sd3")
    patched = tiny.apply(other, tiny.task(other, name="ink"))
    amounts = [] if kind == "ModelAdd" else [0.5]
    for second in (patched, patched.clone()):
        with pytest.raises(tiny.core.DiffScalerError, match=r"merging takes .* leave out 'ink'"):
            getattr(merging, kind)().merge(model, second, *amounts)
    getattr(merging, kind)().merge(patched, model, *amounts)


def test_saving_a_model_with_tasks_is_refused(tiny: Any) -> None:
    import comfy.sd

    model = tiny.load("tiny_sd3")
    assert model.state_dict_for_saving()
    patched = tiny.apply(model, tiny.task(model, name="ink"))
    with pytest.raises(tiny.core.DiffScalerError, match=r"saving takes .* leave out 'ink'"):
        comfy.sd.save_checkpoint("nowhere.safetensors", patched)  # type: ignore[attr-defined]
    assert patched.get_key_patches().keys() == model.get_key_patches().keys()
    _unload()


def _windowed(model: Any, dim: int, length: int = 4, overlap: int = 2) -> Any:
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    options = ("standard_static", 1, False, "pyramid", dim, False)
    return ContextWindowsManualNode.execute(model, length, overlap, *options).args[0]


def _left() -> Tensor:
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    return mask


def test_windows_over_the_height_refuse_what_has_a_place(routes: Routes, pack: Any) -> None:
    tiny = routes.tiny
    model = _windowed(tiny.load("tiny_sd3"), 2)
    task, error = tiny.task(model, name="ink"), routes.core.DiffScalerError
    with pytest.raises(error, match="over the height cannot follow the region of 'ink'"):
        tiny.run(tiny.apply(model, task, region=_left()), rows=1)
    control = Controls(tiny, pack)
    applied = control.apply(model, control.task(model, name="edges"))
    with pytest.raises(error, match="over the height cannot follow the control picture of 'edges'"):
        tiny.run(*applied, rows=1)


def test_windows_over_the_batch_refuse_what_is_given_per_latent(routes: Routes, pack: Any) -> None:
    tiny = routes.tiny
    model = tiny.load("tiny_sd3")
    windowed = _windowed(model, 0, 2, 1)
    task, error = tiny.task(model, name="ink"), routes.core.DiffScalerError
    masks = torch.cat([_left(), 1 - _left(), _left(), _left()])
    with pytest.raises(error, match="over the batch cannot follow the regions per latent of 'ink'"):
        tiny.run(tiny.apply(windowed, task, region=masks), rows=4)
    tasks = [tiny.task(model, seed) for seed in range(4)]
    routed = routes.route(windowed, tiny.prompt(1), *tasks, mode=BY_ROW, negative=tiny.prompt(2))
    with pytest.raises(error, match="one task per latent for 4 latents"):
        tiny.run(*routed, rows=4)
    result = tiny.run(tiny.apply(windowed, task, region=_left()), rows=4)
    assert close(result, tiny.run(tiny.apply(model, task, region=_left()), rows=4), 2e-5)


def test_windows_over_frames_refuse_a_control_video(routes: Routes, pack: Any) -> None:
    """One picture for all frames is the same in each window; one per frame is not."""
    control = Controls(routes.tiny, pack)
    model, vae = hosts._patcher("WAN21_T2V", hosts.WAN), hosts._wan_vae()
    model = _windowed(model, 2, 2, 1)
    task = control.task(model, name="edges")
    shape = (1, 16, 3, 8, 8)
    one = hosts._sample(control, control.apply(model, task, vae=vae), shape)
    assert not close(one, hosts._sample(control, (model, *control.prompts(model)), shape), 1e-3)
    many = control.apply(model, task, image(5, count=9), vae=vae)
    with pytest.raises(
        routes.core.DiffScalerError, match="over the frames cannot follow the control pictures of"
    ):
        hosts._sample(control, many, shape)


CACHES = pytest.mark.parametrize("cache", ["EasyCacheNode", "LazyCacheNode"])
STEPS = 10


class Cached:
    """A cache that skips whatever it may, and the same sampling cut in two by hand.

    Args:
        routes: The nodes.
        cache: The node's class.
    """

    def __init__(self, routes: Routes, cache: str) -> None:
        self.routes, self.tiny = routes, routes.tiny
        # ComfyUI's SD3 has no place for EasyCache
        self.model = self.tiny.load("tiny_flux" if cache == "EasyCacheNode" else "tiny_sd3")
        self._node = cache_node(cache)
        self.switch = STEPS // 2
        self.percent = self._percent()

    def _percent(self) -> float:
        import comfy.samplers

        sampling = self.model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)  # type: ignore[attr-defined]
        between = float(sigmas[self.switch - 1 : self.switch + 1].mean())
        percents = [i / 1000 for i in range(1001)]
        return min(percents, key=lambda p: abs(float(sampling.percent_to_sigma(p)) - between))

    def on(self, model: Any) -> Any:
        return self._node(self.tiny, model)

    def log_snr(self, pack: Any) -> Tensor:
        """The noise level at which something changes."""
        sampling = self.model.get_model_object("model_sampling")
        sigma = torch.tensor(float(sampling.percent_to_sigma(self.percent)))
        return pack.nodes.noise.log_snr_of(sampling, sigma)

    def router(self, pack: Any) -> Any:
        """A router that reads the model, and goes by nothing but the noise."""
        core, (_, site) = pack.diffscaler_core, router_site(pack, self.model)
        context, more = self.tiny.prompt(9)[0]
        null = {"context": context, "pooled": more["pooled_output"]}
        edge = self.log_snr(pack)

        class ByNoise(core.systems.router.Router):  # type: ignore[misc, name-defined]
            def forward(self, features: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
                assert features.shape[1] == self.width
                late = 2 * (alpha / sigma).log() > edge
                return torch.where(late[:, None], torch.tensor([-9.0, 9]), torch.tensor([9.0, -9]))

        return ByNoise(NAMES, site, 128, 0, null)

    @contextmanager
    def calls(self) -> Iterator[list[int]]:
        """Yields a number per call of the first block: EasyCache sits inside the model's call."""
        made: list[int] = []
        inner = self.model.model.diffusion_model
        blocks = inner.double_blocks if hasattr(inner, "double_blocks") else inner.joint_blocks
        handle = blocks[0].register_forward_pre_hook(lambda *_: made.append(1))
        try:
            yield made
        finally:
            handle.remove()

    def run(
        self, model: Any, conds: Any = None, part: tuple[int, int] = (0, STEPS), at: Any = None
    ) -> tuple[Tensor, list[int]]:
        conds = [self.tiny.prompt(1), self.tiny.prompt(2)] if conds is None else conds
        first = at is None
        latent = {"samples": torch.zeros(2, 16, 8, 8) if first else at}
        with self.calls() as calls:
            sampled = self.tiny.nodes.KSamplerAdvanced().sample(
                *(model, "enable" if first else "disable", 3, STEPS, 4.0, "euler", "normal"),
                *(*conds, latent, *part, "enable"),
            )
        return sampled[0]["samples"].clone(), calls

    def halves(self, first: Any, second: Any) -> tuple[Tensor, list[int]]:
        """Each half a sampling of its own, with a cache of its own; (MODEL, prompts) each."""
        middle, calls = self.run(*first, (0, self.switch))
        result, more = self.run(*second, (self.switch, STEPS), middle)
        return result, calls + more


NAMES = ("one", "two")


def _subspace(task: Any) -> Any:
    layers = {n: {p: own[p] for p in ("down", "up")} for n, own in task.layers.items()}
    return task.replace(layers=layers).with_info(method="lora", parts=["subspace"])


def _changes(cached: Cached, change: str, pack: Any) -> list[tuple[Any, Any]]:
    """(MODEL, prompts) with something that changes half way, then of either half without."""
    routes, tiny, model, at = cached.routes, cached.tiny, cached.model, cached.percent
    conds = [tiny.prompt(1), tiny.prompt(2)]
    task = tiny.task(model, std=0.05)
    if change == "range":
        late, whole = tiny.apply(model, task, 1.0, at, 1.0), tiny.apply(model, task)
        return [(late, conds), (model, conds), (whole, conds)]
    if change == "schedule":
        points = f"step\n0: 0.3\n{at}: 1"
        scheduled = tiny.apply(model, routes.schedule(task, points))
        halves = [tiny.apply(model, task, strength) for strength in (0.3, 1.0)]
        return [(scheduled, conds), *((half, conds) for half in halves)]
    if change == "control":
        control = Controls(tiny, pack)
        own = control.task(model)
        ending = control.apply(model, own, end_percent=at)
        whole = control.apply(model, own)
        return [(ending[0], ending[1:]), (whole[0], whole[1:]), (model, conds)]
    if change == "one row's schedule":
        other = tiny.task(model, 2, std=0.05)

        def routed(*tasks: Any) -> tuple[Any, Any]:
            given = routes.route(model, conds[0], *tasks, mode=BY_ROW, negative=conds[1])
            return given[0], given[1:]

        late, quarter = routes.schedule(task, f"step\n0: 0.25\n{at}: 1"), None
        quarter = routes.core.scale_task(task, 0.25)
        return [routed(other, late), routed(other, quarter), routed(other, task)]
    if change == "noise range":
        parts = [_subspace(tiny.task(model, seed, std=0.05)) for seed in (1, 2)]
        edge = float(cached.log_snr(pack))
        both = routes.core.combine_tasks(parts, ranges=[(None, edge), (edge, None)], name="both")
        return [(tiny.apply(model, task), conds) for task in (both, *parts)]
    if change == "experts":
        tasks = [tiny.task(model, i, std=0.05, name=name) for i, name in enumerate(NAMES)]
        router = cached.router(pack)
        routed = pack.nodes.expert_routing.route_experts(model, tasks, router)
        return [(routed, conds), *((tiny.apply(model, task), conds) for task in tasks)]
    assert change == "prompt's range"
    given = routes.route(model, conds[0], task, negative=conds[1])
    set_range = tiny.nodes.ConditioningSetTimestepRange().set_range
    early = [set_range(cond, 0.0, at)[0] for cond in conds]
    late = [set_range(cond, at, 1.0)[0] for cond in given[1:]]
    mixed = [a + b for a, b in zip(early, late, strict=True)]
    return [(given[0], mixed), (given[0], conds), (given[0], given[1:])]


CHANGES = [
    *("range", "schedule", "control", "one row's schedule", "prompt's range"),
    *("noise range", "experts"),
]


@CACHES
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cache_first", [True, False])
def test_a_cache_forgets(
    routes: Routes,
    pack: Any,
    part: Any,
    monkeypatch: pytest.MonkeyPatch,
    cache: str,
    change: str,
    cache_first: bool,
) -> None:
    """A change half way is what two samplings, each with a cache of its own, give."""
    cached = Cached(routes, cache)
    if cache_first:
        plain, cached.model = cached.model, cached.on(cached.model)
        ways = _changes(cached, change, pack)
        cached.model = plain
    else:
        ways = [(cached.on(model), conds) for model, conds in _changes(cached, change, pack)]
    looks: list[int] = []
    look = part("nodes.expert_routing").tapped
    monkeypatch.setattr(
        part("nodes.expert_routing"), "tapped", lambda *a: (looks.append(1), look(*a))[1]
    )
    result, calls = cached.run(*ways[0])
    wanted, wanted_calls = cached.halves(*ways[1:])
    assert close(result, wanted, 2e-5)
    assert len(calls) - len(looks) == len(wanted_calls)
    assert bool(looks) == (change == "experts")
    assert len(wanted_calls) < STEPS  # steps were left out
    monkeypatch.setattr(part("nodes.step_caches"), "_empty", lambda cache: None)
    assert not close(cached.run(*ways[0])[0], wanted, 1e-3)  # and it matters


@CACHES
def test_a_strength_that_always_changes_leaves_no_step_out(routes: Routes, cache: str) -> None:
    cached = Cached(routes, cache)
    tiny, model = cached.tiny, cached.model
    sliding = tiny.apply(model, routes.schedule(tiny.task(model), "0: 0\n1: 1"))
    result, calls = cached.run(cached.on(sliding))
    assert close(result, cached.run(sliding)[0], 1e-6)
    assert len(calls) == STEPS
    assert len(cached.run(cached.on(model))[1]) < STEPS


@CACHES
def test_a_cache_that_sees_no_change_is_left_alone(
    routes: Routes, part: Any, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    """Rows of different tasks, guidance in one call, several samplings: none is a change."""
    emptied: list[Any] = []
    monkeypatch.setattr(part("nodes.step_caches"), "_empty", emptied.append)
    cached = Cached(routes, cache)
    tiny, model = cached.tiny, cached.model
    tasks = tiny.task(model, 1), tiny.task(model, 2)
    first, *conds = routes.route(
        cached.on(model), tiny.prompt(1), *tasks, mode=BY_ROW, negative=tiny.prompt(2)
    )
    for _ in range(2):
        assert len(cached.run(first, conds)[1]) < STEPS
    assert len(cached.run(tiny.apply(first, tasks[0], 0.5), conds)[1]) < STEPS
    assert not emptied
