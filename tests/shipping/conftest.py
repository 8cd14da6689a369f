"""What is shipped, built as it is shipped: the wheel, and the Comfy Registry's archive."""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object, **options: object) -> str:
    """Runs a program that must succeed; returns what it printed."""
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This working tree as a git repository of its own, all of it committed."""
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-C"]
    try:
        told = run(*git, ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    except (FileNotFoundError, AssertionError) as error:
        pytest.skip(f"this is no git checkout: {error}")
    folder = tmp_path_factory.mktemp("repository")
    for name in filter(None, told.split("\0")):
        if (ROOT / name).is_file():  # one that was deleted and not yet committed is not
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    run(*git, folder, "init", "--quiet")
    run(*git, folder, "add", "--all")
    run(*git, folder, "commit", "--quiet", "--message", "all")
    return folder


@pytest.fixture(scope="session")
def archive(
    repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
    script: Callable[[str], ModuleType],
) -> Path:
    """The zip that the registry serves."""
    return script("make_archive").make_archive(repository, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a stale build folder would smuggle deleted files into it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "__init__.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("diffscaler_core", "nodes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", folder]
    run(sys.executable, "-m", "pip", "wheel", folder, *options)
    return next(folder.glob("*.whl"))


def unpacked(archive: Path, folder: Path) -> Path:
    """Unpacks a zip into a new folder; returns the folder."""
    with zipfile.ZipFile(archive) as files:
        files.extractall(folder)
    return folder
