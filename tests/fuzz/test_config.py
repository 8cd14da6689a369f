"""Training configurations: `read_config`, from TOML."""

from __future__ import annotations

from pathlib import Path
from random import Random

from diffscaler_core.training.config_file import dump, read_config
from diffscaler_core.training.settings import SETTINGS

from .harness import Target
from .mutations import WORDS, number, spoiled_bytes, spoiled_text, word
from .slices import check_slice, check_with_hypothesis

GOOD = """\
base = "assets/pocket"  # the base
out = "tasks/my_ink.safetensors"
data = "pictures/ink"

[task]
name = "ink"
method = "diffscaler"
rank = 8
targets = ["attn.to_q", "attn.to_k"]
rank_budget = "20k"

[training]
steps = 1000
batch = 8
accumulate = 2
lr = 1e-3
optimizer = 'adamw'

[pictures]
size = 64
crops = 2
buckets = false
cache = "~/cache"

[validation]
validation_share = 0.1

[run]
seed = 0
save_every = 100
device = "cpu"
"""
MANY = """\
base = "assets/pocket"
folder = "runs/both"
steps = 10

[[tasks]]
name = "a"
data = "pictures/a"

[[tasks]]
name = "b"
data = "pictures/b"
out = "b.safetensors"
prompts = "learned"
"""
_RAW = (
    *("nan", "inf", "-inf", "+nan", "1e999", "0x7fffffffffffffff", "1_000", "1979-05-27"),
    *("9" * 400, "9" * 5000, "-1", "0", "true", "[]", "{}", "[[]]", '""', "''", '"""', "'''x'''"),
    *("[" * 300 + "]" * 300, "[" * 5000, "{a={a={a=1}}}", '["a", 1]', '[""]', '"\\u0000"'),
    *('"\\ud800"', "07:32:00"),
    *('"auto"', '"~nobody-at-all/x"', '"a\\u0000b"', '"../../x"', '"CON"', '"x.ckpt"', "1e-400"),
    *('"999999999999999999999999%"', '"1e999%"', '"nan%"', '"infk"', '"-1M"', '"٣"', '"½"'),
    '"1_0k"',
)  # fmt: skip


def make(rng: Random) -> bytes:
    text = rng.choice((GOOD, MANY))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        lines = text.split("\n")
        act, at = rng.randrange(6), rng.randrange(len(lines))
        if act < 3:  # a known key with an odd value
            key = rng.choice(list(SETTINGS))
            lines.insert(min(at, rng.choice((3, at))), f"{key} = {_value(rng)}")
        elif act == 3 and "=" in lines[at]:
            lines[at] = f"{lines[at].partition('=')[0]}= {_value(rng)}"
        elif act == 4:
            lines = spoiled_text(rng, text).split("\n")
        else:
            lines.insert(at, f"[{rng.choice(('task', 'run', 'facts', 'x', '[tasks]', word(rng)))}]")
        text = "\n".join(lines)
    data = text.encode("utf-8", "surrogatepass")
    return spoiled_bytes(rng, data) if rng.random() < 0.1 else data


def _value(rng: Random) -> str:
    way = rng.randrange(6)
    if way == 0:
        return rng.choice(_RAW)
    if way > 3:  # often sound
        return rng.choice(
            ("1", "2", "8", "0.5", "1e-3", "true", "false", '"auto"', '"x"', '"none"')
        )
    if way == 1:
        value = number(rng)
        return str(value) if isinstance(value, float) else hex(value)
    text = rng.choice(WORDS) if way == 2 else word(rng)
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def run(raw: bytes, folder: Path) -> None:
    path = folder / "case.toml"
    path.write_bytes(raw)
    found = read_config(path)
    written = folder / "again.toml"
    written.write_text(dump(found.config, found), encoding="utf-8")
    assert read_config(written).config == found.config, "what was read is written otherwise"


TARGET = Target("config", make, run)


def test_the_good_files_are_good(tmp_path):
    for good in (GOOD, MANY):
        run(good.encode(), tmp_path)


def test_a_slice_of_the_cases(tmp_path):
    check_slice(TARGET, tmp_path)


def test_what_hypothesis_finds(tmp_path):
    check_with_hypothesis(TARGET, tmp_path)
