"""Contestants of `data.py tokenize`: `texts.jsonl` to ids on disk; each returns its seconds and a hash of all ids."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def write_digests(work: str, documents: Iterable[Any]) -> str:
    """One hash a line of the ids of each document, without BOS and EOS; returns the file."""
    with tempfile.NamedTemporaryFile("w", dir=work, suffix=".digests", delete=False) as file:
        for ids in documents:
            file.write(hashlib.sha256(np.asarray(ids, np.uint16).tobytes()).hexdigest() + "\n")
    return file.name


def dist_train(work: str, folder: str, processes: int) -> dict[str, Any]:
    """`dist-train prepare`, under MPI."""
    from data_shards import ShardedTokens
    from dist_train.config import PrepareConfig
    from dist_train.prepare.stage import run as prepare

    if processes > 1:
        from mpi4py import MPI

        folder = MPI.COMM_WORLD.bcast(folder)
    Path(folder, "few.jsonl").write_text('{"text": "imports"}\n' * processes)
    out = Path(folder) / "out"
    for inputs, made in ((f"{folder}/few.jsonl", Path(folder) / "few"), (f"{work}/texts.jsonl", out)):
        config = PrepareConfig(inputs=inputs, tokenizer=f"{work}/tokenizer", out=made, bos=False, shard_bytes=4 << 20)
        began = time.perf_counter()
        prepare(config)
        seconds = time.perf_counter() - began
    corpus = ShardedTokens(out)
    documents = (corpus.document(i)[:-1] for i in range(corpus.num_documents))  # without EOS
    return {"seconds": seconds, "ids": write_digests(work, documents)}


def sentencepiece(work: str, folder: str, processes: int) -> dict[str, Any]:
    """Its own batch call on every other line, ids written flat."""
    import sentencepiece

    rank, comm = 0, None
    if processes > 1:
        from mpi4py import MPI

        comm, rank = MPI.COMM_WORLD, MPI.COMM_WORLD.rank
        comm.barrier()
    began = time.perf_counter()
    model = sentencepiece.SentencePieceProcessor(model_file=f"{work}/tokenizer/tokenizer.model")
    found: list[np.ndarray[Any, Any]] = []

    def encode(lines: list[str]) -> None:
        found.extend(np.asarray(ids, np.uint16) for ids in model.encode([json.loads(line)["text"] for line in lines]))

    with Path(work, "texts.jsonl").open() as texts, Path(folder, f"ids-{rank}").open("wb") as out:
        batch: list[str] = []
        for number, line in enumerate(texts):
            if number % processes == rank:
                batch.append(line)
            if len(batch) == 1000:
                encode(batch)
                batch = []
        encode(batch)
        out.write(np.concatenate(found).tobytes())
    if comm is not None:
        comm.barrier()
    seconds = time.perf_counter() - began
    parts = comm.allgather(found) if comm is not None else [found]
    return {"seconds": seconds, "ids": write_digests(work, (ids for part in parts for ids in part))}


def datasets_map(work: str, folder: str, processes: int) -> dict[str, Any]:
    """`datasets.map(batched=True)` with transformers' fast tokenizer."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{work}/tokenizer")
    began = time.perf_counter()
    texts = datasets.load_dataset("json", data_files=f"{work}/texts.jsonl", split="train", cache_dir=folder)
    ids = texts.map(
        lambda batch: {"ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
        batched=True,
        remove_columns=["text"],
        num_proc=processes if processes > 1 else None,
    )
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "ids": write_digests(work, ids["ids"])}


def datatrove(work: str, folder: str, processes: int) -> dict[str, Any]:
    """Its reader and document tokenizer; it shares work by file, so that the text is in as many."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    lines = Path(work, "texts.jsonl").read_text().splitlines(keepends=True)
    Path(folder, "in").mkdir()
    for part in range(processes):
        Path(folder, "in", f"{part}.jsonl").write_text("".join(lines[part::processes]))
    began = time.perf_counter()
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(f"{folder}/in"),
            DocumentTokenizer(f"{folder}/out", f"{work}/tokenizer/tokenizer.json", shuffle_documents=False),
        ],
        tasks=processes,
        workers=processes,
        logging_dir=f"{folder}/log",
    ).run()
    seconds = time.perf_counter() - began
    documents: list[Any] = []
    for path in sorted(Path(folder, "out").glob("*.ds")):
        ends = np.fromfile(f"{path}.index", np.uint64).astype(int)
        documents += np.split(np.fromfile(path, np.uint16), ends)[: len(ends)]
    bos = [ids[1:] if len(ids) and ids[0] == 1 else ids for ids in documents]
    return {"seconds": seconds, "ids": write_digests(work, bos)}


TOKENIZERS = {
    "dist-train": dist_train,
    "sentencepiece": sentencepiece,
    "datasets.map": datasets_map,
    "datatrove": datatrove,
}
