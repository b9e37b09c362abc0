"""What input files are, as users have them: arrays, compressed streams, byte order marks, odd names, web addresses."""

from __future__ import annotations

import gzip
import http.server
import json
import math
import sys
import threading
import time
import tracemalloc
from contextlib import contextmanager
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards.errors import DataError, listed, shown
from data_shards.faults import KINDS, Faults
from data_shards.inputs import (
    InputFile,
    count_units,
    find_files,
    is_cut_by_size,
    place,
    plan_units,
    read_located,
    read_records,
)

NOTES = [{"text": f'Note {i}: naïve 日本 🙂 \\ " [{{', "n": i, "list": [[], {}, ["]"]]} for i in range(40)]


def records(path, unit_bytes=1 << 20):
    return [record for unit in plan_units(find_files(str(path)), unit_bytes) for record in read_records(unit)]


def skipping(path, max_bytes=50_000_000, fields=None):
    """The records that are left, and what was left out of them."""
    faults = Faults(dict.fromkeys(KINDS, "skip"), max_bytes)
    units = plan_units(find_files(str(path)))
    found = [located.record for unit in units for located in read_located(unit, faults, fields)]
    return found, [tuple(fault) for fault in faults.named]


# -- arrays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_an_array_is_read_as_json_reads_it(tmp_path, monkeypatch, indent, name):
    text = json.dumps(NOTES, indent=indent, ensure_ascii=indent is None)
    content = b"\xef\xbb\xbf \n" + text.encode() + b"\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for block in (1, 7, 100, 1 << 20):  # items and characters are cut at every place
        monkeypatch.setattr("data_shards.lines.BLOCK", block)
        assert records(tmp_path / name, unit_bytes=50) == NOTES


def test_an_array_may_be_empty_and_hold_what_python_writes(tmp_path):
    (tmp_path / "a.json").write_text(" [ ] ")
    assert records(tmp_path / "a.json") == []
    (tmp_path / "a.json").write_text(json.dumps([{"n": 1 << 80, "f": 1e-300, "x": math.inf, "h": "\ud800"}]))
    assert records(tmp_path / "a.json") == [{"n": 1 << 80, "f": 1e-300, "x": math.inf, "h": "\ud800"}]
    (tmp_path / "a.json").write_text('[1, "two", {"text": "three"}, 45678]')
    found, faults = skipping(tmp_path / "a.json")
    assert found == [{"text": "three"}]
    assert faults[1] == ("malformed", f"{tmp_path / 'a.json'}, item 2", "not a JSON object but a str")
    assert len(faults) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}, {"text": "b"', "item 2: torn off"),
        (b'[{"text": "a"}, {"text": "b', "item 2: torn off"),
        (b'[{"text": "a"}', "item 2: torn off"),
        (b'[{"text": "a"},', "item 2: torn off"),
        (b'[{"text": "a"} {"text": "b"}]', "item 2: neither a comma nor the end of the array"),
        (b'[{"text": "a"}, {text: "b"}, {"text": "long enough that this is not the end"}]', "item 2: not JSON"),
        (b'[{"text": "a"}] []', "item 2: more after the end of the array"),
        (b'[{"text": "\xff"}]', "item 1: not UTF-8"),
        (b"[" + b"[" * 100_000, "item 1: not JSON"),
        (b"[" + b"1" * 5_000 + b"]", "item 1: not JSON"),
        (b'[{"text": "a"}, {"text": "' + b"x" * 20_000, "item 2: it has more than 10,000 bytes"),
        (b'[{"text": "a"}, {"text": "' + b"x" * 20_000 + b'"}]', "item 2: it has more than 10,000 bytes"),
    ],
)
def test_an_array_that_cannot_be_read_on_is_named_with_the_item(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.json, {message}.*; mend it, or write the file with one record a line"):
        skipping(tmp_path / "a.json", max_bytes=10_000)


def test_a_long_array_is_never_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("data_shards.lines.BLOCK", 1 << 16)
    with (tmp_path / "a.json").open("w") as file:
        file.write("[" + ",".join(json.dumps({"text": "x" * 1000}) for _ in range(10_000)) + "]")
    (unit,) = plan_units(find_files(str(tmp_path / "a.json")))
    tracemalloc.start()
    assert sum(1 for _ in read_records(unit)) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_lines_in_a_file_named_json_are_lines(tmp_path):
    lines = "".join(json.dumps(note) + "\n" for note in NOTES)
    (tmp_path / "a.json").write_text(lines)
    (tmp_path / "a.jsonl").write_text(lines)
    assert records(tmp_path / "a.json", unit_bytes=100) == NOTES
    assert [(unit.start, unit.stop) for unit in plan_units(find_files(str(tmp_path / "a.json")), 100)] == [
        (unit.start, unit.stop) for unit in plan_units(find_files(str(tmp_path / "a.jsonl")), 100)
    ]
    assert is_cut_by_size("a.jsonl") and not is_cut_by_size("a.json.gz")


def test_units_are_counted_without_making_them(tmp_path):
    for name, size in (("a.jsonl", 0), ("b.jsonl", 1), ("c.txt", 100), ("d.jsonl.gz", 250), ("e.jsonl", 201)):
        (tmp_path / name).write_bytes(b"x" * size)
    files = find_files(str(tmp_path))
    assert count_units(files, 100) == len(plan_units(files, 100)) == 0 + 1 + 1 + 1 + 3
    assert count_units([InputFile("a.jsonl", 10**30)], 1) == 10**30
    assert count_units([InputFile("a.json", 3)], 1) is None


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        (
            "a.json",
            json.dumps({"data": NOTES}, indent=2),
            "(a .json file holds one array of records, or one record a line)",
        ),
        ("a.jsonl", json.dumps(NOTES, indent=2), "(a file that is one array has to be named .json)"),
    ],
)
def test_what_a_file_should_have_been_is_told(tmp_path, name, content, hint):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as error:
        records(tmp_path / name)
    assert f"{name}:1: not JSON: " in str(error.value) and hint in str(error.value)


# -- compressed ---------------------------------------------------------------------------------------------------


def zstd_frame(content, window_log):
    """A frame with a window of 2^window_log, its content as raw blocks (RFC 8878, 3.1.1)."""
    blocks = [content[at : at + 100_000] for at in range(0, len(content), 100_000)]
    headers = [(len(block) << 3 | (block is blocks[-1])).to_bytes(3, "little") for block in blocks]
    head = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([(window_log - 10) << 3])
    return head + b"".join(part for pair in zip(headers, blocks, strict=True) for part in pair)


def test_compressed_files_of_all_makes(tmp_path):
    content = "".join(json.dumps(note) + "\n" for note in NOTES).encode()
    half = content.index(b"\n", len(content) // 2) + 1
    whole = gzip.compress(content)
    files = {
        "two_members.jsonl.gz": gzip.compress(content[:half]) + gzip.compress(content[half:]),
        "padded.jsonl.gz": whole + bytes(2000),
        "long.jsonl.zst": zstd_frame(content, 31),
        "two_frames.jsonl.zst": zstd_frame(content[:half], 20) + zstd_frame(content[half:], 27),
    }
    for name, stored in files.items():
        (tmp_path / name).write_bytes(stored)
        assert records(tmp_path / name) == NOTES, name
    torn = {"torn.jsonl.gz": whole[:-20], "torn.jsonl.zst": files["long.jsonl.zst"][:-20]}
    torn |= {"junk.jsonl.gz": whole + b"junk" * 5, "junk.jsonl.zst": files["long.jsonl.zst"] + b"junk" * 5}
    for name, stored in torn.items():
        (tmp_path / name).write_bytes(stored)
        with pytest.raises(DataError, match=rf"{name}: damaged near line \d+: .*; fetch it again"):
            records(tmp_path / name)


class Endless:
    """A file without a line break that counts what is read of it."""

    def __init__(self, size):
        self.left = self.size = size

    def readline(self, most):
        return self.read(most)

    def read(self, most):
        part = b"x" * min(most, self.left)
        self.left -= len(part)
        return part

    def seek(self, to):
        self.left = self.size - to


@pytest.mark.parametrize("form", ["stream", "lines"])
def test_a_line_without_end_stops_at_once_or_is_read_over_once(form):
    from data_shards.lines import lines_in, numbered_lines

    def read(file, too_long):
        if form == "stream":
            return list(numbered_lines(file, 1000, too_long))
        return list(lines_in(file, 0, file.size, 1000, too_long))

    def stop(where):
        raise DataError(f"at {where}")

    file = Endless(1 << 30)
    with pytest.raises(DataError):
        read(file, stop)
    assert file.size - file.left < 2000
    noted = []
    file = Endless(1 << 27)
    assert read(file, noted.append) == []
    assert len(noted) == 1 and file.left == 0


def test_a_gzip_file_of_one_line_takes_time_in_proportion(tmp_path):
    """Twice the line takes twice as long, not four times; and no more memory."""
    seconds = []
    for mebibytes in (32, 128):
        with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
            for _ in range(mebibytes):
                file.write(b"x" * (1 << 20))
        began = time.process_time()
        found, faults = skipping(tmp_path / "a.jsonl.gz", max_bytes=16 << 20)
        seconds.append(time.process_time() - began)
        assert found == [] and faults[0][:2] == ("too_long", f"{tmp_path / 'a.jsonl.gz'}:1")
    assert seconds[1] < 8 * seconds[0] + 0.2


def test_a_plain_line_that_runs_through_many_units_is_read_once_for_each(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * 100_000 + b'"}\n{"text": "last"}\n')
    assert skipping(tmp_path / "a.jsonl", max_bytes=1000)[0] == [{"text": "last"}]
    units = plan_units(find_files(str(tmp_path / "a.jsonl")), 1000)
    faults = Faults(dict.fromkeys(KINDS, "skip"), 1000)
    assert [r.record for unit in units for r in read_located(unit, faults)] == [{"text": "last"}]
    assert faults.counts == {"too_long": 1}


# -- names, marks, addresses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name):
    lines = ["first \ufeff", "second"]
    text = "\r\n".join(json.dumps({"text": line}) if "json" in name else line for line in lines)
    content = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert records(tmp_path / name, unit_bytes=5) == [{"text": line} for line in lines]


def test_utf_16_is_named_as_what_it_is_not(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-16"))
    assert skipping(tmp_path / "a.jsonl")[1][0][0] == "encoding"


def test_brackets_in_a_name_are_part_of_it(tmp_path):
    for name in ("data[1].jsonl", "data1.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "set[2]").mkdir()
    (tmp_path / "set[2]" / "a.jsonl").write_text('{"text": "in a folder"}')
    assert records(tmp_path / "data[1].jsonl") == [{"text": "data[1].jsonl"}]
    assert records(f"file://{tmp_path}/data[1].jsonl") == [{"text": "data[1].jsonl"}]
    assert records(tmp_path / "set[2]") == [{"text": "in a folder"}]
    assert records(tmp_path / "data[12].jsonl") == [{"text": "data1.jsonl"}]
    assert records(tmp_path / "**") == [{"text": "data1.jsonl"}, {"text": "data[1].jsonl"}, {"text": "in a folder"}]


def test_a_web_address_is_read(tmp_path):
    pytest.importorskip("aiohttp")
    lines = "".join(json.dumps(note) + "\n" for note in NOTES)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(NOTES).encode()))
    pq.write_table(pa.Table.from_pylist([{"n": note["n"]} for note in NOTES]), tmp_path / "c.parquet")
    with served(tmp_path) as address:
        for name in ("a.jsonl", "a.jsonl?download=true", "b.json.gz"):
            assert records(f"{address}/{name}") == NOTES
        assert records(f"{address}/c.parquet") == [{"n": note["n"]} for note in NOTES]
        with pytest.raises(DataError, match=r"gone\.jsonl: no such input file"):
            records(f"{address}/gone.jsonl")
        # This server knows no ranges: it can be read from the beginning alone.
        with pytest.raises(DataError, match=r"a\.jsonl: cannot be read near byte 1000: "):
            records(f"{address}/a.jsonl", unit_bytes=1000)
    with pytest.raises(DataError, match=r"a\.jsonl: (cannot be reached|no such input file)"):
        records(f"{address}/a.jsonl")


def test_the_package_that_reads_web_addresses_is_named(tmp_path, monkeypatch):
    for name in ("aiohttp", "fsspec.implementations.http"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"^https://x/a\.jsonl: .* a package is missing: pip install 'fsspec\[http\]'$"):
        find_files("https://x/a.jsonl")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match=r"^s3://x/a\.jsonl: .* a package is missing: .*s3fs"):
        find_files("s3://x/a.jsonl")


@contextmanager
def served(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# -- Parquet ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("categories", [False, True])
def test_a_small_parquet_file_of_much_text_is_read_a_few_megabytes_at_a_time(tmp_path, categories):
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()), ["x" * (400 << 10), "y"])
    texts = repeated if categories else repeated.dictionary_decode()
    pq.write_table(pa.table({"text": texts, "n": range(256)}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 20_000
    del repeated, texts
    before = pa.total_allocated_bytes()
    held, lengths = 0, []
    tracemalloc.start()
    for record in records_of(tmp_path / "a.parquet"):
        held = max(held, pa.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[0])
        lengths.append(len(record["text"]))
    tracemalloc.stop()
    assert lengths == [400 << 10] * 256
    assert held < 60 << 20  # of 100


def records_of(path):
    return (record for unit in plan_units(find_files(str(path))) for record in read_records(unit))


def test_long_rows_and_bad_text_in_parquet_go_by_the_policy(tmp_path):
    texts = ["a", "b" * 5000, None, "c", "d" * 5001, "e"]
    ids = [[1], [2] * 2000, [], None, [3], [4]]
    pq.write_table(
        pa.table({"text": texts, "ids": pa.array(ids, pa.list_(pa.int32())), "n": range(6)}), tmp_path / "a.parquet"
    )
    found, faults = skipping(tmp_path / "a.parquet", 4000, ["text"])
    assert found == [{"text": text} for text in ("a", None, "c", "e")]
    assert faults == [
        ("too_long", f"{tmp_path / 'a.parquet'}:{row}", f"a row of {size:,} bytes")
        for row, size in ((2, 5000), (5, 5001))
    ]
    assert [fault[1:] for fault in skipping(tmp_path / "a.parquet", 4000, ["ids"])[1]] == [
        (f"{tmp_path / 'a.parquet'}:2", "a row of 8,000 bytes")
    ]
    with pytest.raises(DataError, match=r"a\.parquet:2: a row of 5,000 bytes; mend it, or take it out"):
        for unit in plan_units(find_files(str(tmp_path / "a.parquet"))):
            list(read_located(unit, Faults({}, 4000), ["text"]))

    raw = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(np.array([0, 1, 2, 3], np.int32)), pa.py_buffer(b"a\xffc")]
    )
    pq.write_table(pa.table({"text": raw}), tmp_path / "b.parquet")
    found, faults = skipping(tmp_path / "b.parquet")
    assert found == [{"text": "a"}, {"text": "c"}]
    assert faults[0][:2] == ("encoding", f"{tmp_path / 'b.parquet'}:2")


# -- messages -----------------------------------------------------------------------------------------------------


def test_lines_of_faults_are_counted_once_for_a_unit(tmp_path):
    lines = [b"{torn"] * 300
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' * 50 + b"\n".join(lines))
    units = plan_units(find_files(str(tmp_path / "a.jsonl")), 700)
    asked = Faults(dict.fromkeys(KINDS, "skip"))
    for unit in units:
        list(read_located(unit, asked))
    assert [fault.where for fault in asked.named] == [f"{tmp_path / 'a.jsonl'}:{line}" for line in range(51, 151)]
    assert asked.counts == {"malformed": 300}
    assert place(units[1], units[1].start) == f"{tmp_path / 'a.jsonl'}:51"


def test_what_data_says_cannot_move_a_terminal():
    assert shown("a\x1b[2Jb\nc") == r"a\x1b[2Jb\nc"
    assert shown("\ud800") == r"\ud800" and len(shown("x" * 10**6)) < 80
    assert listed([f"f{i}" for i in range(1000)]).endswith("f19, ...")
    assert listed(["text", "日本"]) == "text, 日本"


def test_a_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    units = plan_units(find_files(str(tmp_path / "a.jsonl")))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read near byte 0: No such file or directory; mend that"):
        list(read_records(units[0]))
