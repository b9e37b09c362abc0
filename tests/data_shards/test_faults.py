"""Records that cannot be used: stopped at, or left out, each named with file and line; and two runs at once."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards import ShardedTokens
from data_shards.inputs import find_files, plan_units, read_records

GOOD = [json.dumps({"text": f"document {i} of the corpus"}).encode() for i in range(30)]
FAULTY = {
    "malformed": (b'{"text": "torn', "not JSON"),
    "encoding": (b'{"text": "\xff\xfe"}', "not UTF-8"),
    "too_long": (json.dumps({"text": "long " * 1000}).encode(), "a line of more than 2,000 bytes"),
    "empty": (b'{"text": ""}', "no text"),
}
HALF_A_PAIR = b'{"text": "half \\ud83d of a pair"}'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from dist_train.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["some documents of the corpus and a few words more, 0123456789"] * 30, folder, 320)
    return folder


def arguments(inputs, tokenizer, out, *more):
    keys = [f"inputs={inputs}", f"tokenizer={tokenizer}", f"out={out}", "shard_bytes=300", *more]
    return ["prepare", *keys, "faults.max_bytes=2000"]


def write(path, lines):
    content = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("kind", FAULTY)
def test_a_fault_stops_or_is_left_out_and_named_with_its_line(refused, command, tokenizer, tmp_path, kind, name):
    line, reason = FAULTY[kind]
    write(tmp_path / name, [*GOOD[:17], line, *GOOD[17:]])
    where = f"{tmp_path / name}:18: "
    complaint = refused(*arguments(tmp_path, tokenizer, tmp_path / "stopped", f"faults.{kind}=stop"))
    assert where in complaint and reason in complaint and f"faults.{kind}=skip" in complaint

    out = tmp_path / "skipped"
    code, said, _ = command(*arguments(tmp_path / name, tokenizer, out, f"faults.{kind}=skip"))
    assert code == 0
    assert f"left out ({kind}): {where}" in said and f"1 {kind.replace('_', ' ')} left out" in said
    assert ShardedTokens(out).num_documents == len(GOOD)
    # The corpus is that of the file without the line.
    (tmp_path / "good").mkdir()
    write(tmp_path / "good" / name, GOOD)
    assert command(*arguments(tmp_path / "good", tokenizer, tmp_path / "clean"))[0] == 0
    assert ShardedTokens(out)[:].tolist() == ShardedTokens(tmp_path / "clean")[:].tolist()


def test_half_a_surrogate_pair_is_an_encoding_fault(refused, tokenizer, tmp_path):
    write(tmp_path / "a.jsonl", [GOOD[0], HALF_A_PAIR])
    complaint = refused(*arguments(tmp_path / "a.jsonl", tokenizer, tmp_path / "out"))
    assert f"{tmp_path / 'a.jsonl'}:2: not Unicode" in complaint


def test_faults_are_the_same_for_any_number_of_ranks(cli, command, tokenizer, tmp_path):
    lines = [line for i in range(4) for line in (*GOOD, *(FAULTY[kind][0] for kind in list(FAULTY)[i:]))]
    write(tmp_path / "a.jsonl", lines)
    skip = [f"faults.{kind}=skip" for kind in FAULTY]
    assert command(*arguments(tmp_path / "a.jsonl", tokenizer, tmp_path / "1", *skip))[0] == 0
    cli(*arguments(tmp_path / "a.jsonl", tokenizer, tmp_path / "3", *skip), "--nproc", 3)
    assert {p.name: p.read_bytes() for p in (tmp_path / "1").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "3").iterdir()
    }
    counts = [shard["faults"]["counts"] for shard in ShardedTokens(tmp_path / "1").index["shards"]]
    assert sum(sum(count.values()) for count in counts) == 4 + 3 + 2 + 1


def test_a_torn_gzip_file_is_named(refused, tokenizer, tmp_path):
    write(tmp_path / "a.jsonl.gz", GOOD * 50)
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    complaint = refused(*arguments(tmp_path / "a.jsonl.gz", tokenizer, tmp_path / "out"))
    assert "a.jsonl.gz: damaged near line" in complaint and "fetch it again" in complaint


def test_a_torn_or_empty_parquet_file_is_named_and_an_empty_line_file_has_no_lines(refused, tokenizer, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "a.jsonl", GOOD)
    (folder / "b.jsonl").touch()
    assert {unit.path for unit in plan_units(find_files(str(folder)))} == {str(folder / "a.jsonl")}
    for content in (b"no parquet", b""):
        (folder / "c.parquet").write_bytes(content)
        complaint = refused(*arguments(folder, tokenizer, tmp_path / "out"))
        assert "c.parquet: not a Parquet file" in complaint and "; fetch or write it again, or take it" in complaint


def test_parquet_is_cut_at_row_groups_and_only_the_text_is_read(tmp_path):
    texts = [f"row {i}" for i in range(1000)]
    table = pa.table({"text": texts, "other": [b"x" * 1000] * 1000})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    units = plan_units(find_files(str(tmp_path / "a.parquet")), 2_000)
    assert len(units) == 10
    assert [record["text"] for unit in units for record in read_records(unit)] == texts

    from data_shards.faults import STRICT
    from data_shards.inputs import place, read_located

    located = list(read_located(units[3], STRICT, ["text"]))
    assert [found.record for found in located] == [{"text": text} for text in texts[300:400]]
    assert place(units[3], located[0].where).endswith("a.parquet:301")


def test_a_url_is_read_as_a_file(tmp_path):
    """fsspec's `file://` stands for `hf://` and `s3://`."""
    write(tmp_path / "a.jsonl", GOOD)
    write(tmp_path / "b.jsonl.gz", GOOD)
    for pattern in ("a.jsonl", "b.jsonl.gz", "*.jsonl"):
        units = plan_units(find_files(f"file://{tmp_path}/{pattern}"), 200)
        assert [record for unit in units for record in read_records(unit)] == [json.loads(line) for line in GOOD]


def test_two_runs_at_once_make_one_whole_corpus(command, tokenizer, tmp_path):
    write(tmp_path / "a.jsonl", GOOD * 100)
    assert command(*arguments(tmp_path / "a.jsonl", tokenizer, tmp_path / "alone"))[0] == 0
    line = [
        sys.executable,
        "-m",
        "dist_train",
        *map(str, arguments(tmp_path / "a.jsonl", tokenizer, tmp_path / "both")),
    ]
    runs = [subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) for _ in range(3)]
    for run in runs:
        _, complaint = run.communicate(timeout=120)
        assert run.returncode == 0, complaint.decode()
    corpus = ShardedTokens(tmp_path / "both")
    corpus.verify()
    assert {p.name: p.read_bytes() for p in (tmp_path / "both").iterdir() if p.name.startswith(("shard", "index"))} == {
        p.name: p.read_bytes() for p in (tmp_path / "alone").iterdir()
    }


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_ten_gigabytes_in_one_compressed_file_stay_below_one_gibibyte_of_memory(tokenizer, tmp_path):
    line = json.dumps({"text": "some documents of the corpus and a few words more " * 40}).encode() + b"\n"
    with pa.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as stream:
        for _ in range(10 * 2**30 // (len(line) * 1000)):
            stream.write(line * 1000)
    command = ["prepare", f"inputs={tmp_path / 'a.jsonl.zst'}", f"tokenizer={tokenizer}", f"out={tmp_path / 'out'}"]
    subprocess.run([sys.executable, "-m", "dist_train", *command], check=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2**20
