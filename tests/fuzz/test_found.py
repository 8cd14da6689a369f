"""What fuzzing found, once each: the input, and how it ends now."""

from __future__ import annotations

import json
import struct
import time

import pytest
import torch
from safetensors.torch import save, save_file

from diffscaler_core import (
    DiffScalerError,
    TaskFileError,
    find_targets,
    import_lora,
    load_task,
    read_info,
    scale_task,
)
from diffscaler_core.describe import describe
from diffscaler_core.describe_file import describe_file, file_row, file_values
from diffscaler_core.files import outline_task
from diffscaler_core.patterns import compiled
from diffscaler_core.strengths import parse_block_weights, parse_strengths
from diffscaler_core.systems.router import Router, Site, load_router, save_router
from diffscaler_core.training.checkpoints import read_checkpoint, save_checkpoint
from diffscaler_core.training.config_file import read_config
from diffscaler_core.training.data.cache import Cache, digest_of

from .good import CONFIG, random, task, task_files
from .harness import not_printable, what_is_wrong
from .test_router import BASE, router_files


def refused(act, *arguments, match: str, kind=DiffScalerError) -> None:
    with pytest.raises(kind, match=match) as error:
        act(*arguments)
    assert what_is_wrong(str(error.value)) is None


@pytest.fixture
def spoiled(tmp_path):
    """spoiled(entry=…): a good task file with another config."""

    def build(**facts):
        good = task_files()[0]
        header = {**good.header, "__metadata__": dict(good.header["__metadata__"])}
        header["__metadata__"][CONFIG] = json.dumps({**good.facts[CONFIG], **facts})
        path = tmp_path / "t.safetensors"
        path.write_bytes(good.joined(json.dumps(header)))
        return path

    return build


@pytest.mark.parametrize(
    "facts",
    [
        {"parts": [["scale"]]},
        {"parts": ["scale", 0.5]},
        {"parts": 4},
        {"combined_from": 4},
        {"combined_from": [52]},
        {"combined_from": [{"weight": "x"}]},
        {"averaged_from": {"": {}}},
        {"training": "x"},
        {"extracted": 1.5},
        {"gain": 10**400},
        {"base": {"family": "a\nb"}},
        {"base": {"class": ["x"]}},
        {"trigger": "\ud800"},
    ],
    ids=str,
)
def test_facts_of_another_kind_are_refused(facts, spoiled):
    """`describe` raised TypeError, AttributeError or OverflowError, or printed two lines."""
    path = spoiled(**facts)
    for read in (load_task, read_info, outline_task, describe_file, file_values, file_row):
        refused(read, path, match=r"'t.safetensors'", kind=TaskFileError)


def test_a_terminal_is_not_steered_by_a_file(spoiled):
    """Titles and triggers were printed with their escape sequences."""
    path = spoiled(trigger="ink\x1b[2J\x07\u2028x", license="a\r\nb")
    for text in (describe(load_task(path)), describe_file(path)):
        assert not_printable(text, "\n") is None
        assert "ink\ufffd[2J" in text


@pytest.mark.parametrize(
    "shape", [[2, 2**60], [2, 2**70], [10**4000, 10**4000], [None], [[1]], [-1]]
)
def test_shapes_no_tensor_has(shape, tmp_path):
    """torch raised OverflowError with a page of stack, `diffscaler info` TypeError."""
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}
    text = json.dumps({"x.lora_A.weight": entry})
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(4))
    for read in (load_task, outline_task, describe_file, file_values, import_lora):
        refused(read, path, match="malformed|no JSON", kind=TaskFileError)


def test_what_safetensors_says_of_a_router_is_cut_short(tmp_path):
    """Its error quoted 70,000 letters, too."""
    good = router_files()[0]
    header = {**good.header}
    header["last.bias"] = {**header["last.bias"], "data_offsets": "x" * 70_000}
    path = tmp_path / "r.safetensors"
    path.write_bytes(good.joined(json.dumps(header)))
    refused(load_router, path, match="cannot be read", kind=TaskFileError)


def test_a_router_whose_answer_overflows(tmp_path):
    router = Router(("a", "b"), Site(1, 3, 1, BASE), 4)
    with torch.no_grad():
        router.last.weight.fill_(3e38)
        router.last.bias.fill_(3e38)
    path = save_router(router, tmp_path / "r.safetensors")
    refused(load_router, path, match="answer is not finite", kind=TaskFileError)


def test_what_safetensors_says_is_cut_short(tmp_path):
    """Its error quoted 70,000 letters out of the header."""
    good = task_files()[0]
    name = next(key for key in good.header if key != "__metadata__")
    header = {**good.header, name: {**good.header[name], "data_offsets": "x" * 70_000}}
    path = tmp_path / "t.safetensors"
    path.write_bytes(good.joined(json.dumps(header)))
    refused(load_task, path, match="broken", kind=TaskFileError)


def test_a_sparse_file_of_a_terabyte_is_not_read(tmp_path):
    path = tmp_path / "t.safetensors"
    path.write_bytes(task_files()[0].raw)
    with path.open("r+b") as file:
        file.truncate(2**40)
    refused(load_task, path, match="larger than its header says", kind=TaskFileError)


NAME = "transformer.transformer_blocks.0.attn.to_q"


def lora(tmp_path, extra=None, metadata=None, down=(4, 8), up=(8, 4)):
    tensors = {f"{NAME}.lora_A.weight": random(1, *down), f"{NAME}.lora_B.weight": random(2, *up)}
    path = tmp_path / "l.safetensors"
    path.write_bytes(save({**tensors, **(extra or {})}, metadata))
    return path


@pytest.mark.parametrize("pattern", ["F32", 4, 5e-324, [1]])
def test_peft_patterns_of_another_kind(pattern, tmp_path):
    facts = {"transformer.lora_alpha": 8, "transformer.alpha_pattern": pattern}
    path = lora(tmp_path, metadata={"lora_adapter_metadata": json.dumps(facts)})
    refused(import_lora, path, match="alpha_pattern must not be", kind=TaskFileError)


@pytest.mark.parametrize("alpha", ["9" * 400, "9" * 4000, "1e999"])
def test_an_alpha_beyond_all_numbers(alpha, tmp_path):
    told = f'{{"transformer.lora_alpha": {alpha}}}'
    path = lora(tmp_path, metadata={"lora_adapter_metadata": told})
    refused(import_lora, path, match="no JSON", kind=TaskFileError)


def test_a_lora_of_rank_zero(tmp_path):
    for extra in (None, {f"{NAME}.alpha": torch.tensor(1.0)}):
        path = lora(tmp_path, extra, down=(0, 8), up=(8, 0))
        refused(import_lora, path, match="no down and up", kind=TaskFileError)


def test_a_complex_alpha(tmp_path):
    path = lora(tmp_path, {f"{NAME}.alpha": torch.tensor(1.0, dtype=torch.complex64)})
    refused(import_lora, path, match="C64", kind=TaskFileError)


def test_a_dtype_that_is_a_list(tmp_path):
    path = lora(tmp_path)
    raw = path.read_bytes().replace(b'"F32"', b"[[0]]", 1)
    path.write_bytes(raw)
    refused(import_lora, path, match="broken|holds", kind=TaskFileError)


def test_a_configuration_beside_the_file_that_is_no_text(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    save_file(
        {f"{NAME}.lora_A.weight": random(1, 4, 8), f"{NAME}.lora_B.weight": random(2, 8, 4)}, path
    )
    (tmp_path / "adapter_config.json").write_bytes(b'{"lora_alpha": "\xff"}')
    refused(import_lora, path, match="adapter_config.json.*no JSON", kind=TaskFileError)


@pytest.mark.parametrize(
    "line",
    [
        f"timestep_mean = 0x{'f' * 400}",
        f"steps = {'9' * 4000}",
        "timestep_mean = nan",
        "lr = inf",
        'folder = "~nobody-at-all/x"',
        'cache = "~nobody-at-all/x"',
        'data = "\\u0000"',
        f'out = "{"a" * 20_000}"',
        f'rank_budget = "{"9" * 20_000}"',
        f'rank = "{"9" * 5000}"',
        f'control_from = "{"9" * 5000}"',
    ],
    ids=lambda line: line[:30],
)
def test_configurations(line, tmp_path):
    path = tmp_path / "c.toml"
    said = "" if line.startswith("data") else 'data = "x"\n'
    path.write_text(f'base = "b"\n{said}{line}\n')
    refused(read_config, path, match=r"c\.toml")


def test_a_configuration_that_is_no_file(tmp_path):
    """Opening a FIFO waited for ever, reading a device filled the memory."""
    import os

    os.mkfifo(tmp_path / "fifo.toml")
    (tmp_path / "device.toml").symlink_to("/dev/zero")
    for name in ("fifo.toml", "device.toml"):
        refused(read_config, tmp_path / name, match="a folder or a device")


@pytest.mark.parametrize(
    "text", ["9" * 5000 + ": 1", "a" * 20_000 + ": 1", "(" * 3000 + ": 1", "a{1,99999999999}: 1"]
)
def test_strengths_by_block(text):
    refused(lambda: scale_task(task(), layers=parse_block_weights(text)), match="pattern|range")


def test_a_long_text_is_not_quoted_whole():
    refused(parse_strengths, "1.0, 0.5" * 3000, 2, match="is no number|strengths for")


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.*)*!", "([a-z_.]+)+!", r"(\w|_)*!", ".*.*.*.*.*.*!", "(a?){30}a{30}"]
)
def test_patterns_that_never_end_are_refused(pattern):
    start = time.process_time()
    refused(lambda: scale_task(task(), layers={pattern: 1.0}), match="write it more simply")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    refused(lambda: find_targets(model, pattern), match="write it more simply")
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "pattern",
    [
        r".*(attn|ff).*",
        r".*blocks\.\d+\.attn.*to_q.*",
        r"(.*\.)?attn\.to_[qkv](\..*)?",
        r".*attn.*to_q.*|.*ff.*net.*|.*mlp.*fc.*",
        r"[*+(]x\*+",
        r"(?:transformer_)?blocks\.([0-9]|1[0-9])\..+",
        r"(?!.*norm).*",
    ],
)
def test_patterns_that_people_write_are_not(pattern):
    assert compiled(pattern).pattern == pattern


def test_a_step_that_is_no_number(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"a": torch.ones(2)}, {})
    good = path.read_bytes()
    for step in (b"{}", b"[]", b'""', b"-1"):
        note = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])
        facts = {"version": 1, "step": json.loads(step)}
        note["__metadata__"]["diffscaler.checkpoint"] = json.dumps(facts)
        text = json.dumps(note).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
        refused(read_checkpoint, path, match="cannot be of step")


def test_a_cache_entry_whose_checksum_is_infinite(tmp_path):
    cache, key = Cache(tmp_path), digest_of("x")
    cache.put(key, {"x0": torch.ones(2)})
    raw = cache.path(key).read_bytes()
    text = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    text["__metadata__"]["crc32"] = -float("inf")
    written = json.dumps(text).encode()
    cache.path(key).write_bytes(struct.pack("<Q", len(written)) + written + bytes(8))
    assert cache.get(key) is None
