"""Writes the node pack's texts where ComfyUI looks for them: locales/<language>/*.json.

    python scripts/make_locales.py               writes English from the nodes' schemas, and puts
                                                 the translations into its order; says which nodes'
                                                 English changed since they were translated
    python scripts/make_locales.py --translated  the same, after the translations were brought up
                                                 to date
    python scripts/make_locales.py --check       writes nothing; says what is wrong

The translations, locales/zh and locales/ja, are written by hand. ComfyUI translates a node's title,
description, inputs and outputs; the pack's widgets ask for theirs (web/texts.js, under "diffscaler"
in main.json). What a combo box offers stays as it is, so tooltips that explain
such a choice name it as it stands there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy_host
import comfy_launch

LOCALES = Path(__file__).resolve().parent.parent / "locales"
TRANSLATIONS = ("zh", "ja")
TEXTS = LOCALES.parent / "web" / "texts.js"
#: Node, or "widgets" -> digest of the English that its translations say.
DIGESTS = LOCALES / "translated.json"
#: What means something to the frontend's message compiler, which reads all but tooltips.
SYNTAX = frozenset("@{}|%")

Tree = dict[str, Any]


def english(nodes: Sequence[Any]) -> dict[str, Tree]:
    """Returns the English files by name, from the schemas of node classes."""
    schemas = [node.GET_SCHEMA() for node in nodes]
    categories = [part for schema in schemas for part in schema.category.split("/")]
    sockets = [socket for schema in schemas for socket in [*schema.inputs, *schema.outputs]]
    own = sorted({s.io_type for s in sockets if s.io_type.startswith("DIFFSCALER_")})
    main = {
        "nodeCategories": {name: name for name in dict.fromkeys(categories)},
        "dataTypes": {name: name for name in own},
    }
    main["diffscaler"] = widget_texts()
    return {"main.json": main, "nodeDefs.json": {s.node_id: _node(s) for s in schemas}}


def widget_texts() -> Tree:
    """Returns what the pack's own widgets say in English, from web/texts.js."""
    _, _, rest = TEXTS.read_text("utf-8").partition("const ENGLISH = ")
    return dict(json.loads(rest[: rest.index("};") + 1]))


def _node(schema: Any) -> Tree:
    inputs: Tree = {}
    for one in schema.inputs:
        inputs[one.id] = {"name": one.display_name or one.id, "tooltip": one.tooltip}
        # the frontend keeps a growing slot's own name, but looks for its tooltip under this key
        slots = one.template.names if hasattr(one, "template") else ()
        inputs.update({f"{one.id}_{slot}": {"tooltip": one.tooltip} for slot in slots})
    outputs = {
        str(index): {"name": one.display_name, "tooltip": one.tooltip}
        for index, one in enumerate(schema.outputs)
    }
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": inputs,
        "outputs": outputs,
    }


def arranged(source: Tree, translation: Mapping[str, Any]) -> Tree:
    """Returns a translation in the order of the English; slots that grow say what their input does.

    Args:
        source: The English.
        translation: The same tree, or less of it.
    """
    result: Tree = {}
    for key, value in source.items():
        if isinstance(value, dict):
            result[key] = arranged(value, translation.get(key, {}))
        elif key in translation:
            result[key] = translation[key]
    for key in [key for key in result if _group(source, key)]:
        said = result[_group(source, key)].get("tooltip")
        result[key] = {"tooltip": said} if said else {}
    return result


def _group(siblings: Mapping[str, Any], key: str) -> str:
    """Returns the growing input that a key is a slot of, or nothing."""
    group, _, _ = key.rpartition("_")
    is_slot = group in siblings and set(siblings[key]) == {"tooltip"}
    return group if is_slot else ""


def texts(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yields every text with its place, such as `DiffScalerLoadTask.inputs.task_name.name`."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from texts(value, (*path, key))
        else:
            yield ".".join((*path, key)), value


def digests(files: Mapping[str, Tree]) -> dict[str, str]:
    """Returns a digest of the English of each node, and of the widgets'."""
    trees = {**files["nodeDefs.json"], "widgets": files["main.json"]["diffscaler"]}
    return {
        name: hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]
        for name, tree in trees.items()
    }


def problems(files: Mapping[str, Tree]) -> list[str]:
    """Returns what is wrong with the files in locales/, a line each, given the English."""
    found = []
    for name, tree in files.items():
        if _read("en", name) != tree:
            found.append(f"en/{name} is not what the nodes say: run scripts/make_locales.py")
        known = dict(texts(tree))
        for language in TRANSLATIONS:
            said = dict(texts(_read(language, name)))
            gone, new = sorted(known.keys() - said.keys()), sorted(said.keys() - known.keys())
            found += [f"{language}/{name} lacks {key}" for key in gone]
            found += [f"{language}/{name} has {key}, which no node has" for key in new]
            found += [f"{language}/{name}: {key} is empty" for key in said if not said[key]]
        for language in ("en", *TRANSLATIONS):
            for key, text in texts(_read(language, name)):
                if not key.endswith(".tooltip") and SYNTAX & set(text):
                    found.append(f"{language}/{name}: {key} may not contain {' '.join(SYNTAX)}")
    return found + [f"{node}: {STALE}" for node in stale(files)]


STALE = "its English changed; correct locales/zh and locales/ja, then run with --translated"


def stale(files: Mapping[str, Tree]) -> list[str]:
    """Returns the nodes whose English changed since they were translated, or "widgets"."""
    known = json.loads(DIGESTS.read_text("utf-8")) if DIGESTS.is_file() else {}
    now = digests(files)
    return [node for node in now.keys() | known.keys() if now.get(node) != known.get(node)]


def write(files: Mapping[str, Tree], translated: bool) -> None:
    """Writes the English, the translations in its order, and what they translate."""
    for name, tree in files.items():
        _write(LOCALES / "en" / name, tree)
        for language in TRANSLATIONS:
            _write(LOCALES / language / name, arranged(tree, _read(language, name)))
    if translated:
        _write(DIGESTS, digests(files))


def _read(language: str, name: str) -> Tree:
    path = LOCALES / language / name
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def _write(path: Path, tree: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, ensure_ascii=False, indent=2) + "\n", "utf-8")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--check", action="store_true")
    group.add_argument("--translated", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        arguments = ["--cpu", *comfy_host.base_directory(Path(base))]
        comfy_launch.boot(comfy_host.comfyui(), arguments)
        pack = comfy_launch.load_pack(Path(base) / "custom_nodes" / "diffscaler")
        files = english(pack.nodes.NODES)
    if not asked.check:
        write(files, asked.translated)
    found = problems(files)
    print("\n".join(found) or "locales: all is well")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
