"""A shipped workflow runs in a real ComfyUI, files to pictures, where nobody answers."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "api" / "apply_task.json"


@pytest.fixture
def alone(monkeypatch):
    """Blocks every way to another machine; gives the list of what was tried."""
    tried = []

    def is_here(address) -> bool:
        host = address[0] if isinstance(address, tuple) else address
        return str(host) in ("127.0.0.1", "::1", "localhost") or isinstance(address, (str, bytes))

    def guarded(real, at):
        def call(*arguments, **options):
            if not is_here(arguments[at]):
                tried.append(arguments[at])
                raise OSError(101, "Network is unreachable")
            return real(*arguments, **options)

        return call

    for name in ("connect", "connect_ex", "sendto"):
        real = getattr(socket.socket, name)
        monkeypatch.setattr(socket.socket, name, guarded(real, 1 if name != "sendto" else -1))
    real_look_up = socket.getaddrinfo

    def look_up(host, *arguments, **options):
        if host not in (None, "", "127.0.0.1", "::1", "localhost"):
            tried.append(host)
            raise socket.gaierror(-2, "Name or service not known")
        return real_look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return tried


def test_the_block_blocks(alone):
    with socket.socket() as own, pytest.raises(OSError, match="unreachable"):
        own.connect(("192.0.2.1", 80))
    with pytest.raises(OSError, match="not known"):
        socket.create_connection(("example.org", 80), 1)
    assert alone == [("192.0.2.1", 80), "example.org"]


def test_a_shipped_workflow_needs_no_network(pack, alone):
    import execution
    import folder_paths
    import nodes

    for node in pack.nodes.NODES:  # as the server does when it starts
        nodes.NODE_CLASS_MAPPINGS[node.define_schema().node_id] = node
    quiet = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *_: None)
    executor = execution.PromptExecutor(
        quiet,
        cache_type=execution.CacheType.CLASSIC,
        cache_args={"lru": 0, "ram": 0.0, "ram_inactive": 0.0},
    )
    graph = json.loads(WORKFLOW.read_text("utf-8"))
    outputs = [key for key, node in graph.items() if node["class_type"] == "PreviewImage"]
    for node in graph.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 1
    executor.execute(graph, "prompt", {}, outputs)
    failures = [m for kind, m in executor.status_messages if kind == "execution_error"]
    assert not failures, failures[0]["exception_message"]
    assert len(list(Path(folder_paths.get_temp_directory()).rglob("*.png"))) == len(outputs) > 0
    assert alone == []
