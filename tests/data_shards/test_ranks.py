"""What one rank raises ends all ranks at once, with one line: under a real mpiexec."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_shards.errors import DataError
from data_shards.ranks import Alone, together

MPIEXEC = Path(sys.executable).parent / "mpiexec"

# Rank 1 raises while the others have minutes of work before them; it writes down when.
PROGRAM = """
import sys, time
from pathlib import Path
from mpi4py import MPI
from dist_train.cli import main
from dist_train.prepare import encoders, stage

RANK, moment = MPI.COMM_WORLD.rank, Path(sys.argv[2])

def fail(*_, **__):
    moment.write_text(str(time.time()))
    {failure}

def slow_or_failing(self, records):
    if RANK == 1:
        fail()
    time.sleep(0.2)
    return encode(self, records)

encode, load = encoders.TextEncoder.__call__, stage.load_tokenizer
if sys.argv[1] == "at work":
    encoders.TextEncoder.__call__ = slow_or_failing
elif RANK == 1:
    stage.load_tokenizer = fail
sys.exit(main(["prepare", *sys.argv[3:]]))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    from dist_train.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("corpus")
    train_tokenizer(["some documents of the corpus and a few words more, 0123456789"] * 30, folder / "tokenizer", 320)
    lines = [json.dumps({"text": f"document {i} of the corpus"}) + "\n" for i in range(6000)]
    (folder / "a.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.parametrize(
    ("ranks", "when", "failure", "code", "message"),
    [
        (2, "at work", "raise TypeError('object of type float has no len()')", 2, "rank 1: TypeError: object of type"),
        (4, "at work", "raise TypeError('object of type float has no len()')", 2, "rank 1: TypeError: object of type"),
        (4, "before", "raise FileNotFoundError(2, 'gone')", 2, "rank 1: FileNotFoundError: [Errno 2] gone"),
        (2, "at work", "raise SystemExit(3)", 2, "rank 1: SystemExit: 3"),
        (2, "at work", "raise KeyboardInterrupt", 130, ""),
    ],
)
def test_whatever_a_rank_raises_ends_all_within_ten_seconds(corpus, tmp_path, ranks, when, failure, code, message):
    arguments = [f"inputs={corpus / 'a.jsonl'}", f"tokenizer={corpus / 'tokenizer'}", f"out={tmp_path / 'out'}"]
    program = PROGRAM.replace("{failure}", failure)
    line = [MPIEXEC, "-n", ranks, sys.executable, "-c", program, when, tmp_path / "moment", *arguments]
    # A unit a few records: thousands of batches, each of a fifth of a second.
    done = subprocess.run([*map(str, line), "shard_bytes=100"], capture_output=True, text=True, timeout=120)
    assert time.time() - float((tmp_path / "moment").read_text()) < 10
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code == 2:
        assert done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_text_that_is_none_ends_all_ranks_with_its_line(corpus, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a fine line"}\n' * 40 + '{"text": NaN}\n')
    words = [f"inputs={tmp_path / 'a.jsonl'}", f"tokenizer={corpus / 'tokenizer'}", f"out={tmp_path / 'out'}"]
    line = [MPIEXEC, "-n", 2, sys.executable, "-m", "dist_train", "prepare", *words, "shard_bytes=100"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"{tmp_path / 'a.jsonl'}:41: the record has no text in 'text' but a value of type float" in done.stderr
    assert done.stderr.count("\n") == 1


def test_failures_within_failures_are_told_once():
    def inner():
        raise DataError("a.jsonl:3: torn")

    with pytest.raises(DataError, match=r"^a\.jsonl:3: torn$"):
        together(Alone(), lambda: together(Alone(), inner))
    assert together(Alone(), lambda: together(Alone(), lambda: 5)) == 5
