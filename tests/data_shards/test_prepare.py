"""Parallel tokenization: identical bytes for any number of ranks, nothing lost by a kill, faults named."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece

from data_shards import ShardedTokens
from data_shards.inputs import find_files, plan_units, read_records
from data_shards.packing import pack_documents

MPIEXEC = Path(sys.executable).parent / "mpiexec"
TEXTS = [f"Document {i}:  two spaces,\ta tab and {i * i} — naïve 日本 🙂" + " word" * (i % 50) for i in range(600)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A trained model and sentencepiece itself as the reference."""
    from dist_train.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, folder, 340)
    return folder, sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture
def inputs(tmp_path):
    """The texts as plain, gzip and zstd JSONL, Parquet and text, a fifth each."""
    parts = [TEXTS[i::5] for i in range(5)]
    lines = ["".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part) for part in parts]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text(lines[0])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines[1].encode()))
    with pa.output_stream(str(folder / "c.jsonl.zst"), compression="zstd") as stream:
        stream.write(lines[2].encode())
    pq.write_table(pa.table({"text": parts[3]}), folder / "d.parquet")
    (folder / "e.txt").write_text("".join(f"{text}\n" for text in parts[4]))
    return folder, [text for part in parts for text in part]


def prepare(inputs, tokenizer, out, ranks=1, expect=0, unit_bytes=8_000, **options):
    arguments = [f"inputs={inputs}", f"tokenizer={tokenizer}", f"out={out}", f"shard_bytes={unit_bytes}"]
    arguments += [f"{key}={value}" for key, value in options.items()]
    launcher = [str(MPIEXEC), "-n", str(ranks)] if ranks > 1 else []
    command = [*launcher, sys.executable, "-m", "dist_train", "prepare", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == expect, done.stderr
    return done


def test_ids_are_sentencepieces_own_between_bos_and_eos(inputs, tokenizer, tmp_path):
    folder, texts = inputs
    prepare(folder, tokenizer[0], tmp_path / "out")
    corpus = ShardedTokens(tmp_path / "out")
    corpus.verify()
    found = [corpus.document(i).tolist() for i in range(corpus.num_documents)]
    assert found == [[1, *ids, 2] for ids in tokenizer[1].encode(texts)]


def test_bytes_are_the_same_for_1_2_3_and_7_ranks(inputs, tokenizer, tmp_path):
    folder, _ = inputs
    for ranks in (1, 2, 3, 7):
        prepare(folder, tokenizer[0], tmp_path / str(ranks), ranks)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "1").iterdir()}
    assert len(ShardedTokens(tmp_path / "1").index["shards"]) > 5
    for ranks in (2, 3, 7):
        assert {path.name: path.read_bytes() for path in (tmp_path / str(ranks)).iterdir()} == expected


def damage(kind, folder):
    """One byte of one file, a whole file, or the tail of the index."""
    path = folder / ("index.json" if "index" in kind else "shard-00001.tokens")
    data = bytearray(path.read_bytes())
    if kind == "a missing file":
        path.unlink()
    elif kind == "a wrong size":
        path.write_bytes(data + b"x")
    elif kind == "a truncated index":
        path.write_bytes(data[:-100])
    elif kind == "another type in the index":
        path.write_bytes(data.replace(b'"vocab_size": 340', b'"vocab_size": 70000'))
    else:
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    return path.name


@pytest.mark.parametrize(
    "kind", ["a flipped byte", "a missing file", "a wrong size", "a truncated index", "another type in the index"]
)
def test_verify_names_what_is_damaged(inputs, tokenizer, tmp_path, command, kind):
    prepare(inputs[0], tokenizer[0], tmp_path / "out")
    code, out, _ = command("prepare", "--verify", f"out={tmp_path / 'out'}", f"tokenizer={tokenizer[0]}")
    assert code == 0
    assert f"{len(inputs[1])} documents, every byte as written" in out
    name = damage(kind, tmp_path / "out")
    code, _, err = command("prepare", "--verify", f"out={tmp_path / 'out'}")
    assert code == 2
    assert name in err
    assert err.count("\n") == 1


def test_verify_by_two_ranks_names_every_damaged_file(inputs, tokenizer, tmp_path):
    prepare(inputs[0], tokenizer[0], tmp_path / "out")
    names = ["shard-00000.tokens", "shard-00001.offsets"]
    for name in names:
        path = tmp_path / "out" / name
        data = bytearray(path.read_bytes())
        data[3] ^= 1
        path.write_bytes(data)
    command = [str(MPIEXEC), "-n", "2", sys.executable, "-m", "dist_train", "prepare", "--verify"]
    done = subprocess.run([*command, f"out={tmp_path / 'out'}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert all(f"{name} has another checksum" in done.stderr for name in names), done.stderr


def test_verify_names_another_tokenizer(inputs, tokenizer, tmp_path, command):
    from dist_train.tokenizer import train_tokenizer

    prepare(inputs[0], tokenizer[0], tmp_path / "out")
    train_tokenizer(TEXTS[::2], tmp_path / "other", 330)
    code, _, err = command("prepare", "--verify", f"out={tmp_path / 'out'}", f"tokenizer={tmp_path / 'other'}")
    assert code == 2
    assert "made with another tokenizer" in err


def test_a_dataset_is_read_as_datasets_resolves_it(inputs, tokenizer, tmp_path, command):
    import datasets

    folder = tmp_path / "dataset"
    for split, texts in (("train", TEXTS[:400]), ("test", TEXTS[400:])):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": texts}), folder / "data" / f"{split}-00000-of-00001.parquet")
    expected = datasets.load_dataset(str(folder), split="test", cache_dir=str(tmp_path / "cache"))["text"]
    words = [f"dataset={{path: {folder}, split: test}}", f"tokenizer={tokenizer[0]}", f"out={tmp_path / 'out'}"]
    code, _, err = command("prepare", *words)
    assert code == 0, err
    corpus = ShardedTokens(tmp_path / "out")
    found = [corpus.document(i).tolist() for i in range(corpus.num_documents)]
    assert found == [[1, *ids, 2] for ids in tokenizer[1].encode(list(expected))]

    code, _, err = command("prepare", f"dataset={{path: {folder}, split: dev}}", *words[1:])
    assert code == 2
    assert "no files for split 'dev'; it has train, test" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tokenizer=t"], "inputs is required"),
        (["inputs=x"], "tokenizer is required"),
        (["inputs=x", "dataset={path: y}", "tokenizer=t"], "not both"),
    ],
)
def test_what_is_missing_is_asked_for(words, message, command):
    code, _, err = command("prepare", "out=o", *words)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_started_again_gives_the_same_bytes(tokenizer, tmp_path, ranks):
    kill_and_rerun(tokenizer, tmp_path, ranks, kills=3)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_fifty_kills(tokenizer, tmp_path):
    kill_and_rerun(tokenizer, tmp_path, 2, kills=50)


def kill_and_rerun(tokenizer, tmp_path, ranks, kills):
    """SIGKILL to all ranks at a random moment of each of `kills` runs, then a rerun to the end."""
    lines = [json.dumps({"text": text * 40}) + "\n" for text in TEXTS]
    (tmp_path / "big.jsonl").write_text("".join(lines))
    prepare(tmp_path / "big.jsonl", tokenizer[0], tmp_path / "whole", ranks, unit_bytes=20_000)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    drawn = random.Random(ranks)
    interrupted = 0
    for kill in range(kills):
        out = tmp_path / f"killed-{kill}"
        command = [str(MPIEXEC), "-n", str(ranks), sys.executable, "-m", "dist_train", "prepare"]
        command += [f"inputs={tmp_path / 'big.jsonl'}", f"tokenizer={tokenizer[0]}", f"out={out}", "shard_bytes=20000"]
        running = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while not (out / "plan.json").exists() and running.poll() is None:
            time.sleep(0.005)
        time.sleep(drawn.random() * 0.3)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        interrupted += not (out / "index.json").exists()
        prepare(tmp_path / "big.jsonl", tokenizer[0], out, ranks, unit_bytes=20_000)
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".tmp"} == whole
    assert interrupted, "every kill came too late to interrupt anything"


def test_a_finished_corpus_is_left_alone_and_another_is_refused(inputs, tokenizer, tmp_path):
    folder, _ = inputs
    prepare(folder, tokenizer[0], tmp_path / "out")
    before = (tmp_path / "out" / "index.json").stat().st_mtime_ns
    prepare(folder, tokenizer[0], tmp_path / "out")
    assert (tmp_path / "out" / "index.json").stat().st_mtime_ns == before
    done = prepare(folder, tokenizer[0], tmp_path / "out", expect=2, eos=False)
    assert "other inputs or settings" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "good"}\n{"text": torn\n', r"bad.jsonl:2: not JSON"),
        ('{"body": "no text"}\n', r"bad.jsonl:1: the record has no text in 'text'; its fields are body"),
        ('["a list"]\n', r"bad.jsonl:1: not a JSON object but a list"),
        ("", r"bad.jsonl: the input is empty"),
        ('{"text": ""}\n', r"bad.jsonl: no documents in the input"),
    ],
)
def test_faulty_input_is_one_line_that_names_it(tokenizer, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    for ranks in (1, 2):
        done = prepare(tmp_path / "bad.jsonl", tokenizer[0], tmp_path / f"out{ranks}", ranks, expect=2)
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_missing_input_is_named(tokenizer, tmp_path):
    done = prepare(tmp_path / "nothing.jsonl", tokenizer[0], tmp_path / "out", expect=2)
    assert done.stderr == f"dist-train prepare: {tmp_path / 'nothing.jsonl'}: no such input file; check inputs\n"


def test_a_full_disk_is_one_clear_line_and_nothing_half_written_counts(tokenizer, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small]).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        (tmp_path / "big.jsonl").write_text((json.dumps({"text": " ".join(TEXTS)}) + "\n") * 4)
        done = prepare(tmp_path / "big.jsonl", tokenizer[0], small / "out", expect=2)
        assert "No space left on device; free space" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (small / "out" / "index.json").exists()
    finally:
        subprocess.run(["umount", small], check=True)


def test_units_cover_every_line_once(tmp_path):
    lines = [json.dumps({"text": "x" * (i % 37)}) for i in range(500)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for unit_bytes in (1, 10, 100, 1000, 10**6):
        units = plan_units(find_files(str(tmp_path / "a.jsonl")), unit_bytes)
        found = [record for unit in units for record in read_records(unit)]
        assert found == [json.loads(line) for line in lines]


# -- conversations ----------------------------------------------------------------------------------------------


def test_packs_hold_every_document_once_and_no_more_than_fits():
    drawn = random.Random(0)
    lengths = [drawn.randrange(1, 130) for _ in range(2000)]
    packs = pack_documents(lengths, 100)
    assert sorted(document for pack in packs for document in pack) == list(range(2000))
    assert all(sum(lengths[i] for i in pack) <= 100 for pack in packs if len(pack) > 1)
    fewest = sum(min(length, 100) for length in lengths) / 100
    assert len(packs) < 1.1 * fewest


def test_packed_conversations_train_on_responses_only(tokenizer, tmp_path):
    from data_shards import Source, TokenLoader

    folder, reference = tokenizer
    pairs = [(f"What is {i}?", f"It is document {i}." * (i % 4)) for i in range(40)]
    records = [json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in pairs]
    (tmp_path / "chat.jsonl").write_text("".join(records))
    prepare(tmp_path / "chat.jsonl", folder, tmp_path / "out", format="chat", sequence_length=150)
    loader = TokenLoader(
        [Source(ShardedTokens(tmp_path / "out"))], sequence_length=150, global_batch=1, micro_batch=1, seed=0
    )
    expected = []
    for prompt, response in pairs:
        if response:
            before = [1, *reference.encode(f"[INST] {prompt} [/INST]")]
            expected.append((before, [*reference.encode(response), 2]))
    found = []
    for step in range(ShardedTokens(tmp_path / "out").num_packs):
        (batch,) = loader.step(step)
        ids, labels, mask, positions = (array[0] for array in batch)
        starts = [int(i) for i in range(150) if positions[i] == 0]
        for start, stop in zip(starts, [*starts[1:], 150], strict=True):
            document = [int(ids[start]), *labels[start:stop][: stop - start].tolist()]
            trained = [int(label) for label, m in zip(labels[start:stop], mask[start:stop], strict=True) if m]
            if trained:
                found.append((document[: document.index(2) + 1] if 2 in document else document, trained))
    key = sorted
    assert key(found) == key((before + after, after) for before, after in expected)
