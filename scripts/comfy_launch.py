"""Starts ComfyUI in this Python: as a program, or for in-process tests.

ComfyUI imports torchvision and torchaudio unconditionally. Where torch is a CPU build and those two
are the registry's CUDA builds, their compiled libraries cannot load and the import dies; `prepare`
lets the import succeed without them. ComfyUI needs only their Python parts to run.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import runpy
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

# torchvision registers fake kernels for these two without asking whether its library was loaded.
TORCHVISION_OPS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[Any] = []  # torch drops a Library's operators when the object dies


def prepare() -> None:
    """Makes `import torchvision` and `import torchaudio` work without their compiled parts.

    Nothing is imported now: torch must not be loaded before ComfyUI has read its flags. Where the
    compiled parts do load, the imports proceed unchanged.
    """
    # by name: the environment and the tests may each have loaded a copy of this file
    if not any(type(finder).__name__ == _CompiledParts.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _CompiledParts())


class _CompiledParts(MetaPathFinder):
    """Looks at the two packages just before their first import; finds nothing itself."""

    def __init__(self) -> None:
        self.seen: set[str] = set()  # some look for a package several times before they import it

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> None:
        if fullname in ("torchvision", "torchaudio") and fullname not in self.seen:
            self.seen.add(fullname)
            spec = PathFinder.find_spec(fullname, path)
            if spec is not None and spec.origin is not None:
                folder = Path(spec.origin).parent
                _check_torchvision(folder) if fullname == "torchvision" else _check_torchaudio(
                    folder
                )


def _check_torchvision(folder: Path) -> None:
    if _loads(folder.glob("_C*")):
        return
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in TORCHVISION_OPS:
        library.define(schema)
    _declared.append(library)


def _check_torchaudio(folder: Path) -> None:
    if _loads((folder / "lib").glob("_torchaudio*")) and _same_cuda():
        return
    # torchaudio treats "library file not found" as a supported state and "found but broken" as
    # fatal.
    name = "torchaudio._extension.utils"
    spec = importlib.util.spec_from_file_location(name, folder / "_extension" / "utils.py")
    if spec is None or spec.loader is None:
        return
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    utils._LIB_DIR = folder / "lib" / "not-loaded"  # type: ignore[attr-defined]
    sys.modules[name] = utils


def _same_cuda() -> bool:
    # torchaudio refuses to be imported beside a torch for another CUDA release.
    import torch

    built = torch.ops._torchaudio.cuda_version()
    if built is None or torch.version.cuda is None:
        return True
    return torch.version.cuda.split(".")[:2] == [str(built // 1000), str(built % 1000 // 10)]


def _loads(candidates: Iterator[Path]) -> bool:
    import torch

    libraries = [path for path in candidates if path.suffix in (".so", ".pyd")]
    try:
        for library in libraries:
            torch.ops.load_library(str(library))
    except OSError:
        return False
    return bool(libraries)


def boot(comfyui: Path, arguments: Sequence[str] = ()) -> ModuleType:
    """Makes ComfyUI importable in this process, as main.py would; returns its `nodes` module.

    ComfyUI's built-in nodes are loaded, node packs are not. No server is started; a `PromptServer`
    object exists because nodes may address it.

    Args:
        comfyui: ComfyUI's folder.
        arguments: ComfyUI's own command line flags, e.g. ["--cpu"]; they hold for the life of the
            process.
    """
    prepare()
    sys.path.insert(0, str(comfyui))
    with _argv([str(comfyui / "main.py"), *arguments]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
        import folder_paths
        import nodes
        import server
        import utils.extra_config
    flags = comfy.cli_args.args
    for group in flags.extra_model_paths_config or []:
        for config in group:
            utils.extra_config.load_extra_path_config(config)
    if flags.output_directory:
        folder_paths.set_output_directory(os.path.abspath(flags.output_directory))
    if flags.temp_directory:
        folder_paths.set_temp_directory(os.path.join(os.path.abspath(flags.temp_directory), "temp"))
    for name in ("input", "user"):
        if folder := getattr(flags, f"{name}_directory"):
            getattr(folder_paths, f"set_{name}_directory")(os.path.abspath(folder))
    server.PromptServer(asyncio.new_event_loop())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asyncio.run(nodes.init_builtin_extra_nodes())
    return nodes  # type: ignore[no-any-return]


def load_pack(folder: Path) -> ModuleType:
    """Loads a node pack with ComfyUI's own loader, after `boot`, and returns the pack's package.

    Raises:
        RuntimeError: If ComfyUI refused the pack; the reason is in its log.
    """
    import nodes

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = asyncio.run(nodes.load_custom_node(str(folder)))
    if not loaded:
        raise RuntimeError(f"ComfyUI could not load the node pack in {folder}; see the log above")
    return sys.modules[str(folder).replace(".", "_x_")]


@contextlib.contextmanager
def _argv(arguments: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = arguments
    try:
        yield
    finally:
        sys.argv = before


def _end_with_parent() -> None:
    # Our standard input is a pipe from the parent: it ends when the parent does, even if that was
    # killed.
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    """Runs ComfyUI's main.py with the flags that follow its folder."""
    if sys.argv[1:2] == ["--with-parent"]:
        del sys.argv[1]
        threading.Thread(target=_end_with_parent, daemon=True).start()
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "main.py").is_file():
        sys.exit("usage: comfy_launch.py [--with-parent] <ComfyUI folder> [ComfyUI flags]")
    comfyui = Path(sys.argv[1]).resolve()
    prepare()
    sys.path[0] = str(comfyui)  # in place of scripts/, whose names must not shadow ComfyUI's
    sys.argv = [str(comfyui / "main.py"), *sys.argv[2:]]
    runpy.run_path(str(comfyui / "main.py"), run_name="__main__")


if __name__ == "__main__":
    main()
