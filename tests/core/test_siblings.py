from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffscaler_core import attach, new_task, siblings

from .conftest import filled, reference_task

STRENGTHS = {"a": 1.0, "b": 0.5}


def close(a, b, tolerance=1e-6):
    return (a - b).abs().max() <= tolerance * b.abs().max()


class Attention(nn.Module):
    """q, k and v of one tensor; the rest of another."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        x = x * 2  # as if normalised: a tensor that nobody else holds
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return self.to_out(torch.softmax(q @ k.transpose(1, 2), -1) @ v)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Attention(), Attention()])

    def forward(self, x):
        for block in self.transformer_blocks:
            x = x + block(x)
        return x


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Two().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def products(monkeypatch):
    """How many Ds each shared product had."""
    made = []
    split = siblings._Products._split

    def counting(self, hidden, offers):
        made.append(len(offers))
        split(self, hidden, offers)

    monkeypatch.setattr(siblings._Products, "_split", counting)
    return made


def test_a_finished_task_draws_the_same_bits_at_every_call(model, x, products):
    with attach(model, task_on(model)):
        first = model(x)
        assert all(torch.equal(model(x), first) for _ in range(3))
    assert products == []


def task_on(model, seed=0, **options):
    options.setdefault("rank", 3)
    return filled(new_task(model, targets="all", **options), seed)


def never(self, member, x, offer, device, dtype):
    return None


def test_q_k_and_v_share_one_product_from_the_second_call(model, x, products):
    with attach(model, task_on(model)) as attachment:
        attachment.requires_grad_()
        alone = model(x)
        assert products == []
        for _ in range(3):
            assert close(model(x), alone)
        assert products == [3] * 6  # two blocks, one product each, the fourth layer by itself


def test_layers_of_any_rank_and_activation_share_exactly(model, x, products, monkeypatch):
    tasks = {"a": task_on(model, 0), "b": task_on(model, 1, method="lora", rank=2)}
    own = dict(tasks["a"].layers)
    one = "transformer.transformer_blocks.0.to_k"
    own[one] = {k: t for k, t in own[one].items() if k in ("scale", "shift")}
    own["transformer.transformer_blocks.1.to_v"] = {"shift": torch.ones(8)}
    tasks["a"] = tasks["a"].replace(layers=own)
    with attach(model, tasks, STRENGTHS) as attachment:
        attachment.requires_grad_()
        for groups in (None, ["a"], ["b"]):
            attachment.set_groups(groups)
            for _ in range(3):
                got = model(x)
            with monkeypatch.context() as patch:
                patch.setattr(siblings.Siblings, "share", never)
                assert close(got, model(x))
    assert products


def gradients(attachment, loss):
    attachment.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in attachment.parameters()]


@pytest.mark.parametrize("how", ["plain", "checkpoint", "reentrant"])
def test_shared_products_give_the_same_gradients(model, x, products, how, monkeypatch):
    x.requires_grad_()
    with attach(model, task_on(model)) as attachment:
        attachment.requires_grad_()
        with monkeypatch.context() as patch:
            patch.setattr(siblings.Siblings, "share", never)
            wanted = gradients(attachment, model(x).square().sum())
        for block in model.transformer_blocks if how != "plain" else ():
            block.forward = lambda h, b=block: checkpoint(
                type(b).forward, b, h, use_reentrant=how == "reentrant"
            )
        for _ in range(3):
            got = gradients(attachment, model(x).square().sum())
            assert all(map(close, got, wanted, [1e-5] * len(wanted)))
    assert products


def test_two_forwards_before_their_backwards_work_with_checkpointing(model, x):
    with attach(model, task_on(model)) as attachment:
        attachment.requires_grad_()
        wanted = gradients(attachment, model(x).square().sum() + model(-x).square().sum())
        for block in model.transformer_blocks:
            block.forward = lambda h, b=block: checkpoint(
                type(b).forward, b, h, use_reentrant=False
            )
        attachment.requires_grad_()
    with attach(model, task_on(model)) as attachment:
        attachment.requires_grad_()
        got = gradients(attachment, model(x).square().sum() + model(-x).square().sum())
    assert all(map(close, got, wanted, [1e-5] * len(wanted)))


@pytest.mark.parametrize("train", [True, False])
def test_changes_of_parameters_are_seen_at_once(model, x, train):
    with attach(model, task_on(model)) as attachment:
        attachment.requires_grad_(train)
        for factor in (1.0, 0.5, 0.0):
            with torch.no_grad():
                for parameter in attachment.parameters():
                    parameter.mul_(factor)
            for _ in range(2):
                assert close(model(x), reference_task(plain(model), [attachment.task()], [1.0])(x))


def plain(model):
    copied = Two().requires_grad_(False)
    copied.load_state_dict(model.state_dict())
    return copied


def test_an_input_changed_in_place_between_siblings_is_multiplied_anew(model):
    block = model.transformer_blocks[0]
    h = torch.randn(2, 5, 8)
    with attach(model, task_on(model)) as attachment, torch.no_grad():
        attachment.requires_grad_()
        for _ in range(2):
            block.to_q(h), block.to_k(h), block.to_v(h), block.to_out(h + 0)
        block.to_q(h)
        h.mul_(3)
        got = block.to_k(h)
        assert torch.equal(got, block.to_k(h.clone()))


@pytest.mark.parametrize("train", [True, False])
def test_nothing_of_a_forward_is_kept_alive(model, x, train):
    inputs = []
    block = model.transformer_blocks[0]
    block.to_k.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    with attach(model, task_on(model)) as attachment:
        attachment.requires_grad_(train)
        for _ in range(3):
            model(x)
        shared = attachment.stacks[0].siblings
        gc.collect()
        assert [ref() for ref in inputs] == [None] * 3
        assert shared._products is None


@pytest.mark.parametrize("train", [True, False])
def test_an_exception_between_siblings_leaves_nothing(model, x, train):
    block, inputs = model.transformer_blocks[0], []

    def fail(module, args):
        inputs.append(weakref.ref(args[0]))
        if len(inputs) == 3:
            raise MemoryError

    handle = block.to_k.register_forward_pre_hook(fail)
    with attach(model, task_on(model)) as attachment:
        attachment.requires_grad_(train)
        wanted = model(x)
        model(x)
        try:
            model(x)
        except MemoryError as error:
            error.__traceback__ = None
        gc.collect()
        assert inputs[-1]() is None
        assert attachment.stacks[0].siblings._products is None
        handle.remove()
        assert close(model(x), wanted)


def test_what_inference_mode_shared_is_not_used_outside(model):
    block, h = model.transformer_blocks[0], torch.randn(2, 5, 8)
    with attach(model, task_on(model)) as attachment:
        attachment.requires_grad_()
        for _ in range(2):
            block.to_q(h), block.to_k(h), block.to_v(h), block.to_out(h + 0)
        with torch.inference_mode():
            block.to_q(h)
        block.to_k(h).sum().backward()
        assert attachment.parameters_of("task")  # the name new_task gives


def test_a_frozen_task_lets_gradients_through_to_the_input(model, x):
    with attach(model, task_on(model)):
        model(x)
        model(x)
        x.requires_grad_()
        model(x).square().sum().backward()
        exact = x.grad.clone()
    assert exact.abs().sum() > 0
    y = x.detach().clone().requires_grad_()
    reference_task(model, [task_on(model)], [1.0])(y).square().sum().backward()
    assert close(exact, y.grad, 1e-5)


def test_copies_and_pickles_find_their_own_siblings(model, x, products):
    with attach(model, task_on(model)) as attachment:
        attachment.requires_grad_()
        for _ in range(2):
            wanted = model(x)
        copied, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    products.clear()
    for other in (copied, again):
        for _ in range(2):
            assert close(other(x), wanted)
    assert products == [3] * 4


def test_autocast_casts_the_input_once_for_all(model, x):
    with attach(model, task_on(model)) as attachment:
        attachment.requires_grad_()
        exact = gradients(attachment, model(x).square().sum())
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x)
        kept = []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
            torch.autocast("cpu", torch.bfloat16),
        ):
            out = model(x)
        casts = Counter(t.data_ptr() for t in kept if t.dtype == torch.bfloat16)
        got = gradients(attachment, out.float().square().sum())
    assert sorted(casts.values())[-2:] == [3, 3]  # in each block one for q, k and v
    got, exact = (torch.cat([g.flatten() for g in own]) for own in (got, exact))
    assert (got - exact).norm() <= 0.05 * exact.norm()
