"""Counter-based randomness: every random number of a run follows from (seed, what, which).

No generator lives longer than one call, so batch number 4711 of seed 0 is the same whether a run
got there in one go, was resumed, or ran on eight devices.
"""

from __future__ import annotations

import hashlib

import torch

_MASK = (1 << 64) - 1


def mixed(*keys: int | str) -> int:
    """Returns 64 well-mixed bits of numbers and names; their order and their count matter.

    Each key is added to the state, which then goes through the finaliser of splitmix64 (Steele,
    Lea and Flood 2014, "Fast splittable pseudorandom number generators").
    """
    state = len(keys)
    for key in keys:
        number = _number(key) if isinstance(key, str) else key
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def generator_for(
    seed: int, *keys: int | str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Returns a generator that depends on the seed and all keys, and on nothing else.

    `torch.manual_seed(seed + step)` makes streams that meet: step 1 of seed 0 would be step 0 of
    seed 1. Here (0, 1), (1, 0) and (0, 1, 0) all differ.

    Args:
        seed: The run's seed.
        keys: What the numbers are drawn for (a name), then which of them: a step, an epoch, …
        device: Where it draws. Draws differ between CPU and CUDA, so use the CPU for anything
            that must be the same everywhere.
    """
    # 63 bits: some builds refuse seeds that do not fit in an int64.
    return torch.Generator(device).manual_seed(mixed(seed, *keys) >> 1)


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
