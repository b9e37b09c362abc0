"""How files go wrong: in their bytes, in the values of a tree, in the text of YAML; drawn from a given Random."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

import yaml

HOSTILE = "\x1b]0;owned\x07\x1b[31m"  # a terminal obeys it
DEEP = 3000
# What stands where something else is wanted. Made anew for each use: they are put into trees that are changed again.
ODD = (
    lambda: None,
    lambda: True,
    lambda: False,
    lambda: 0,
    lambda: -1,
    lambda: 1,
    lambda: 7,
    lambda: 10**30,
    lambda: -(2**63),
    lambda: 2**31,
    lambda: 0.5,
    lambda: -0.0,
    lambda: 1e308,
    lambda: float("nan"),
    lambda: float("-inf"),
    lambda: "",
    lambda: " ",
    lambda: "null",
    lambda: "320",
    lambda: "x" * 5000,
    lambda: "\ud800",
    lambda: "\0",
    lambda: HOSTILE,
    lambda: "a\nb\r\nc\u2028d\x85e",
    lambda: "日本語 🦙 \u202eabc",
    lambda: "<s>[INST] </s><unk>",
    lambda: "{{ 1/0 }}",
    lambda: "{% for",
    lambda: "../../x",
    lambda: "%s{}{0}$HOME",
    lambda: [],
    lambda: {},
    lambda: [[]],
    lambda: [None],
    lambda: {"": None},
    lambda: {"a": {"b": [1, "2"]}},
    lambda: ["x", 1, None, {}],
)

# -- bytes --------------------------------------------------------------------------------------------------------


def _flip(data: bytearray, drawn: random.Random) -> bytearray:
    for _ in range(drawn.choice([1, 1, 8])):
        data[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
    return data


def _cut_out(data: bytearray, drawn: random.Random) -> bytearray:
    start = drawn.randrange(len(data))
    del data[start : start + drawn.choice([1, 2, 16, 300])]
    return data


def _truncate(data: bytearray, drawn: random.Random) -> bytearray:
    return data[: drawn.randrange(len(data))]


def _repeat(data: bytearray, drawn: random.Random) -> bytearray:
    start = drawn.randrange(len(data))
    piece = data[start : start + drawn.choice([1, 16, 300])]
    return data[:start] + piece * drawn.choice([2, 100]) + data[start:]


def _insert(data: bytearray, drawn: random.Random) -> bytearray:
    pieces = [b"\0", b"\0" * 64, b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r\n", b"\n\n", b'"', b"{", b"}", b"["]
    pieces += [b"]", b",", b":", b"\\", b"\x1b[2J", b"9" * 400, b"1e999", b"NaN", b"[" * DEEP, b'{"a":' * DEEP]
    pieces += [drawn.randbytes(16), b"\xe2\x80\xa8"]
    start = drawn.randrange(len(data) + 1)
    return data[:start] + drawn.choice(pieces) + data[start:]


def _overwrite(data: bytearray, drawn: random.Random) -> bytearray:
    start = drawn.randrange(len(data))
    data[start : start + 16] = drawn.randbytes(16)
    return data


def _whole(data: bytearray, drawn: random.Random) -> bytearray:
    contents = [b"", b"\n", b"\0" * 512, b"null", b"[]", b"{}", b"0", b'"x"', drawn.randbytes(200), data + data]
    contents += [b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", b"\x1f\x8b\x08", b"PAR1"]
    return bytearray(drawn.choice(contents))


_BYTES = (_flip, _cut_out, _truncate, _repeat, _insert, _insert, _overwrite)


def mutate_bytes(data: bytes, drawn: random.Random) -> bytes:
    """One to three places changed without regard to what is written there."""
    changed = bytearray(data)
    if drawn.random() < 0.08:
        return bytes(_whole(changed, drawn))
    for _ in range(drawn.choice([1, 1, 2, 3])):
        if changed:
            changed = drawn.choice(_BYTES)(changed, drawn)
    return bytes(changed)


# -- trees --------------------------------------------------------------------------------------------------------


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree."""
    found, open_ = [], [tree]
    while open_:
        node = open_.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            found.append((node, key))
            open_.append(value)
    return found


def _odd(value: Any, drawn: random.Random) -> Any:
    """Something else than a value: near it, or far away."""
    near: list[Any] = [[value], {"value": value}, str(value)]
    if isinstance(value, bool | int | float):
        near += [-value, value + 1, value * 1000, float(value), f" {value} "]
    if isinstance(value, str):
        near += [value + "\0", value.upper(), value[::-1], value * 50, list(value), value[: len(value) // 2], HOSTILE]
    return drawn.choice(near) if drawn.random() < 0.4 else drawn.choice(ODD)()


def mutate_tree(tree: Any, drawn: random.Random) -> Any:
    """A copy with one to three of its values or keys changed."""
    tree = copy.deepcopy(tree)
    for _ in range(drawn.choice([1, 1, 1, 2, 3])):
        places = _places(tree)
        if not places or drawn.random() < 0.02:
            return drawn.choice(ODD)()
        node, key = drawn.choice(places)
        way = drawn.random()
        if way < 0.6:
            node[key] = _odd(node[key], drawn)
        elif way < 0.8:
            del node[key]
        elif isinstance(node, dict):
            name = drawn.choice([f"{key}x", "", str(key).upper(), "__class__", HOSTILE, "日本"])
            node[name] = node.pop(key) if way < 0.9 else drawn.choice(ODD)()
        else:
            node.append(copy.deepcopy(node[key]))
    return tree


def as_json(tree: Any, drawn: random.Random) -> bytes:
    """As JSON; sometimes with what only some writers write: NaN, a key twice, raw UTF-8 with a BOM."""
    text = json.dumps(tree, indent=drawn.choice([None, 1]), ensure_ascii=drawn.random() < 0.7)
    if isinstance(tree, dict) and tree and drawn.random() < 0.1:
        key = json.dumps(drawn.choice(list(tree)))
        text = f"{{{key}: {drawn.choice(['null', '1', '[]'])}, {text[1:]}"
    data = text.encode(errors="surrogatepass")
    return b"\xef\xbb\xbf" + data if drawn.random() < 0.03 else data


def mutate_json(data: bytes, drawn: random.Random) -> bytes:
    """A JSON file, changed in its values, or in its bytes."""
    if drawn.random() < 0.3:
        return mutate_bytes(data, drawn)
    return as_json(mutate_tree(json.loads(data), drawn), drawn)


def mutate_lines(data: bytes, drawn: random.Random) -> bytes:
    """A file of JSON lines, changed in the values of some, or in its bytes."""
    if drawn.random() < 0.4:
        return mutate_bytes(data, drawn)
    lines = data.splitlines()
    for _ in range(drawn.choice([1, 2])):
        at = drawn.randrange(len(lines))
        changed = mutate_tree(json.loads(data.splitlines()[at]), drawn)
        lines[at] = json.dumps(changed, ensure_ascii=drawn.random() < 0.7).encode(errors="surrogatepass")
    return b"\n".join(lines) + b"\n"


def mutate_safetensors(data: bytes, drawn: random.Random) -> bytes:
    """Weights, changed in the header's values or length, or in the bytes."""
    (size,) = struct.unpack("<Q", data[:8])
    way = drawn.random()
    if way < 0.3:
        return mutate_bytes(data, drawn)
    if way < 0.5:
        return struct.pack("<Q", drawn.choice([0, 1, size - 1, size + 8, 2**40, 2**63, 2**64 - 1])) + data[8:]
    header = as_json(mutate_tree(json.loads(data[8 : 8 + size]), drawn), drawn)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


# -- text ---------------------------------------------------------------------------------------------------------


def _lines_of_yaml(text: str, drawn: random.Random) -> str:
    lines = text.splitlines() or [""]
    at = drawn.randrange(len(lines))
    line = lines[at]
    key = line.partition(":")[0]
    odd = [
        f"{line}\n{line}",  # a key twice
        f"{key}: &a {{b: *a}}",
        f"{key}: &a [*a]",
        f"{key}: *nowhere",
        f"{key}: !!python/object/apply:os.getcwd []",
        f"{key}: !!int x",
        f"{key}: !!binary '####'",
        f"{key}: !!timestamp x",
        f"{key}: 2024-02-30",
        f"{key}: 2024-01-01",
        f"{key}: 1:30",
        f"{key}: .inf",
        f"{key}: .nan",
        f"{key}: 0x1F",
        f"{key}: 0o17",
        f"{key}: 1_000",
        f"{key}: 1e3",
        f"{key}: yes",
        f"{key}: {'9' * 5000}",
        f"{key}: '{'x' * 5000}'",
        f"{key}: {'[' * DEEP}{']' * DEEP}",
        f"{key}: {'{a: ' * DEEP}1{'}' * DEEP}",
        f'{key}: "\\ud800"',
        f'{key}: "\\x1b[31m\\0"',
        f"{key}: |\n    a\n    b",
        f"\t{line}",
        f" {line}",
        f"{line}\0",
        f"{line}\x1b[2J",
        f"? [1, 2]\n: x\n{line}",
        f"? {{a: b}}\n: x\n{line}",
        f"1: x\n{line}",
        f"null: x\n{line}",
        f"true: x\n{line}",
        f"2024-01-01: x\n{line}",
        f"<<: {{a: 1}}\n{line}",
        f"<<: 1\n{line}",
        f"---\n{line}",
        f"{line}\n...\n",
        f"%YAML 9.9\n---\n{line}",
        f"{line} # \u202e\u2028",
        f"{key}: {HOSTILE}",
        bombs(key),
        "",
    ]
    lines[at] = drawn.choice(odd)
    return "\n".join(lines) + "\n"


def bombs(key: str) -> str:
    """Aliases of aliases: a few hundred bytes that stand for 10^9 values."""
    anchors = [f"a0: &a0 [{', '.join('x' * 10)}]"]
    anchors += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    return "\n".join([*anchors, f"{key}: *a8"])


def mutate_yaml(tree: Any, drawn: random.Random) -> bytes:
    """A tree as YAML, changed in its values, its lines, or its bytes."""
    way = drawn.random()
    if way < 0.5:
        tree = mutate_tree(tree, drawn)
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, default_flow_style=drawn.choice([None, False]))
    if way > 0.45:
        text = _lines_of_yaml(text, drawn)
    data = text.encode(errors="surrogatepass")
    return mutate_bytes(data, drawn) if way > 0.85 else data


def mutate_template(text: str, drawn: random.Random) -> bytes:
    """A chat template that fails, or never ends, or is another one."""
    odd = [
        "{{ 1/0 }}",
        "{{ messages[99].content }}",
        "{{ nowhere.there }}",
        "{{ nowhere() }}",
        "{% for x in range(10**9) %}x{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'x' * 10**10 }}",
        "{{ 'x' * 10**6 }}",
        "{{ raise_exception('" + HOSTILE + "') }}",
        "{{ raise_exception('a\\nb') }}",
        "{{ ''.__class__.__mro__ }}",
        "{% include 'x' %}",
        "{% extends 'x' %}",
        "{% for",
        "{{ messages | tojson }}",
        "{{ messages | nofilter }}",
        "{{ strftime_now('%Y') }}",
        "{% generation %}x{% endgeneration %}",
        "{{ 10**10**8 }}",
        "\ud800",
        "\0",
        "",
    ]
    at = drawn.randrange(len(text) + 1)
    way = drawn.random()
    if way < 0.3:
        return mutate_bytes(text.encode(), drawn)
    one = drawn.choice(odd)
    return (one if way < 0.5 else text[:at] + one + text[at:]).encode(errors="surrogatepass")
