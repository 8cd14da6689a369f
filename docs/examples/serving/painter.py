"""A base and its tasks, and how one batch of requests becomes pictures. Knows nothing of Ray."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import diffscaler_core.pipelines  # noqa: F401  (gives the pipeline its methods)
from diffscaler_core import DiffScalerError
from diffscaler_core.pocket import CONFIG, WORDS, load_pipeline, load_words

from .requests import Facts, PictureRequest, RequestError
from .tasks import TaskFolder

#: Batches in a row without a single picture after which the replica calls itself ill.
ILL_AFTER = 3


class Picture(NamedTuple):
    """A picture (H, W, 3), uint8, and how it came about."""

    pixels: np.ndarray
    facts: Facts

    def png(self) -> bytes:
        """Returns the picture as a PNG file."""
        file = io.BytesIO()
        Image.fromarray(self.pixels).save(file, "PNG")
        return file.getvalue()


class Painter:
    """Draws batches on one device. Not thread-safe: one batch at a time.

    Attributes:
        tasks: The tasks it can run.
        side: Pixels of a picture's side where a request does not say.
    """

    def __init__(
        self,
        base: str | Path,
        tasks: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        device_bytes: int = 1 << 29,
        host_bytes: int = 1 << 32,
    ) -> None:
        """Loads the base.

        Args:
            base: `assets/pocket`, or any text-to-image pipeline that diffusers can load.
            tasks: A folder of task files.
            device: Where to draw.
            dtype: What to compute in, by torch's name.
            device_bytes: Of the tasks that stay on the device.
            host_bytes: Of those that stay in memory beside.
        """
        numbers = getattr(torch, dtype)
        self._words: Mapping[str, Any] | None = None
        if (Path(base) / CONFIG).is_file() and (Path(base) / WORDS).is_file():
            self._pipe = load_pipeline(base, numbers)
            self._words = load_words(base)
        else:
            self._pipe = DiffusionPipeline.from_pretrained(base, torch_dtype=numbers)
        self._pipe.to(device)
        self._pipe.set_progress_bar_config(disable=True)
        self._device = device
        self.tasks = TaskFolder(self._pipe, tasks, device_bytes, host_bytes)
        self.side = int(self._pipe.default_sample_size * self._pipe.vae_scale_factor)
        self._failures = 0

    def check_health(self) -> None:
        """Raises if the last batches all failed: a lost device does not come back by itself."""
        if self._failures >= ILL_AFTER:
            raise RuntimeError(f"the last {self._failures} batches gave no picture")

    def paint(self, requests: Sequence[PictureRequest]) -> list[Picture | Exception]:
        """Returns a picture, or what went wrong, for each request of one batch.

        A request with a bad task or prompt is left out. Tasks that do not fit beside the others
        make a batch after them. Should a batch fail as a whole, each of its requests is tried
        alone, so that one of them cannot spoil the others.

        Args:
            requests: One batch: all with the same `batch_key`.
        """
        answers: dict[int, Picture | Exception] = {}
        left = dict(enumerate(requests))
        while left:
            start, before = time.perf_counter(), set(self.tasks.loaded)
            ready, prompts = self._ready(left, answers)
            drawn = self._draw(ready, prompts)
            good = [ready[i] for i, pixels in drawn.items() if isinstance(pixels, np.ndarray)]
            tasks = {name for request in good for name in request.tasks}
            facts = Facts(
                rows=len(good),
                tasks=len(tasks),
                misses=len(tasks - before),
                seconds=time.perf_counter() - start,
            )
            if drawn:
                self._failures = 0 if good else self._failures + 1
            for i, result in drawn.items():
                answers[i] = result if isinstance(result, Exception) else Picture(result, facts)
            left = {i: request for i, request in left.items() if i not in answers}
        return [answers[i] for i in range(len(requests))]

    def _ready(
        self, left: Mapping[int, PictureRequest], answers: dict[int, Any]
    ) -> tuple[dict[int, PictureRequest], dict[int, Any]]:
        """Returns those who can be drawn now, and their prompts; puts errors into `answers`.

        The first one is either ready or has its error, so that the rest comes to its turn.
        """
        ready: dict[int, PictureRequest] = {}
        prompts: dict[int, Any] = {}
        held: list[str] = []
        for i, request in left.items():
            try:
                self.tasks.hold([*held, *request.tasks])
                prompts[i] = self._prompt(request)
            except RequestError as error:
                answers[i] = error
            except DiffScalerError as error:
                if not ready:
                    answers[i] = RequestError(422, str(error))
            else:
                ready[i] = request
                held += request.tasks
        return ready, prompts

    def _prompt(self, request: PictureRequest) -> Any:
        """Returns a request's prompt as the pipeline wants it.

        The pocket base has no text encoder: its prompts are the words it ships, or what one of the
        request's tasks brings.
        """
        if self._words is None:
            return request.prompt
        own = [self.tasks.prompt_of(name) for name in request.tasks]
        for task in own:
            if request.prompt in task.prompts:
                return task.prompt(request.prompt)
        if not request.prompt or request.prompt not in self._words:
            brought = [word for task in own for word in task.prompts]
            known = ", ".join([*brought, *filter(None, self._words)])
            raise RequestError(422, f"unknown word {request.prompt[:100]!r}; known: {known}")
        return self._words[request.prompt]

    def _draw(
        self, requests: Mapping[int, PictureRequest], prompts: Mapping[int, Any]
    ) -> dict[int, np.ndarray | Exception]:
        if not requests:
            return {}
        try:
            pictures = self._call(list(requests.values()), [prompts[i] for i in requests])
            return dict(zip(requests, pictures, strict=True))
        except Exception as error:  # whatever a pipeline raises; who is to blame shows alone
            if len(requests) == 1:
                return dict.fromkeys(requests, error)
        alone = [self._draw({i: request}, prompts) for i, request in requests.items()]
        return {i: result for one in alone for i, result in one.items()}

    def _call(self, requests: Sequence[PictureRequest], prompts: Sequence[Any]) -> list[np.ndarray]:
        """Returns one picture (H, W, 3), uint8, per request: one call, one forward per step."""
        shared = requests[0]
        generators = [torch.Generator("cpu").manual_seed(request.seed) for request in requests]
        with self._pipe.diffscaler_rows([dict(request.tasks) for request in requests]):
            images = self._pipe(
                **self._inputs(prompts),
                num_inference_steps=shared.steps,
                guidance_scale=shared.guidance,
                width=shared.width,
                height=shared.height,
                generator=generators,  # one per row, so that no row's noise depends on another's
                output_type="np",
            ).images
        return list((images * 255).round().astype(np.uint8))

    def _inputs(self, prompts: Sequence[Any]) -> dict[str, Any]:
        if self._words is None:
            return {"prompt": list(prompts)}
        context, pooled = (torch.cat(tensors) for tensors in zip(*prompts, strict=True))
        empty, empty_pooled = self._words[""]
        given = {
            "prompt_embeds": context,
            "pooled_prompt_embeds": pooled,
            "negative_prompt_embeds": empty.repeat(len(prompts), 1, 1),
            "negative_pooled_prompt_embeds": empty_pooled.repeat(len(prompts), 1),
        }
        dtype = self._pipe.transformer.dtype
        return {name: tensor.to(self._device, dtype) for name, tensor in given.items()}
