"""Makes or repairs `.venv`: PyTorch, ComfyUI's requirements and this project, editable.

Run it as often as you like: it returns at once while its inputs are unchanged. pip's own settings
decide where packages come from. A torch that is already in `.venv` is kept, so `.venv/bin/pip
install torch==...` first chooses another build.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import comfy_host

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "diffscaler-environment"
LOG = comfy_host.CACHE / "environment.log"

# What is installed where there is no torch yet: three releases that work together, also when the
# registry's torchvision and torchaudio are CUDA builds and torch is not (see comfy_launch.py).
TORCH = {"torch": "2.13.0", "torchvision": "0.28.0", "torchaudio": "2.11.0"}

# Prints every installed package of which a file is missing or cut short, as after an interrupted
# pip.
FIND_BROKEN = """
import importlib.metadata as metadata
for package in metadata.distributions():
    files = package.files
    broken = files is None or any(
        f.size is not None and (not f.locate().is_file() or f.locate().stat().st_size < f.size) for
        f in files
    )
    if broken:
        print(package.metadata["Name"] or "a package without a name")
"""


# What every Python of `.venv` does at its start where torchvision's compiled part cannot load.
MEND = '''"""Written by scripts/environment.py: torchvision is built for CUDA here, torch is not."""
import importlib.util
import os
import sys

if os.path.exists({launcher!r}):
    spec = importlib.util.spec_from_file_location("comfy_launch", {launcher!r})
    sys.modules["comfy_launch"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.prepare()
'''


class SetupError(RuntimeError):
    """The environment could not be made; the message says what to do."""


def main() -> None:
    """Makes `.venv` fit for `make demo` and `make test`."""
    try:
        if sys.version_info < (3, 10):  # noqa: UP036 (this is the file that has to say so)
            raise SetupError(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
        if not _is_current():
            with _only_one():
                if not _is_current():
                    _make()
    except (SetupError, comfy_host.HostError) as error:
        sys.exit(f"environment: {error}")
    except OSError as error:
        sys.exit(
            f"environment: {error.strerror or error} ({error.filename or ROOT}); "
            "check free space and permissions"
        )
    except KeyboardInterrupt:
        sys.exit("environment: interrupted; run the same command again to continue")


def _is_current() -> bool:
    with contextlib.suppress(OSError, comfy_host.HostError):
        if PYTHON.exists() and STAMP.read_text() == _inputs(comfy_host.cached_comfyui()):
            return True
    return False


def _inputs(comfyui: Path | None) -> str:
    """Hashes everything that decides what is installed."""
    if comfyui is None:
        return "ComfyUI is still to be fetched"
    digest = hashlib.sha256(repr((sys.version_info[:2], str(ROOT), str(comfyui))).encode())
    for path in (Path(__file__), ROOT / "pyproject.toml", comfyui / "requirements.txt"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _make() -> None:
    started = time.monotonic()
    _say(f"making {VENV.name} (the first time this downloads about 1 GB and takes a few minutes)")
    interrupted = STAMP.exists() and STAMP.read_text() == "unfinished"
    if not _works():
        _create()
    STAMP.write_text("unfinished")
    comfyui = comfy_host.comfyui(PYTHON)
    _install(comfyui)
    if interrupted and (broken := _broken()):
        _say(
            f"{', '.join(broken)} incomplete since an interrupted run; starting {VENV.name} afresh"
        )
        _create()
        _install(comfyui)
    _mend()
    STAMP.write_text(_inputs(comfyui))
    _say(f"ready in {time.monotonic() - started:.0f} s")


def _works() -> bool:
    return PYTHON.exists() and not _run([str(PYTHON), "-m", "pip", "--version"])


def _create() -> None:
    shutil.rmtree(VENV, ignore_errors=True)
    if _run([sys.executable, "-m", "venv", str(VENV)]):
        shutil.rmtree(VENV, ignore_errors=True)
        raise SetupError(
            f"`{sys.executable} -m venv` failed; install Python's venv module (Debian, Ubuntu: "
            f"`apt install python3-venv`) and run this again; details: {LOG}"
        )


def _install(comfyui: Path) -> None:
    listed = (comfyui / "requirements.txt").read_text().splitlines()
    names = [line.split("#")[0].strip() for line in listed]
    requirements = [name for name in names if name and name not in TORCH]
    requirements += _torch_requirements()
    # One call, so that pip weighs all wishes together; Python compiles what it imports when it
    # imports it.
    command = [str(PYTHON), "-m", "pip", "install", "--no-compile", *requirements]
    if _run([*command, "--editable", f"{ROOT}[dev]"]):
        log = LOG.read_text(errors="replace").splitlines()
        errors = (
            [line for line in log if line.startswith("ERROR:")] or log[-1:] or ["pip said nothing"]
        )
        raise SetupError(f"pip could not install the packages ({errors[0]}); details: {LOG}")


def _mend() -> None:
    """Lets plain programs import diffusers and PEFT, which import torchvision if it is there."""
    packages = next(VENV.glob("lib*/python*/site-packages"), VENV / "Lib" / "site-packages")
    files = packages / "diffscaler_mend.pth", packages / "diffscaler_mend.py"
    for file in files:
        file.unlink(missing_ok=True)
    if _run([str(PYTHON), "-c", "import torchvision"]):
        files[1].write_text(MEND.format(launcher=str(comfy_host.LAUNCHER)))
        files[0].write_text("import diffscaler_mend\n")


def _torch_requirements() -> list[str]:
    query = "import importlib.metadata as m; print(m.version('torch'))"
    result = subprocess.run([str(PYTHON), "-c", query], capture_output=True, text=True, check=False)
    if found := result.stdout.strip():
        return [f"torch=={found}", "torchvision", "torchaudio"]
    return [f"{name}=={version}" for name, version in TORCH.items()]


def _broken() -> list[str]:
    result = subprocess.run(
        [str(PYTHON), "-c", FIND_BROKEN], capture_output=True, text=True, check=False
    )
    return result.stdout.split("\n")[:-1] if result.returncode == 0 else ["some packages"]


def _run(command: list[str]) -> int:
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("w") as log:
        return subprocess.run(command, stdout=log, stderr=log, cwd=ROOT, check=False).returncode


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """Lets a second run wait for the first: two pips in one environment break it."""
    LOG.parent.mkdir(exist_ok=True)
    with (LOG.parent / "environment.lock").open("w") as lock:
        with contextlib.suppress(ImportError):  # not on Windows, where nothing is locked
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"environment: {text}", flush=True)


if __name__ == "__main__":
    main()
