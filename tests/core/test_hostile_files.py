"""Files that are wrong on purpose: each gives one clear line, and nothing happens to the model."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import time
import tracemalloc
import zipfile

import pytest
import torch
from safetensors.torch import save

from diffscaler_core import (
    DiffScalerError,
    TaskFileError,
    attach,
    load_task,
    new_task,
    read_info,
    save_task,
)

from .conftest import Denoiser, filled, hooks_of

MIB = 2**20


class Good:
    """A good file in pieces, to be spoiled."""

    def __init__(self, raw: bytes) -> None:
        length = int.from_bytes(raw[:8], "little")
        self.raw, self.data = raw, raw[8 + length :]
        self.header = json.loads(raw[8 : 8 + length])
        self.first = next(name for name in self.header if name != "__metadata__")

    def bytes(self, header=None, data=None, length=None) -> bytes:
        header = self.header if header is None else header
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        length = len(text) if length is None else length
        return struct.pack("<Q", length) + text + (self.data if data is None else data)

    def meta(self, **entries) -> bytes:
        """With other metadata; None removes an entry, `format` and `config` are ours."""
        metadata = dict(self.header["__metadata__"])
        for key, value in entries.items():
            full = f"diffscaler.{key}"
            metadata.pop(full) if value is None else metadata.__setitem__(full, value)
        return self.bytes({**self.header, "__metadata__": metadata})

    def config(self, **facts) -> bytes:
        config = json.loads(self.header["__metadata__"]["diffscaler.config"])
        for key, value in facts.items():
            config.pop(key) if value is None else config.__setitem__(key, value)
        return self.meta(config=json.dumps(config))

    def raw_config(self, find: str, put: str) -> bytes:
        config = self.header["__metadata__"]["diffscaler.config"]
        assert find in config
        return self.meta(config=config.replace(find, put, 1))

    def entry(self, **facts) -> bytes:
        """With other facts about the first tensor."""
        changed = {**self.header[self.first], **facts}
        return self.bytes({**self.header, self.first: changed})

    def renamed(self, name: str) -> bytes:
        return self.bytes({name if k == self.first else k: v for k, v in self.header.items()})

    def tensors(self, change, **metadata) -> bytes:
        """With other tensors, written by safetensors itself."""
        from safetensors.torch import load

        tensors = load(self.raw)
        change(tensors)
        return save(tensors, {**self.header["__metadata__"], **metadata})


class Payload:
    def __reduce__(self):
        return (os.system, ("touch /tmp/diffscaler_was_here",))


def torch_file(good, legacy=False):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def zip_file(good):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("x", b"x" * 100)
    return buffer.getvalue()


def plain_lora(good):
    name = "transformer.transformer_blocks.0.attn.to_q"
    return save({f"{name}.lora_A.weight": torch.ones(2, 8)}, {"format": "pt"})


def overlapping(good):
    first, second = [n for n in good.header if n != "__metadata__"][:2]
    return good.bytes(
        {
            **good.header,
            second: {**good.header[second], **{"data_offsets": [0, 32]}},
            first: {**good.header[first], "data_offsets": [0, 32]},
        }
    )


def put(name, tensor):
    return lambda good: good.tensors(lambda t: t.__setitem__(name, tensor))


def drop(name):
    return lambda good: good.tensors(lambda t: t.pop(name))


def filled_first(value):
    return lambda good: good.tensors(lambda t: t[good.first].view(-1)[:1].fill_(value))


def drop_layer(good):
    def change(tensors):
        for name in [n for n in tensors if n.startswith(Q)]:
            tensors.pop(name)

    return good.tensors(change)


def million_entries(good):
    one = '"a%06d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return good.bytes(("{" + ",".join(one % i for i in range(1_000_000)) + "}").encode())


def many_entries(good):
    """As many tiny objects as fit below the limit of the header's size."""
    return good.bytes(b'{"__metadata__":{},"a":[' + b"{}," * (1_250_000) + b"{}]}")


Q = "transformer.transformer_blocks.0.attn.to_q"
HUGE = "transformer." + "a" * 100_000 + ".shift"
F8 = {"dtype": "F8_E4M3", "shape": [32], "data_offsets": [0, 32]}

# name -> (builder, words the message must have)
FILES = {
    "empty": (lambda g: b"", "cut short"),
    "seven bytes": (lambda g: g.raw[:7], "cut short"),
    "eight bytes": (lambda g: g.raw[:8], "cut short"),
    "truncated header": (lambda g: g.raw[:60], "cut short"),
    "truncated data": (lambda g: g.raw[:-5], "broken"),
    "data too long": (lambda g: g.raw + b"x" * 8, "broken"),
    "header length 2**63": (lambda g: g.bytes(length=2**63), "cut short"),
    "header length 2**64-1": (lambda g: g.bytes(length=2**64 - 1), "cut short"),
    "header of zero bytes": (lambda g: g.bytes(b""), "no JSON|no safetensors|cut short"),
    "claim of a 100 MB header": (lambda g: g.bytes(length=100 * MIB), "cut short"),
    "a true 20 MB header": (lambda g: g.bytes(b"{" + b" " * 20 * MIB + b"}"), "header of"),
    "garbage": (lambda g: g.bytes(b"{nonsense]"), "no JSON"),
    "binary garbage": (lambda g: bytes(range(256)) * 40, "no safetensors"),
    "bad utf-8": (lambda g: g.bytes(b'{"\xff\xfe":1}'), "no JSON"),
    "JSON array": (lambda g: g.bytes(b"[1, 2]"), "no safetensors"),
    "JSON number": (lambda g: g.bytes(b"123"), "no safetensors"),
    "deep nesting": (lambda g: g.bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "no JSON"),
    "deep lists": (lambda g: g.bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "no JSON"),
    "huge number": (lambda g: g.bytes(b'{"a":' + b"9" * 100_000 + b"}"), "no JSON"),
    "a million tensors": (million_entries, "no task has"),
    "a million objects": (many_entries, "no task has"),
    "duplicate tensor": (
        lambda g: g.bytes(b'{"a":{},"a":{},' + json.dumps(g.header).encode()[1:]),
        "'a' twice",
    ),
    "duplicate key in config": (lambda g: g.raw_config("{", '{"gain":1.0,"gain":2.0,'), "twice"),
    "entry that is no object": (lambda g: g.bytes({**g.header, "x": 3}), "malformed"),
    "metadata that is no object": (lambda g: g.bytes({**g.header, "__metadata__": 3}), "not text"),
    "metadata that is not text": (lambda g: g.meta(config=[1]), "not text"),
    "overlapping offsets": (overlapping, "broken"),
    "offsets beyond the end": (lambda g: g.entry(data_offsets=[2**40, 2**40 + 32]), "broken"),
    "offsets backwards": (lambda g: g.entry(data_offsets=[32, 0]), "broken"),
    "offsets missing": (lambda g: g.entry(data_offsets=None), "broken"),
    "shape of 2**40": (lambda g: g.entry(shape=[2**40]), "do not fit|broken|bad layer"),
    "shape overflows": (lambda g: g.entry(shape=[2**40, 2**40]), "malformed"),
    "negative shape": (lambda g: g.entry(shape=[-8]), "malformed"),
    "shape of floats": (lambda g: g.entry(shape=[8.0]), "malformed"),
    "shape missing": (lambda g: g.entry(shape=None), "malformed"),
    "shape of zero": (lambda g: g.entry(shape=[0], data_offsets=[0, 0]), "malformed"),
    "dtype missing": (lambda g: g.entry(dtype=None), "stored as"),
    "dtype unknown": (lambda g: g.entry(dtype="Q4_K"), "Q4_K"),
    "dtype a list": (lambda g: g.entry(dtype=["F32"]), "stored as"),
    "F64": (put(f"{Q}.shift", torch.ones(8).double()), "F64"),
    "I8": (put(f"{Q}.shift", torch.ones(8, dtype=torch.int8)), "I8"),
    "BOOL": (put(f"{Q}.shift", torch.ones(8, dtype=torch.bool)), "BOOL"),
    "F8": (put(f"{Q}.shift", torch.ones(8).to(torch.float8_e4m3fn)), "F8"),
    "NaN": (filled_first(float("nan")), "NaN or Inf in 1 tensors"),
    "Inf": (filled_first(float("inf")), "NaN or Inf in 1 tensors"),
    "NaN in the config": (lambda g: g.raw_config('"gain": 1.0', '"gain": NaN'), "no number"),
    "1e999 in the config": (lambda g: g.raw_config('"gain": 1.0', '"gain": 1e999'), "no number"),
    "gain as text": (lambda g: g.config(gain="1"), "'gain'"),
    "gain as bool": (lambda g: g.config(gain=True), "'gain'"),
    "unknown version": (lambda g: g.meta(format="2"), "version '2'"),
    "endless version": (lambda g: g.meta(format="9" * 100_000), "version"),
    "no version": (lambda g: g.meta(format=None), "no DiffScaler task"),
    "no config": (lambda g: g.meta(config=None), "no JSON"),
    "config no object": (lambda g: g.meta(config="[]"), "no JSON object"),
    "config cut": (lambda g: g.meta(config='{"name":'), "no JSON"),
    "config of 2 MB": (lambda g: g.config(note="x" * 2 * MIB), "config of"),
    "deep config": (lambda g: g.meta(config='{"a":' * 50_000 + "1" + "}" * 50_000), "no JSON"),
    "no name": (lambda g: g.config(name=None), "has a name"),
    "name no text": (lambda g: g.config(name=["t"]), "'name'"),
    "unknown method": (lambda g: g.config(method="m" * 10_000), "one of the methods"),
    "unknown activation": (lambda g: g.config(activation="gelu"), "gelu.*relu, identity"),
    "flag no bool": (lambda g: g.config(scale_includes_bias="no"), "scale_includes_bias"),
    "base no object": (lambda g: g.config(base="sd3"), "'base'"),
    "prompts no list": (lambda g: g.config(prompts="abc"), "'prompts'"),
    "prompts without tensors": (lambda g: g.config(prompts=["a"]), "names 1 prompts"),
    "tensors without prompts": (put("conditioning.context", torch.ones(2, 3, 4)), "names 0"),
    "flat prompts": (put("conditioning.context", torch.ones(4)), "dimensions, not 3"),
    "pickle": (lambda g: pickle.dumps(Payload()), "pickle or zip"),
    "old pickle": (lambda g: pickle.dumps(Payload(), protocol=2), "pickle or zip"),
    "zip": (zip_file, "pickle or zip"),
    "torch.save": (torch_file, "pickle or zip"),
    "old torch.save": (lambda g: torch_file(g, legacy=True), "pickle or zip"),
    "plain LoRA": (plain_lora, "import_lora"),
    "PNG": (lambda g: b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "no safetensors"),
    "HTML": (lambda g: b"<!DOCTYPE html><html>404</html>" * 9, "no safetensors"),
    "one missing layer": (drop_layer, "says it has 8 layers but holds 7"),
    "one extra layer": (
        put("transformer.proj_out.shift", torch.ones(4)),
        "says it has 8 layers but holds 9",
    ),
    "down without up": (drop(f"{Q}.up"), "come together"),
    "up without down": (drop(f"{Q}.down"), "come together"),
    "mismatched widths": (put(f"{Q}.scale", torch.ones(9)), "do not fit each other"),
    "mismatched ranks": (put(f"{Q}.up", torch.ones(8, 7)), r"up \(8, 7\)"),
    "rank 0": (
        lambda g: g.tensors(
            lambda t: t.update({f"{Q}.down": torch.ones(0, 8), f"{Q}.up": torch.ones(8, 0)})
        ),
        "malformed",
    ),
    "scalar": (put(f"{Q}.scale", torch.tensor(1.0)), "do not fit each other"),
    "matrix for a vector": (put(f"{Q}.scale", torch.ones(8, 1)), "do not fit each other"),
    "six dimensions": (put(f"{Q}.down", torch.ones(3, 8, 1, 1, 1, 1)), "down"),
    "name ../x": (lambda g: g.renamed("../x"), r"no task has: '\.\./x'"),
    "name /etc": (lambda g: g.renamed("/etc/passwd"), "no task has"),
    "name a//b": (lambda g: g.renamed("transformer.a//b.shift"), "no task has"),
    "name with dots": (lambda g: g.renamed("transformer...shift"), "no task has"),
    "name with NUL": (lambda g: g.renamed("transformer.a\0b.shift"), "no task has"),
    "name with newline": (lambda g: g.renamed("transformer.a\nb.shift"), "no task has"),
    "unicode name": (lambda g: g.renamed("transformer.ａ.shift"), "no task has"),
    "very long name": (lambda g: g.renamed(HUGE), "no task has"),
    "empty name": (lambda g: g.renamed(""), "no task has"),
    "component without module": (lambda g: g.renamed("transformer.shift"), "no task has"),
    "foreign component": (lambda g: g.renamed("vae.decoder.shift"), "no task has"),
    "foreign part": (lambda g: g.renamed("transformer.a.weight"), "no task has"),
    "reserved prefix alone": (lambda g: g.renamed("control"), "no task has"),
    "no tensors": (
        lambda g: g.bytes({"__metadata__": g.header["__metadata__"]}, data=b""),
        "holds 0",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Good:
    torch.manual_seed(0)
    task = filled(new_task(Denoiser(), rank=3, name="good"))
    path = save_task(task, tmp_path_factory.mktemp("good") / "good.safetensors")
    return Good(path.read_bytes())


def check_refused(path, words, expected=TaskFileError):
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(expected, match=words) as caught:
            load_task(path)
        seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    assert len(message) < 600
    assert peak < 64 * MIB
    assert seconds < 3
    return message


def test_the_good_file_is_good_and_can_be_spoiled_without_a_fault(good, tmp_path):
    path = tmp_path / "t.safetensors"
    for raw in (good.raw, good.bytes(), good.tensors(lambda t: None), good.config(note="x")):
        path.write_bytes(raw)
        assert load_task(path).name == "good"


@pytest.mark.parametrize("case", FILES)
def test_a_hostile_file_gives_one_clear_line(case, good, tmp_path):
    build, words = FILES[case]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(build(good))
    check_refused(path, words)
    try:  # reading the facts alone may get by with less, but never fails in another way
        read_info(path)
    except TaskFileError:
        pass


def test_nothing_was_ever_unpickled():
    assert not os.path.exists("/tmp/diffscaler_was_here")


def test_there_is_no_such_file(tmp_path):
    for read in (load_task, read_info):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none.safetensors")
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        load_task(tmp_path / "dangling.safetensors")


def test_a_symbolic_link_to_a_task_is_a_task(good, tmp_path):
    (tmp_path / "t.safetensors").write_bytes(good.raw)
    (tmp_path / "link.safetensors").symlink_to("t.safetensors")
    assert load_task(tmp_path / "link.safetensors").name == "good"


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "loop"])
def test_what_is_no_file_is_refused_and_never_waited_for(kind, tmp_path):
    path = tmp_path / "t.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path)
    check_refused(path, "folder or a device|could not read")


def test_a_file_that_vanishes_while_it_is_read_is_one_clear_line(good, tmp_path, monkeypatch):
    import diffscaler_core.files as files

    path = tmp_path / "t.safetensors"
    path.write_bytes(good.raw)
    real = files.read_tensors

    def vanish(*arguments):
        path.unlink()
        return real(*arguments)

    monkeypatch.setattr(files, "read_tensors", vanish)
    check_refused(path, "is broken")


def test_a_file_that_may_not_be_read_is_one_clear_line(good, tmp_path, monkeypatch):
    from pathlib import Path

    path = tmp_path / "t.safetensors"
    path.write_bytes(good.raw)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # as root every file may be read
    check_refused(path, "could not read.*Permission denied")


def snapshot(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("other base", "8 misfit"),
        ("other layers", "8 layers missing, first 'blocks.0.attn.to_out.0'"),
        ("one layer of another shape", "1 misfit.*transformer_blocks.0.attn.to_q is 8x8"),
        ("a convolution for a Linear", "1 misfit"),
        ("one layer too many", "1 layers missing, first 'transformer_blocks.7.attn.to_q'"),
        ("another component", "adapt transformer, none of them 'unet'"),
        ("a name that is no module", "1 layers missing, first '__class__.__init__'"),
    ],
)
def test_a_good_file_for_another_model_leaves_this_one_untouched(case, words, model, x, tmp_path):
    task = filled(new_task(Denoiser(16) if case == "other base" else model, rank=3, name="t"))
    layers = dict(task.layers)
    if case == "other layers":
        layers = {n.replace("transformer_blocks", "blocks"): t for n, t in layers.items()}
    elif case == "one layer of another shape":
        layers[Q] = {"shift": torch.ones(9)}
    elif case == "a convolution for a Linear":
        layers[Q] = {"down": torch.ones(2, 8, 1, 1), "up": torch.ones(8, 2)}
    elif case == "one layer too many":
        layers[Q.replace("0", "7")] = {"shift": torch.ones(8)}
    elif case == "a name that is no module":
        layers["transformer.__class__.__init__"] = {"shift": torch.ones(8)}
    task = load_task(save_task(task.replace(layers=layers), tmp_path / "t.safetensors"))
    component = "unet" if case == "another component" else None
    tasks = {"bad": task} if component else {"good": filled(new_task(model)), "bad": task}
    before, state = model(x), snapshot(model)
    with pytest.raises(DiffScalerError, match=words) as caught:
        attach(model, tasks, component=component)
    assert "\n" not in str(caught.value)
    assert hooks_of(model) == []
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(x), before)
