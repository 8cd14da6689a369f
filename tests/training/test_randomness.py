import itertools

import torch

from diffscaler_core.training.randomness import generator_for, mixed


def test_every_seed_stream_and_step_draws_its_own_numbers():
    names, numbers = ("order", "views", "noise"), range(40)
    keys = [*itertools.product(numbers, names, numbers), *itertools.product(numbers, numbers)]
    draws = {
        float(torch.rand((), generator=generator_for(*key), dtype=torch.float64)) for key in keys
    }
    assert len(draws) == len(keys)


def test_order_and_count_of_the_keys_matter():
    keys = [
        (0,),
        (0, 0),
        (1, 0),
        (0, 1),
        (0, 1, 0),
        (0, "1"),
        (-1,),
        (2**64 - 2,),
        (0, "a"),
        (0, "b"),
    ]
    assert len({mixed(*key) for key in keys}) == len(keys)


def test_the_same_keys_draw_the_same_numbers_in_any_process():
    assert torch.equal(
        torch.randn(4, generator=generator_for(7, "noise", 3)),
        torch.randn(4, generator=generator_for(7, "noise", 3)),
    )
    assert mixed(0, "order", 1) == 8728663695919503953


def test_one_changed_bit_changes_about_half_of_the_bits():
    flips = [
        (mixed(5, "x", n) ^ mixed(5, "x", n ^ 1 << bit)).bit_count()
        for n in range(20)
        for bit in range(20)
    ]
    assert 30 < sum(flips) / len(flips) < 34
    assert min(flips) > 10
