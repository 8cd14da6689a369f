"""What the package may never do, read from the source: run what it reads, or reach the network.

What is allowed stands in ALLOWED with its reason; an entry that is used no more fails too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = [
    ROOT / "__init__.py",
    *sorted((ROOT / "diffscaler_core").rglob("*.py")),
    *sorted((ROOT / "nodes").rglob("*.py")),
]
#: Modules that run what they read, start programs, or speak to other machines.
MODULES = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"),
    *("subprocess", "pty", "runpy", "code", "codeop", "ctypes", "cffi", "multiprocessing"),
    *("socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "websockets"),
    *("ftplib", "smtplib", "telnetlib", "xmlrpc", "webbrowser", "huggingface_hub", "yaml"),
}
CALLS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
#: Beginnings and endings of attributes.
STARTS = (
    *("torch.load", "torch.save", "torch.hub", "np.load", "numpy.load", "np.save", "builtins."),
    *("os.system", "os.popen", "os.exec", "os.spawn", "os.startfile", "importlib.import_module"),
    *("torch.ops.load_library", "torch.utils.cpp_extension"),
)
ENDS = (".from_pretrained", ".load_dataset", ".save_pretrained")

#: (file, what) -> why it may.
ALLOWED = {
    ("diffscaler_core/__init__.py", "importlib.import_module"): "its own parts, when asked for",
    ("diffscaler_core/commands/table.py", "importlib.import_module"): "its own commands",
    ("diffscaler_core/evaluation/features.py", "torch.hub.get_dir"): "where a file would lie",
    (
        "diffscaler_core/hub.py",
        "huggingface_hub",
    ): "load_diffscaler('owner/name'), said by the user",
    ("diffscaler_core/training/bases/load.py", ".from_pretrained"): "--base, said by the user",
    ("diffscaler_core/training/command/model_card.py", "huggingface_hub"): "--push-to-hub",
    ("diffscaler_core/training/data/datasets_library.py", ".load_dataset"): "--data datasets:name",
    (
        "diffscaler_core/training/picture_encoders.py",
        ".from_pretrained",
    ): "--repa folder or name, said by the user; safetensors alone",
}


def _found(path: Path) -> Iterator[tuple[str, int]]:
    """Yields (what, line) of everything forbidden in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            if name.partition(".")[0] in MODULES:
                yield name.partition(".")[0], node.lineno
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield node.func.id, node.lineno
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.startswith(STARTS):
                yield name, node.lineno
            yield from ((end, node.lineno) for end in ENDS if name.endswith(end))


def _file(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _is_allowed(file: str, what: str) -> bool:
    return any(file == own and allowed.startswith(what) for own, allowed in ALLOWED)


@pytest.mark.parametrize("path", PACKAGE, ids=_file)
def test_nothing_runs_what_it_reads_or_speaks_to_other_machines(path):
    bad = [(what, line) for what, line in _found(path) if not _is_allowed(_file(path), what)]
    assert not bad


def test_every_exception_is_still_needed():
    used = {(_file(path), what) for path in PACKAGE for what, _ in _found(path)}
    assert not {entry for entry in ALLOWED if entry not in used}


def test_no_node_imports_what_may_speak_to_other_machines_when_it_is_loaded():
    """Of the files that may, none is imported by the pack at the top of a file."""
    for path in sorted((ROOT / "nodes").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").endswith(
                    ("hub", "bases.load", "model_card", "datasets_library", "features")
                ), (path.name, node.lineno)


def test_the_scan_sees_what_it_should(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import pickle\nfrom urllib.request import urlopen\ntorch.load(x)\neval('1')\n")
    assert [what for what, _ in _found(path)] == ["pickle", "urllib", "eval", "torch.load"]
