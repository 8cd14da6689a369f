"""The Comfy Registry's archive: what is in it, and that it is the whole pack."""

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import diffscaler_core

from .conftest import ROOT, run, unpacked

#: What may stand at the archive's root. Whatever else appears in the repository must either be
#: named here or in .comfyignore.
TOP = {
    *("__init__.py", "pyproject.toml", "requirements.txt", ".comfyignore"),
    *("LICENSE", "README.md", "CHANGELOG.md"),
    *("nodes", "diffscaler_core", "web", "locales", "workflows", "subgraphs", "assets"),
}
MOST = 16e6  # bytes; the pocket base, which the workflows need, is most of it


@pytest.fixture(scope="module")
def names(archive: Path) -> set[str]:
    return set(zipfile.ZipFile(archive).namelist())


def test_archive_holds_the_pack_and_nothing_else(names: set[str]) -> None:
    assert {name.split("/")[0] for name in names} <= TOP
    assert {"__init__.py", "LICENSE", "requirements.txt", "pyproject.toml"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("/")]
    inside = {"/".join(name.split("/")[:2]) for name in names if name.startswith("assets/")}
    assert inside == {"assets/pocket", "assets/examples", "assets/tasks"}


@pytest.mark.parametrize(
    "folder", ["nodes", "diffscaler_core", "web", "locales", "workflows", "subgraphs"]
)
def test_archive_holds_every_file_that_comfyui_reads(
    folder: str, names: set[str], repository: Path
) -> None:
    files = {str(f.relative_to(repository)) for f in (repository / folder).rglob("*.*")}
    files = {name for name in files if (repository / name).is_file()}
    assert files or folder in ("locales", "subgraphs")
    assert files <= names


def test_archive_holds_what_its_workflows_name(names: set[str]) -> None:
    files = {Path(name).name for name in names if name.startswith("assets/")}
    named = set()
    for path in sorted((ROOT / "workflows").glob("*.json")):
        graph = json.loads(path.read_text(encoding="utf-8"))
        for node in graph["nodes"]:
            values = node.get("widgets_values") or []
            if node["type"] in ("UNETLoader", "VAELoader", "LoadImage", "DiffScalerLoadTask"):
                named.add(Path(values[0]).name)
    assert named
    assert named <= files


def test_archive_is_small_and_the_same_every_time(
    archive: Path, repository: Path, tmp_path: Path, script: Any
) -> None:
    assert archive.stat().st_size < MOST
    again = script("make_archive").make_archive(repository, tmp_path)
    assert again.read_bytes() == archive.read_bytes()


def test_archive_is_named_by_the_version(archive: Path) -> None:
    assert archive.name == f"diffscaler-{diffscaler_core.__version__}.zip"


def test_requirements_can_replace_nothing_of_the_users(names: set[str]) -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    # Of what ComfyUI lists itself, only a package that depends on nothing may be asked for.
    assert {one.name for one in wanted} == {"safetensors"}
    assert all(spec.operator == ">=" for one in wanted for spec in one.specifier)
    assert "install.py" not in names


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path, script: Any) -> None:
    make_archive = script("make_archive")
    with pytest.raises(make_archive.ArchiveError, match="no git checkout"):
        make_archive.packed_files(tmp_path)


def test_a_missing_file_is_refused(repository: Path, tmp_path: Path, script: Any) -> None:
    make_archive = script("make_archive")
    run("git", "clone", "--quiet", repository, tmp_path / "clone")
    (tmp_path / "clone" / "LICENSE").unlink()
    with pytest.raises(make_archive.ArchiveError, match="LICENSE is tracked but not there"):
        make_archive.packed_files(tmp_path / "clone")


@pytest.fixture(scope="module", params=["archive", "clone"])
def installed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A real ComfyUI whose custom_nodes holds the pack and nothing else, and no link to this."""
    from comfy_host import running_server

    request.getfixturevalue("comfyui_path")
    base = tmp_path_factory.mktemp("comfyui")
    pack = base / "custom_nodes" / "diffscaler"
    if request.param == "archive":
        unpacked(request.getfixturevalue("archive"), pack)
    else:
        run("git", "clone", "--quiet", request.getfixturevalue("repository"), pack)
    # What the README says: the folders of assets/pocket go into models.
    for kind in ("diffusion_models", "vae", "diffscaler"):
        shutil.copytree(pack / "assets" / "pocket" / kind, base / "models" / kind)
    with running_server(base, models=base / "nowhere") as server:
        yield server


@pytest.mark.http
@pytest.mark.slow
def test_a_real_comfyui_loads_it_whole(installed: Any, pack: ModuleType) -> None:
    log = installed.log.read_text()
    assert "IMPORT FAILED" not in log
    known = installed.get("/object_info")
    ids = [node.GET_SCHEMA().node_id for node in pack.nodes.NODES]
    assert ids
    assert [name for name in ids if name not in known] == []
    page = installed.request(f"/extensions/diffscaler/docs/{ids[0]}.md")
    assert page.startswith(b"#")
    templates = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    assert set(installed.get("/workflow_templates")["diffscaler"]) == templates
    training = known["DiffScalerTrainTask"]["input"]
    assert "example: ink drawings" in json.dumps(training)


@pytest.mark.http
@pytest.mark.slow
def test_a_workflow_of_the_pack_runs_there(installed: Any) -> None:
    graph = json.loads((ROOT / "workflows" / "api" / "apply_task.json").read_text())
    for node in graph.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = 2
    images = installed.images(installed.run(graph, timeout=240))
    assert images
    assert all(image.startswith(b"\x89PNG") for image in images)
