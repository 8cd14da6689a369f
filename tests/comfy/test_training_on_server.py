"""The training node behind a real server, on the pocket base and the pack's own pictures."""

import asyncio
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

Graph = dict[str, Any]
STEPS = 8


def _node(kind: str, **inputs: Any) -> Graph:
    return {"class_type": kind, "inputs": inputs}


def base(**train: Any) -> Graph:
    settings = dict(sample_every=4, sample_steps=2, warmup=0, save_every=0)
    return {
        "model": _node(
            "UNETLoader", unet_name="diffscaler_pocket.safetensors", weight_dtype="default"
        ),
        "vae": _node("VAELoader", vae_name="diffscaler_pocket_vae.safetensors"),
        "words": _node("DiffScalerLoadTask", task_name="words.safetensors"),
        "settings": _node("DiffScalerTrainingSettings", **settings),
        "train": _node(
            "DiffScalerTrainTask",
            **{
                "model": ["model", 0],
                "vae": ["vae", 0],
                "words": ["words", 0],
                "settings": ["settings", 0],
                "name": "served",
                "folder": "example: ink drawings",
                "resolution": 64,
                "method": "diffscaler",
                "rank": 2,
                "steps": STEPS,
                "batch_size": 2,
                "learning_rate": 0.005,
                "seed": 0,
                "resume": "auto",
                **train,
            },
        ),
        "show": _node("PreviewAny", source=["train", 3]),
    }


class Listener:
    """A browser's websocket: what the server sends while a prompt runs."""

    def __init__(self, url: str) -> None:
        self.client = uuid.uuid4().hex
        self.kinds: list[int] = []
        self.pictures: list[bytes] = []
        self.texts: list[str] = []
        self.bars: list[int] = []
        self._ready, self._done = threading.Event(), threading.Event()
        address = f"{url.replace('http', 'ws')}/ws?clientId={self.client}"
        self._thread = threading.Thread(target=lambda: asyncio.run(self._listen(address)))
        self._thread.start()
        assert self._ready.wait(20)

    async def _listen(self, address: str) -> None:
        import aiohttp

        async with aiohttp.ClientSession() as session, session.ws_connect(address) as socket:
            self._ready.set()
            while not self._done.is_set():
                try:
                    message = await socket.receive(timeout=0.2)
                except (TimeoutError, asyncio.TimeoutError):
                    continue
                if message.type == aiohttp.WSMsgType.BINARY:
                    self._note(message.data)
                elif message.type == aiohttp.WSMsgType.TEXT:
                    told = message.json()
                    if told["type"] == "progress":
                        self.bars.append(told["data"]["value"])

    def _note(self, data: bytes) -> None:
        (kind,) = struct.unpack(">I", data[:4])
        self.kinds.append(kind)
        if kind == 1:  # a preview picture
            self.pictures.append(data[8:])
        if kind == 3:  # a line of text: length of the node's id, the id, the line
            (length,) = struct.unpack(">I", data[4:8])
            self.texts.append(data[8 + length :].decode())

    def close(self) -> None:
        self._done.set()
        self._thread.join(10)


@pytest.fixture
def listener(server: Any) -> Iterator[Listener]:
    listening = Listener(server.url)
    yield listening
    listening.close()


def _queue(server: Any, graph: Graph, client: str) -> str:
    import json

    answer = server.request("/prompt", {"prompt": graph, "client_id": client})
    return str(json.loads(answer)["prompt_id"])


def _runs(server: Any, name: str) -> list[Path]:
    return sorted((server.log.parent / "output" / "diffscaler" / "runs").glob(f"{name}-*"))


def test_one_graph_trains_shows_applies_and_saves(server: Any, listener: Listener) -> None:
    graph = base()
    graph |= {
        "graph": _node("LossGraphNode", loss=["train", 1], filename_prefix="loss"),
        "samples": _node("SaveImage", images=["train", 2], filename_prefix="samples"),
        "save": _node(
            "DiffScalerSaveTask",
            task=["train", 0],
            filename_prefix="diffscaler/served",
            dtype="keep",
        ),
        "apply": _node("DiffScalerApplyTask", model=["model", 0], task=["train", 0], strength=1.0),
        "prompt": _node("DiffScalerTaskConditioning", task=["words", 0], prompt="guitar"),
        "latent": _node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
    }
    common = dict(positive=["prompt", 0], negative=["prompt", 0], latent_image=["latent", 0])
    common |= dict(seed=0, steps=2, cfg=1.0, sampler_name="euler", scheduler="normal", denoise=1.0)
    for name in ("apply", "model"):
        graph[f"sampled_{name}"] = _node("KSampler", model=[name, 0], **common)
        graph[f"decoded_{name}"] = _node(
            "VAEDecode", samples=[f"sampled_{name}", 0], vae=["vae", 0]
        )
        graph[f"image_{name}"] = _node(
            "SaveImage", images=[f"decoded_{name}", 0], filename_prefix=name
        )
    entry = server.wait(_queue(server, graph, listener.client))
    time.sleep(0.5)
    outputs = entry["outputs"]
    images = {name: server.images({"outputs": {"x": outputs[name]}}) for name in outputs}
    assert images["image_apply"] != images["image_model"]
    assert images["samples"]
    assert images["graph"]
    (summary,) = outputs["show"]["text"]
    assert f"steps: {STEPS}" in summary
    assert "pictures: 20" in summary
    assert listener.bars[-1] >= 2
    assert any(f"of {STEPS} · loss" in text for text in listener.texts)
    assert any(picture[:2] == b"\xff\xd8" for picture in listener.pictures)  # a JPEG
    (folder,) = _runs(server, "served")
    assert summary.splitlines()[0] == f"diffscaler/runs/{folder.name}"
    assert (folder / "served.safetensors").is_file()
    assert len(list((folder / "samples").iterdir())) == 2
    options = server.get("/object_info/DiffScalerLoadTask")["DiffScalerLoadTask"]["input"]
    names = options["required"]["task_name"][1]["options"]
    assert f"runs/{folder.name}/served.safetensors" in names
    assert not [name for name in names if "checkpoints" in name]


def test_the_stop_button_ends_a_run_that_then_goes_on(server: Any, listener: Listener) -> None:
    graph = base(name="stopped", steps=400)
    prompt = _queue(server, graph, listener.client)
    deadline = time.monotonic() + 60
    while not any("step" in text for text in listener.texts) and time.monotonic() < deadline:
        time.sleep(0.05)
    server.interrupt()
    with pytest.raises(Exception, match="interrupted in node DiffScalerTrainTask"):
        server.wait(prompt)
    (folder,) = _runs(server, "stopped")
    (checkpoint,) = (folder / "checkpoints").iterdir()
    done = int(checkpoint.stem.rpartition("-")[2])
    assert 0 < done < 400
    assert "go on from there" in server.log.read_text()
    entry = server.run(base(name="stopped", steps=done + 2))  # the same run, made shorter
    assert f"steps: {done + 2}" in entry["outputs"]["show"]["text"][0]
    assert _runs(server, "stopped") == [folder]
    log = (folder / "log.jsonl").read_text().splitlines()
    assert len(log) == done + 2


def test_changed_pictures_are_trained_on_and_unchanged_ones_are_not(server: Any) -> None:
    import shutil

    pictures = Path(__file__).resolve().parents[2] / "assets" / "examples" / "ink"
    folder = server.log.parent / "input" / "mine"
    folder.mkdir(parents=True)
    for word in ("cat", "dog", "fox"):
        for suffix in ("png", "txt"):
            shutil.copy(pictures / f"{word}.{suffix}", folder)
    graph = base(name="mine", folder="mine", steps=2)
    server.run(graph)
    assert len(_runs(server, "mine")) == 1
    cached = server.run(graph)["status"]["messages"]
    assert "train" in next(told["nodes"] for event, told in cached if event == "execution_cached")
    (folder / "fox.png").unlink()
    server.run(graph)
    assert len(_runs(server, "mine")) == 2


def test_core_dataset_nodes_give_pictures_and_captions(server: Any) -> None:
    import shutil

    source = Path(__file__).resolve().parents[2] / "assets" / "examples" / "ink"
    folder = server.log.parent / "input" / "captioned"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    graph = base(name="listed", folder="(none)", steps=2)
    graph["pictures"] = _node("LoadImageTextDataSetFromFolder", folder="captioned")
    graph["train"]["inputs"] |= {"images": ["pictures", 0], "captions": ["pictures", 1]}
    assert "pictures: 20" in server.run(graph)["outputs"]["show"]["text"][0]


@pytest.mark.parametrize(
    ("changes", "without", "message"),
    [
        ({}, "vae", "connect the model's VAE to 'vae'"),
        ({}, "words", "connect 'clip' to encode them, or 'words' with stored prompts"),
        ({"folder": "(none)"}, "", "training needs one source of pictures, got none"),
        ({"resolution": 72}, "", "resolution 72 does not suit this model"),
        ({"model": ["applied", 0]}, "", "this model runs tasks already ('words')"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    server: Any, changes: Graph, without: str, message: str
) -> None:
    graph = base(name="wrong", **changes)
    graph["ink"] = _node("DiffScalerLoadTask", task_name="ink.safetensors")
    graph["applied"] = _node(
        "DiffScalerApplyTask", model=["model", 0], task=["ink", 0], strength=1.0
    )
    graph["train"]["inputs"].pop(without, None)
    with pytest.raises(Exception, match="DiffScalerTrainTask failed") as failure:
        server.run(graph)
    assert message.replace("'words')", "'ink')") in str(failure.value)
