"""The workflows `translate` and `guided` behind a real server, small and in few steps."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows" / "api"


def drawn(server: Any, name: str) -> list[Any]:
    """Returns the pictures of a workflow in the order of its previews, (64, 64, 3) each."""
    graph = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        small = {"steps": 3, "width": 64, "height": 64, "x": 32}
        for key, value in small.items():
            if key in node["inputs"] and node["inputs"][key]:
                node["inputs"][key] = value
        if node["class_type"] == "SolidMask" and node["inputs"]["value"]:
            node["inputs"]["width"] = 32
    outputs = server.run(graph, timeout=300)["outputs"]
    ordered = {key: outputs[key] for key in sorted(outputs, key=int)}
    files = server.images({"outputs": ordered})
    return [np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), int) for file in files]


@pytest.mark.slow
def test_a_picture_becomes_ink_and_neon(server: Any) -> None:
    base, ink, neon, again = drawn(server, "translate")
    assert neon.mean() < 100 < ink.mean()  # light on black; black on paper
    assert again.mean() > 100
    assert abs(ink - base).mean() > 10


@pytest.mark.slow
def test_a_colour_is_led_to_and_kept_to_its_half(server: Any) -> None:
    plain, blue, half = drawn(server, "guided")
    aim = np.array([0x30, 0x60, 0xD0])
    far, near = (((one.mean((0, 1)) - aim) ** 2).sum() for one in (plain, blue))
    assert near < far
    # The VAE has seen the picture twice, and its window reaches over the middle.
    assert abs(half - plain)[:, :16].mean() < abs(half - plain)[:, 48:].mean()
