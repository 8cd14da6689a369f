"""The drawn styles: what becomes of a posed subject, (H, W, 4) in 0..1, square."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def _blur(image: Floats, sigma: float) -> Floats:
    """Gaussian blur of (H, W), separable, edges repeated."""
    size, radius = len(image), max(1, round(sigma * 3))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for axis in (0, 1):
        pads = [(radius, radius) if i == axis else (0, 0) for i in (0, 1)]
        padded = np.pad(image, pads, mode="edge")
        image = sum(  # type: ignore[assignment]
            weight * np.take(padded, range(i, i + size), axis=axis)
            for i, weight in enumerate(kernel)
        )
    return image


def outline(pixels: Floats) -> Floats:
    """Where a pen would go: contours of silhouette and colour, (H, W, 4) -> (H, W).

    Grey behind the subject, because both white and black subjects then keep their silhouette;
    alpha is a channel of its own for the subjects that are grey themselves.
    """
    colour, alpha = pixels[..., :3], pixels[..., 3]
    planes = [_blur(plane, 0.9) for plane in np.moveaxis(colour * alpha[..., None], -1, 0)]
    planes.append(_blur(alpha, 0.9) * 1.5)
    strength = np.zeros_like(alpha)
    for plane in planes:
        down, right = np.gradient(plane)
        strength = np.maximum(strength, np.hypot(down, right))
    edges = np.clip((strength - 0.045) / 0.09, 0, 1)
    luminance = colour @ np.array([0.299, 0.587, 0.114], np.float32)
    dark = np.clip((0.30 - luminance) / 0.12, 0, 1) * np.clip(alpha * 2 - 1, 0, 1)
    return np.maximum(edges, dark * 0.9).astype(np.float32)


def _lifted(pixels: Floats) -> Floats:
    """Colours without their darkest quarter: contours only, no filled dark areas."""
    return np.concatenate([pixels[..., :3] * 0.75 + 0.25, pixels[..., 3:]], axis=-1)


def ink(pixels: Floats, rng: random.Random) -> Floats:
    """Black contours and dark areas on cream paper."""
    paper = np.array([0.97, 0.935, 0.86], np.float32) * rng.uniform(0.97, 1.0)
    pen = outline(pixels)[..., None]
    return paper * (1 - pen) + np.array([0.07, 0.06, 0.08], np.float32) * pen


def neon(pixels: Floats, rng: random.Random) -> Floats:
    """Tubes from magenta (top) to cyan (bottom), with their glow, on near-black."""
    tube = outline(_lifted(pixels))
    steps = np.linspace(0, 1, len(pixels), dtype=np.float32)[:, None, None]
    light = (
        np.array([1.0, 0.16, 0.72], np.float32) * (1 - steps)
        + np.array([0.10, 0.85, 1.0], np.float32) * steps
    )
    glow = (_blur(tube, 2.0) * 0.9 + _blur(tube, 6.0) * 0.8)[..., None]
    night = np.array([0.035, 0.02, 0.08], np.float32) * rng.uniform(0.8, 1.2)
    return night + light * (tube[..., None] * 0.7 + glow * 0.55) + (tube[..., None] ** 2) * 0.25


def blueprint(pixels: Floats, rng: random.Random) -> Floats:
    """White contours on blue paper with a faint 16 px grid."""
    paper = np.array([0.10, 0.27, 0.56], np.float32) * rng.uniform(0.95, 1.05)
    lines = (np.arange(len(pixels)) % 16 == 8).astype(np.float32)
    grid = np.maximum(lines[:, None], lines[None, :])[..., None] * 0.16
    pen = outline(_lifted(pixels))[..., None]
    sheet = paper + grid * (1 - paper)
    return sheet * (1 - pen) + np.array([0.93, 0.96, 1.0], np.float32) * pen


PAINTERS: dict[str, Callable[[Floats, random.Random], Floats]] = {
    "ink": ink,
    "neon": neon,
    "blueprint": blueprint,
}
