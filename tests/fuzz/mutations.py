"""Good input spoiled: JSON by its structure, files by their bytes, texts by their letters."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Sequence
from random import Random
from typing import Any

#: Texts that have broken readers somewhere.
WORDS = (
    *("", " ", "\0", "a\0b", "\n", "a\nb", "\r", "\x1b[2J", "\x7f", "\u2028", "\x85", "\ufeff"),
    *("..", "../x", "../../etc/passwd", "/etc/passwd", "C:\\x", "C:x", "\\\\host\\x", "~", "~root"),
    *("~nobody-at-all/x", "CON", "con.safetensors", "NUL", "x.", "x ", ".hidden", "-x", "a" * 300),
    *("NaN", "nan", "inf", "-inf", "1e999", "1_0", "0x10", "+1", "-0", "1e-400", "٣", "１", "½"),
    *("9" * 30, "9" * 400, "9" * 5000, "1." + "1" * 5000, "true", "null", "None", "{}", "[]"),
    *("ａ", "é", "e\u0301", "\u202e", "\u200b", "𝔘", "👩‍👩‍👧", "ﷺ", "\U0010ffff", "İ"),
    *("{0}", "%s", "%n", "${x}", "{{", "<script>", "'", '"', "\\", "`", "$(x)", ";", "#", ":", ","),
    *("__class__", "__init__", "self", "transformer", "unet", "control", "a.b", ".", "...", "a."),
    *("(a+)+$", "(", "[", "*", "(?P<x>", "(.*)*!", "([a-z_.]+)+!", "(\\w|_)*!", ".*.*.*.*.*.*!"),
    *("\\1", "a{1,99999}", "(?s:.)*", "[[:alpha:]]", "(?i)x", "x|", "\\", "a" * 20_000),
)
#: JSON that stands where other JSON is awaited. Not all of it is JSON.
FRAGMENTS = (
    *("null", "true", "false", "0", "-1", "1", "0.5", "-0.0", "1e308", "1e999", "-1e999", "NaN"),
    *("Infinity", "-Infinity", "1e-400", "2147483648", "9223372036854775807"),
    "18446744073709551616",
    *("1152921504606846976", "9" * 400, "9" * 5000, "-" + "9" * 400, "1." + "3" * 5000, "01"),
    '"1"',
    *('""', '"\\u0000"', '"\\ud800"', '"\\udfff x"', '"\\n"', '"\\u001b[2J"', '"F32"', '"F64"'),
    *('"F8_E4M3"', '"BOOL"', '"I64"', '"Q4_K"', '"F4"', '"U8"', '"C64"', '["F32"]', "[]", "{}"),
    *("[0]", "[-1]", "[1]", "[8]", "[2,8]", "[8,2]", "[1.0]", "[true]", "[null]", '["8"]', "[[8]]"),
    *("[0,8]", "[8,0]", "[1,1,1,1,1,1]", "[1152921504606846976]", "[4294967296,4294967296]"),
    *(f"[{'9' * 4000},{'9' * 4000}]", "[2,1000000000]", "[0,0]", "[0,18446744073709551615]"),
    *("[18446744073709551615,0]", "[-8,0]", "[0,1e3]", "[" * 60 + "]" * 60),
    '{"a":' * 60 + "1" + "}" * 60,
    *("[" * 5000 + "]" * 5000, '{"a":' * 5000 + "1" + "}" * 5000, '{"a":1,"a":2}', '{"":{}}'),
    *('{"dtype":"F32","shape":[1],"data_offsets":[0,4]}', "{", "]", '"', "//", "'x'", "nul", ""),
    *('"' + "x" * 70_000 + '"', "[" + ",".join(["1"] * 3000) + "]", '{"size":3,"start":0}'),
)  # fmt: skip
_MARK = "\u00a7raw%d\u00a7"


def word(rng: Random) -> str:
    """Returns a text that may break something."""
    if rng.random() < 0.7:
        return rng.choice(WORDS)
    return "".join(chr(_letter(rng)) for _ in range(rng.randrange(12)))


def _letter(rng: Random) -> int:
    top = rng.choice((0x7F, 0x250, 0x3000, 0xD7FF, 0x10FFFF))
    number = rng.randrange(top)
    return 0x20 if 0xD800 <= number <= 0xDFFF else number  # a text holds no half characters


def number(rng: Random) -> float:
    """Returns a number that may break something; often an ordinary one."""
    odd = (0, -1, 1, 0.5, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400, 1e308, -1e308, 5e-324)
    strange = (float("nan"), float("inf"), float("-inf"), -0.0, 1e-300)
    return rng.choice((*odd, *strange, rng.random(), rng.randrange(100)))


def spoiled_json(rng: Random, value: Any, most: int = 3) -> str:
    """Returns JSON like a value, spoiled in a few places; still JSON more often than not."""
    value = copy.deepcopy(value)
    raw: list[str] = []
    for _ in range(1 + rng.randrange(most)):
        places = list(_places(value))
        if not places:
            break
        holder, key = rng.choice(places)
        act = rng.randrange(7)
        if act == 0:
            del holder[key]
        elif act == 1:
            other_holder, other = rng.choice(places)
            holder[key] = copy.deepcopy(other_holder[other])
        elif act == 2 and isinstance(holder, dict):
            holder[word(rng)] = holder.pop(key)
        elif act == 3 and isinstance(holder, dict):
            raw.append(f"{_text(holder[key])},{_text(key)}:{rng.choice(FRAGMENTS)}")
            holder[key] = _MARK % (len(raw) - 1)  # the same key twice
        elif act == 4 and isinstance(holder, dict):
            holder[word(rng)] = copy.deepcopy(holder[key])
        elif act == 5 and isinstance(holder[key], str):
            holder[key] = spoiled_text(rng, holder[key])
        else:
            raw.append(rng.choice(FRAGMENTS) if rng.random() < 0.7 else _text(number(rng)))
            holder[key] = _MARK % (len(raw) - 1)
    text = _text(value)
    for i, fragment in enumerate(raw):
        text = text.replace(_text(_MARK % i), fragment)
    return text


def spoiled_text(rng: Random, text: str) -> str:
    """Returns a text with a few letters, words or lines put in, taken out or moved."""
    for _ in range(1 + rng.randrange(3)):
        at = rng.randrange(len(text) + 1)
        end = min(len(text), at + rng.randrange(12))
        act = rng.randrange(5)
        if act == 0:
            text = text[:at] + word(rng) + text[at:]
        elif act == 1:
            text = text[:at] + text[end:]
        elif act == 2:
            text = text[:at] + word(rng) + text[end:]
        elif act == 3:
            text = text[:at] + text[at:end] * rng.randrange(4) + text[end:]
        else:
            lines = text.split("\n")
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            text = "\n".join(lines)
    return text


def spoiled_bytes(rng: Random, data: bytes) -> bytes:
    """Returns bytes that were flipped, cut, filled or moved in a few places."""
    for _ in range(1 + rng.randrange(3)):
        at = rng.randrange(len(data) + 1)
        # most of what is read first stands in front
        at = min(at, rng.randrange(64)) if rng.random() < 0.3 else at
        end = min(len(data), at + rng.randrange(1, 64))
        act = rng.randrange(6)
        if act == 0:
            data = data[:at]
        elif act == 1:
            data = data[:at] + data[end:]
        elif act == 2:
            data = data[:at] + noise(rng, end - at) + data[end:]
        elif act == 3:
            data = data[:at] + noise(rng, rng.randrange(64)) + data[at:]
        elif act == 4:
            data = data[:at] + rng.choice((b"\0", b"\xff", b"{", b'"')) * (end - at) + data[end:]
        elif at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    return data


def noise(rng: Random, count: int) -> bytes:
    """Returns random bytes."""
    return bytes(rng.randrange(256) for _ in range(count))


#: What a header may say of its own length.
_LENGTHS = (0, 1, 7, 8, 2**16, 2**24, 2**31, 2**32, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1)


class File:
    """A good safetensors file in pieces.

    Args:
        raw: Its bytes.
        inner: Metadata entries that are JSON themselves, and are spoiled as such.
    """

    def __init__(self, raw: bytes, inner: Sequence[str] = ()) -> None:
        length = int.from_bytes(raw[:8], "little")
        self.raw, self.data, self.inner = raw, raw[8 + length :], tuple(inner)
        self.header = json.loads(raw[8 : 8 + length])
        self.facts = {key: json.loads(self.header["__metadata__"][key]) for key in inner}

    def joined(self, header: str | bytes, data: bytes | None = None) -> bytes:
        """Returns a file with another header, whose length is right, and other data."""
        text = header if isinstance(header, bytes) else header.encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text)) + text + (self.data if data is None else data)

    def spoiled(self, rng: Random) -> bytes:
        """Returns the file spoiled in one of many ways."""
        way = rng.randrange(10)
        if way < 3:
            return self.joined(spoiled_json(rng, self.header))
        if way < 6 and self.inner:
            key = rng.choice(self.inner)
            header = copy.deepcopy(self.header)
            header["__metadata__"][key] = spoiled_json(rng, self.facts[key])
            return self.joined(_text(header))
        if way == 6:
            return self._other_tensor(rng)
        if way == 7:
            return self.joined(_text(self.header), self._odd_numbers(rng))
        if way == 8:
            length = rng.choice((*_LENGTHS, len(self.raw), len(self.raw) - 8, rng.randrange(9999)))
            return struct.pack("<Q", length) + self.raw[8:]
        return spoiled_bytes(rng, self.raw) if rng.random() < 0.9 else noise(rng, rng.randrange(99))

    def _other_tensor(self, rng: Random) -> bytes:
        """One tensor is replaced by another that is sound in itself."""
        sizes = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I8": 1, "BOOL": 1,
                 "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "C64": 8, "U16": 2}  # fmt: skip
        header = copy.deepcopy(self.header)
        name = rng.choice([key for key in header if key != "__metadata__"] or ["x"])
        dtype = rng.choice(list(sizes))
        shape = [rng.choice((0, 1, 1, 2, 3, 8, 16)) for _ in range(rng.randrange(6))]
        count = sizes[dtype]
        for length in shape:
            count *= length
        start = len(self.data)
        header[name if rng.random() < 0.7 else word(rng)] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [start, start + count],
        }
        data = self.data + bytes(count) if rng.random() < 0.5 else self.data + noise(rng, count)
        return _packed(header, data)

    def _odd_numbers(self, rng: Random) -> bytes:
        data = bytearray(self.data)
        for _ in range(1 + rng.randrange(4)):
            at = rng.randrange(max(1, len(data) - 4)) & ~3
            odd = rng.choice((float("nan"), float("inf"), -float("inf"), 1e38, 1e-45, 0.0))
            data[at : at + 4] = struct.pack("<f", odd)
        return bytes(data[: len(self.data)])


def _packed(header: dict[str, Any], data: bytes) -> bytes:
    """Returns a file whose tensors lie one after the other, as the format wants them."""
    parts, start, entries = [], 0, {}
    for name, entry in header.items():
        if name == "__metadata__":
            entries[name] = entry
            continue
        first, last = entry["data_offsets"]
        parts.append(data[first:last])
        entries[name] = {**entry, "data_offsets": [start, start + last - first]}
        start += last - first
    text = _text(entries).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def _places(value: Any) -> Any:
    """Yields (holder, key) of everything in a JSON value."""
    if isinstance(value, dict):
        for key in list(value):
            yield value, key
            yield from _places(value[key])
    elif isinstance(value, list):
        for i in range(len(value)):
            yield value, i
            yield from _places(value[i])


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
