"""Who may import whom, read from the source: no file is imported here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "diffscaler_core"
HOST = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "nodes", "server", "execution"}
# Optional libraries, and the files of the core that are about them.
OPTIONAL = {
    "diffusers": {"pipelines", "pocket", "peft", "control", "export", "resolution", "cli"},
    "transformers": {"pipelines", "pocket", "cli"},
    "accelerate": {"pipelines", "cli"},
    "peft": {"peft", "cli"},
}
PACKAGE = sorted([ROOT / "__init__.py", *CORE.rglob("*.py"), *(ROOT / "nodes").rglob("*.py")])


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _absolute(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


def _relative(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.level, node.module or node.names[0].name


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=_name)
def test_core_never_imports_the_host_or_itself_by_name(path: Path) -> None:
    tops = {name.split(".")[0] for name in _absolute(_parse(path))}
    assert not tops & (HOST | {"diffscaler_core"})
    depth = len(path.relative_to(CORE).parts)  # one dot more would leave the core
    assert all(level <= depth for level, _ in _relative(_parse(path)))


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=_name)
def test_optional_libraries_stay_in_the_files_about_them(path: Path) -> None:
    tops = {name.split(".")[0] for name in _absolute(_parse(path))}
    inside = path.relative_to(CORE).with_suffix("").parts[0]
    strangers = {
        name for name in tops & OPTIONAL.keys() if inside not in OPTIONAL[name] | {"training"}
    }
    assert not strangers


@pytest.mark.parametrize("path", sorted((ROOT / "nodes").rglob("*.py")), ids=_name)
def test_nodes_reach_the_core_only_relatively(path: Path) -> None:
    tops = {name.split(".")[0] for name in _absolute(_parse(path))}
    assert not tops & {"diffscaler_core", "diffscaler"}


@pytest.mark.parametrize("path", PACKAGE, ids=_name)
def test_package_never_edits_the_path(path: Path) -> None:
    """What it may never run or reach: tests/security/test_forbidden_code.py."""
    for node in ast.walk(_parse(path)):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "sys.path", node.lineno


def test_root_imports_nothing_at_module_level() -> None:
    tree = _parse(ROOT / "__init__.py")
    assert not [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert list(_relative(tree)) == [(1, "nodes")]
