import torch

from diffscaler_core import TaskAdapter
from diffscaler_core.describe import describe


def _facts(text: str) -> dict[str, str]:
    return {line[:15].strip(): line[15:] for line in text.splitlines()}


def test_every_recorded_fact_is_told_and_no_other() -> None:
    layer = {"scale": torch.zeros(4), "down": torch.zeros(2, 3), "up": torch.zeros(4, 2)}
    info = {
        "name": "flowers",
        "method": "diffscaler",
        "parts": ["scale", "subspace"],
        "activation": "relu",
        "base": {"family": "sd3", "class": "SD3Transformer2DModel", "fingerprint": "0123abcd"},
        "prompts": ["", "a rose"],
        "training": {"steps": 500, "learning_rate": 3e-4, "versions": {"torch": "2.13"}},
        "trigger": None,
    }
    spec = {"title": "Flowers", "description": "Two\nlines", "author": "somebody"}
    text = describe(TaskAdapter({"transformer.x": layer}, info, modelspec=spec))
    for words in (
        "flowers",
        "Flowers",
        "somebody",
        "Stable Diffusion 3",
        "0123abcd",
        "scale, relu subspace [arXiv:2404.09976]",
        "18",
        "72 bytes (float32)",
        "'', 'a rose'",
        "steps 500, learning_rate 0.0003, versions (torch 2.13)",
    ):
        assert words in text, words
    assert "trigger" not in text
    assert "created" not in text
    assert text.splitlines()[3].startswith(" ")  # the second line of the description is indented


def test_a_task_of_prompts_alone_and_one_without_facts() -> None:
    prompts = {"context": torch.zeros(1, 4, 8, dtype=torch.float16)}
    stored = TaskAdapter({}, {"name": "words", "method": "prompts", "prompts": ["x"]}, prompts)
    assert "stored prompts only" in describe(stored)
    assert "float16" in describe(stored)
    assert "made for" in describe(TaskAdapter({}))


def test_ranks_that_differ_are_a_range() -> None:
    layers = {
        f"unet.{rank}": {"down": torch.zeros(rank, 8), "up": torch.zeros(8, rank)}
        for rank in (2, 4, 8)
    }
    assert "2 to 8" in describe(TaskAdapter(layers))
