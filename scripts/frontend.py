"""ComfyUI's real frontend, in a headless Chromium: arranges workflows, opens and queues them.

Needs Chromium (Debian: `apt-get install chromium`), Node.js, and playwright-core without its own
browsers, in the git-ignored cache:

    npm install --prefix .cache/browser playwright-core@1.65.1
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comfy_http import HostError, Server

SCRIPTS = Path(__file__).resolve().parent
PLAYWRIGHT = SCRIPTS.parent / ".cache" / "browser" / "node_modules" / "playwright-core"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# What would lie over the graph: the dialog that greets a fresh user, the small map, the counters.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}


def missing() -> str | None:
    """Returns what is still to be installed, and how; None if nothing."""
    if _chromium() is None:
        return "no Chromium on this machine (Debian: apt-get install chromium)"
    if shutil.which("node") is None:
        return "no Node.js on this machine (Debian: apt-get install nodejs npm)"
    if not PLAYWRIGHT.is_dir():
        return "no playwright-core (npm install --prefix .cache/browser playwright-core@1.65.1)"
    return None


def in_frontend(
    server: Server, jobs: Sequence[Mapping[str, Any]], timeout: float = 600
) -> list[dict[str, Any]]:
    """Does some jobs one after another in one page; returns their results in order.

    Args:
        server: A running ComfyUI with this pack.
        jobs: `{"kind": "arrange", "api", "layout"}` gives `{"ui", "api"}`;
            `{"kind": "open", "ui", "queue": bool, "screenshot": path or None}` gives
            `{"missing", "errors", "types", "api"}`, and `prompt_id` or `refused` if queued;
            `{"kind": "act", "module": path, "given": {…}}` gives what the module's default export
            makes of Playwright's page and of what is given.
        timeout: Seconds for all of them.

    Raises:
        HostError: Something is not installed, the page complained, or a job failed.
    """
    if (reason := missing()) is not None:
        raise HostError(reason)
    server.request("/settings", SETTINGS)
    request = {
        "playwright": str(PLAYWRIGHT),
        "chromium": _chromium(),
        "url": server.url,
        "jobs": list(jobs),
    }
    command = ["node", str(SCRIPTS / "frontend.mjs")]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise HostError(f"the browser did not finish in {timeout:.0f} s") from error
    if done.returncode:
        raise HostError(f"the browser failed: {done.stderr.strip()[-1500:]}")
    answer = json.loads(done.stdout)
    if answer["problems"]:
        raise HostError("the page complained: " + "; ".join(answer["problems"]))
    return list(answer["results"])


def _chromium() -> str | None:
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)
