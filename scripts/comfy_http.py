"""Speaks to a running ComfyUI server over HTTP, with the standard library alone."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class HostError(RuntimeError):
    """ComfyUI could not be had, started or asked; the message says what to do."""


class Server:
    """A running ComfyUI server, spoken to over HTTP."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self.log = log
        self._open = urllib.request.build_opener(
            urllib.request.ProxyHandler({})
        ).open  # never via a proxy

    def request(
        self, path: str, body: Mapping[str, Any] | None = None, timeout: float = 60
    ) -> bytes:
        """Returns the answer to a GET, or to a POST where there is a body.

        Raises:
            HostError: If the server refused; the message holds its answer.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with self._open(request, timeout=timeout) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            raise HostError(
                f"{path} answered {error.code}: {error.read().decode(errors='replace')}"
            ) from error

    def get(self, path: str) -> Any:
        """Returns the JSON at a path, e.g. `/object_info/KSampler` or `/models/diffscaler`."""
        return json.loads(self.request(path))

    def queue(self, prompt: Mapping[str, Any]) -> str:
        """Queues a workflow in API format; returns its prompt id."""
        answer = json.loads(self.request("/prompt", {"prompt": prompt}))
        return str(answer["prompt_id"])

    def wait(self, prompt_id: str, timeout: float = 120) -> dict[str, Any]:
        """Returns the history entry of a finished prompt; `outputs` in it is by node id.

        Raises:
            HostError: If the prompt failed, was interrupted, or took longer than `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                if entry["status"]["status_str"] != "success":
                    raise HostError(_failure(entry["status"]["messages"]))
                return dict(entry)
            time.sleep(0.05)
        raise HostError(
            f"the prompt did not finish in {timeout:.0f} s; the log ends:\n{tail(self.log)}"
        )

    def run(self, prompt: Mapping[str, Any], timeout: float = 120) -> dict[str, Any]:
        """Queues a workflow in API format and returns its history entry."""
        return self.wait(self.queue(prompt), timeout)

    def images(self, entry: Mapping[str, Any]) -> list[bytes]:
        """Returns the image files that a finished prompt saved, in node order."""
        found = [
            image for output in entry["outputs"].values() for image in output.get("images", [])
        ]
        return [self.request("/view?" + urllib.parse.urlencode(image)) for image in found]

    def interrupt(self) -> None:
        """Interrupts what is running now."""
        self.request("/interrupt", {})


def _failure(messages: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    for event, detail in messages:
        if event == "execution_error":
            error = f"{detail['exception_type']}: {detail['exception_message']}"
            return f"node {detail['node_type']} failed: {error}"
        if event == "execution_interrupted":
            return f"the prompt was interrupted in node {detail.get('node_type')}"
    return "the prompt failed without a message"


def tail(log: Path, lines: int = 25) -> str:
    """Returns the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
