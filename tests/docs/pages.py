"""The pages, their code blocks, and the one table of what is not run.

Every block in one of the languages of RUN is run by a test beside this file: Python page by page,
one block after the other; commands line by line; TOML and JSON are read.
"""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    p.relative_to(ROOT).as_posix(): p for p in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
}
#: Languages that must be run, and those that show something.
RUN = ("python", "sh", "toml", "json")
SHOWN = ("text",)


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line it begins on."""

    language: str
    text: str
    line: int


class Reason(NamedTuple):
    """Why a line is not run as it stands, and the test that does what can be done instead."""

    why: str
    instead: str = ""


_GIT = "git+https://github.com/diffscaler/diffscaler"
_NETWORK = Reason("installs from the network", "tests/docs/test_blocks.py::test_extras_are_there")
_SERVER = "tests/test_serve_ray.py::test_the_server"
#: A command, on whatever page -> why no test runs it as it stands.
NOT_RUN: dict[str, Reason] = {
    "make demo": Reason("takes minutes; it is what draws the README's sheets"),
    "make test": Reason("it is what runs this"),
    "cd ComfyUI/custom_nodes && git clone https://github.com/diffscaler/diffscaler": Reason(
        "installs from the network",
        "tests/comfy/test_server_boots.py::test_server_loads_the_pack",
    ),
    "comfy node install diffscaler": Reason("not published yet, as the page says"),
    f'pip install "diffscaler[diffusers] @ {_GIT}"': _NETWORK,
    f'pip install "diffscaler[train] @ {_GIT}"': _NETWORK,
    f'pip install "diffscaler[serve,diffusers] @ {_GIT}"': _NETWORK,
    "accelerate launch --num_processes 4 -m diffscaler_core.cli train flowers.toml": Reason(
        "needs four devices",
        "tests/training/test_command_processes.py::test_only_the_main_process_of_a_launch_writes",
    ),
    "python docs/examples/serve_ray.py": Reason("a server that runs on", _SERVER),
    "curl -s localhost:8000/v1/pictures "
    """--json '{"prompt": "cat", "task": "ink", "seed": 7}' -o cat.png""": Reason(
        "asks that server", _SERVER
    ),
    "python docs/examples/serve_ray.py --base stabilityai/stable-diffusion-3.5-medium "
    "--tasks my_tasks --device cuda --dtype bfloat16 --device-mb 4096 --max-replicas 8 "
    "--affinity --address auto": Reason("needs a GPU, real weights and a cluster", _SERVER),
}


def blocks_of(text: str) -> list[Block]:
    """Returns a page's fenced blocks in order; a fence without a language has language ""."""
    pattern = r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```$"
    return [
        Block(m[2], re.sub(f"^{m[1]}", "", m[3], flags=re.M), text.count("\n", 0, m.start()) + 1)
        for m in re.finditer(pattern, text, re.M | re.S)
    ]


def blocks(page: str, *languages: str) -> list[Block]:
    """Returns a page's blocks in some languages, or all of them."""
    found = blocks_of(PAGES[page].read_text(encoding="utf-8"))
    return [block for block in found if not languages or block.language in languages]


def commands(page: str) -> list[str]:
    """Returns a page's shell commands in order, one a line, without comments."""
    text = "".join(block.text for block in blocks(page, "sh")).replace("\\\n", " ")
    lines = [re.sub(r"\s#\s.*", "", line).strip() for line in text.splitlines()]
    return [re.sub(r"\s+", " ", line) for line in lines if line and not line.startswith("#")]


def pages_with(language: str) -> list[str]:
    """Returns the pages that have a block in a language."""
    return [page for page in PAGES if blocks(page, language)]
