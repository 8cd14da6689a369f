"""One client of the soak: sends workflows, reads their answers, and misbehaves now and then."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from soak_graphs import Recipe
from torch import Tensor

#: Events that end a prompt, and what they mean.
_ENDS = {
    "execution_success": "success",
    "execution_error": "error",
    "execution_interrupted": "interrupted",
}
#: Seconds between looks into the history, should the websocket have missed the end.
_LOOK = 0.5
#: The longest a prompt may take, in seconds.
_PATIENCE = 300.0

Answer = Tensor | str
Answers = dict[str, Answer]


@dataclass(frozen=True)
class Sent:
    """A graph on its way.

    Attributes:
        recipe: What was sent.
        number: And with which number.
        folder: Where its files go, below the output folder.
        prompt: Its id; empty if it was refused at once.
        refusal: What the server said then.
    """

    recipe: Recipe
    number: int
    folder: str
    prompt: str = ""
    refusal: str = ""


class Client:
    """A browser's worth of HTTP and websocket.

    Args:
        url: The server's.
        output: The server's output folder.
        name: Its own folder below that.
    """

    def __init__(self, url: str, output: Path, name: str) -> None:
        self.output, self.name = output, name
        self._url = url
        self._id = uuid.uuid4().hex
        self._sent = 0
        self._ended: dict[str, asyncio.Event] = {}
        self._session: aiohttp.ClientSession | None = None
        self._listener: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120))
        self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.disconnect()
        assert self._session is not None
        await self._session.close()

    def connect(self) -> None:
        """Opens the websocket."""
        self._listener = asyncio.create_task(self._listen())

    async def disconnect(self) -> None:
        """Drops the websocket, whatever is under way."""
        assert self._listener is not None
        self._listener.cancel()
        with contextlib.suppress(asyncio.CancelledError, aiohttp.ClientError):
            await self._listener

    async def _listen(self) -> None:
        assert self._session is not None
        address = f"{self._url.replace('http', 'ws')}/ws?clientId={self._id}"
        async with self._session.ws_connect(address, max_msg_size=0) as socket:
            async for message in socket:
                if message.type == aiohttp.WSMsgType.TEXT:
                    told = message.json()
                    if told["type"] in _ENDS:
                        self._end_of(told["data"]["prompt_id"]).set()

    def _end_of(self, prompt: str) -> asyncio.Event:
        return self._ended.setdefault(prompt, asyncio.Event())

    async def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
        """Returns the status and the text of the answer to a POST."""
        assert self._session is not None
        async with self._session.post(self._url + path, json=body) as answer:
            return answer.status, await answer.text()

    async def send(self, recipe: Recipe, number: int, front: bool = False) -> Sent:
        """Queues a graph.

        Args:
            recipe: What to send.
            number: See `Recipe.prepared`.
            front: Before all that wait.
        """
        self._sent += 1
        folder = f"{self.name}/{self._sent}"
        graph = recipe.prepared(folder, number)
        body = {"prompt": graph, "client_id": self._id, "front": front}
        status, text = await self.post("/prompt", body)
        if status != 200:
            return Sent(recipe, number, folder, refusal=f"{status}: {_reasons(text)}")
        return Sent(recipe, number, folder, str(json.loads(text)["prompt_id"]))

    async def is_gone(self, sent: Sent) -> bool:
        """Whether a prompt neither waits nor runs nor ever ran."""
        assert self._session is not None
        async with self._session.get(f"{self._url}/queue") as answer:
            queue = await answer.json()
        if any(item[1] == sent.prompt for items in queue.values() for item in items):
            return False
        async with self._session.get(f"{self._url}/history/{sent.prompt}") as answer:
            return not await answer.json()

    async def entry(self, prompt: str) -> dict[str, Any] | None:
        """Returns what the history holds of a prompt, if it has ended, and deletes it there."""
        assert self._session is not None
        async with self._session.get(f"{self._url}/history/{prompt}") as answer:
            found: dict[str, Any] | None = (await answer.json()).get(prompt)
        if found is not None:
            await self.post("/history", {"delete": [prompt]})
        return found

    async def end(self, prompt: str) -> dict[str, Any]:
        """Returns the history entry of a prompt once it has ended.

        Raises:
            TimeoutError: It took longer than anything should.
        """
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            ended = self._end_of(prompt)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(ended.wait(), _LOOK)
            found = await self.entry(prompt)
            if found is not None:
                self._ended.pop(prompt, None)
                return found
            await asyncio.sleep(0.02)
        raise TimeoutError(f"prompt {prompt} did not end in {_PATIENCE:.0f} s")

    async def finish(self, sent: Sent) -> tuple[str, Answers]:
        """Waits; returns how a prompt ended and its answers, an error's text as one."""
        if sent.refusal:
            return "error", {"error": sent.refusal}
        entry = await self.end(sent.prompt)
        how, text = _ending(entry["status"]["messages"])
        try:
            if how == "error":
                return how, {"error": _plain(text)}
            wanted = sent.recipe.wanted.items() if how == "success" else ()
            outputs = entry["outputs"]
            return how, {n: self._answer(n, kind, outputs, sent.folder) for n, kind in wanted}
        finally:
            runs = self.output.glob(f"diffscaler/runs/{sent.recipe.run_name(sent.number)}-*")
            for folder in (self.output / sent.folder, *runs):
                shutil.rmtree(folder, ignore_errors=True)

    def _answer(self, name: str, kind: str, outputs: Mapping[str, Any], folder: str) -> Answer:
        if kind == "text":
            return "\n".join(outputs[name]["text"])
        file = next((self.output / folder).glob(f"{name}_*"), None)
        if file is None:
            return "no such file"
        if kind == "picture":
            return torch.from_numpy(np.asarray(Image.open(file)).astype(np.float32))
        tensors = load_file(file)
        return tensors["latent_tensor"] if kind == "latent" else digest(tensors)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of tensors: names, dtypes, shapes and bits."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _ending(messages: list[tuple[str, Mapping[str, Any]]]) -> tuple[str, str]:
    for event, told in messages:
        if event == "execution_error":
            error = f"{told['exception_type']}: {told['exception_message']}"
            return "error", f"node {told['node_type']} failed: {error.strip()}"
        if event in _ENDS:
            return _ENDS[event], ""
    return "lost", ""


def _reasons(refusal: str) -> str:
    """Returns what is wrong with which node, without the choices there are at the moment."""
    told = json.loads(refusal)
    nodes = told.get("node_errors") or {"": {"errors": [told["error"]]}}
    return ", ".join(f"{n} {e['type']}" for n, own in nodes.items() for e in own["errors"])


def _plain(error: str) -> str:
    """Returns an error without what differs between two servers: their folders."""
    return re.sub(r"(/[^\s'\"]*)+/(?=[^/]+)", ".../", error)


def difference(one: Answer, other: Answer) -> float:
    """Returns how far two answers are apart, as a share of the larger one's largest value."""
    if isinstance(one, str) or isinstance(other, str):
        return 0.0 if one == other else float("inf")
    if one.shape != other.shape or not (one.isfinite().all() and other.isfinite().all()):
        return float("inf")
    most = max(float(one.abs().max()), float(other.abs().max()), 1e-12)
    return float((one - other).abs().max()) / most
