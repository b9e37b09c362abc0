"""The other commands: the demo, tokenizers, checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_train.cli.parser import add, processes
from dist_train.cli.stages import end
from dist_train.errors import UserError, printable

# -- demo -------------------------------------------------------------------------------------------------------


def add_demo(commands: argparse._SubParsersAction) -> None:
    """`demo`: the whole method at small scale."""
    parser = add(
        commands,
        "demo",
        "run the whole method at small scale, and write a report",
        "dist-train demo --out demo-run",
        _run_demo,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo-run"), help="folder of everything made; goes on if killed"
    )
    parser.add_argument("--nproc", type=processes, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument("--corpus", help="text to pretrain on: JSONL with a text field, instead of docstrings")
    parser.add_argument(
        "--seeds", help="instructions: JSONL with a prompt field, instead of questions made from the corpus"
    )
    parser.add_argument(
        "--target", help="a real chat model: hub id, Hugging Face folder or GGUF file, instead of one trained here"
    )
    parser.add_argument("--minutes", type=float, help="with --target: how long the demo takes (default 30)")
    parser.add_argument(
        "--scale", type=float, help="without --target: share of the training steps; 0.02 is a smoke test"
    )


def _run_demo(options: argparse.Namespace) -> int:
    from dist_train.demo.run import Demo, run_demo
    from dist_train.demo.timed import TimedDemo

    common = {"processes": options.nproc, "corpus": options.corpus, "seeds": options.seeds}
    if options.target is None:
        if options.minutes is not None:
            raise UserError("--minutes: the demo without --target has its own length; --scale shortens it")
        return run_demo(Demo(options.out, **common, scale=1.0 if options.scale is None else options.scale))
    if options.scale is not None:
        raise UserError("--scale: with --target the demo takes --minutes")
    return run_demo(TimedDemo(options.out, **common, target=options.target, minutes=options.minutes or 30.0))


# -- tokenizer --------------------------------------------------------------------------------------------------


def add_tokenizer(commands: argparse._SubParsersAction) -> None:
    """`tokenizer`: train and compare."""
    group = add(
        commands,
        "tokenizer",
        "train a Llama-2-style tokenizer, or compare two",
        "dist-train tokenizer check tokenizer.model meta-llama/Llama-2-7b-chat-hf",
        lambda options: None,
    )
    actions = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = add(
        actions,
        "train",
        "train a sentencepiece model with Llama 2's settings",
        "dist-train tokenizer train 'corpus/*.jsonl' --vocab-size 32000 --out tokenizer",
        _train_tokenizer,
    )
    train.add_argument("inputs", nargs="+", help="JSONL, Parquet or text, as for prepare")
    train.add_argument("--vocab-size", type=int, default=32_000)
    train.add_argument("--text-field", default="text")
    train.add_argument(
        "--chat-template", default="llama2", metavar="FILE", help="Jinja file, or llama2 (default), written beside it"
    )
    train.add_argument("--out", type=Path, required=True, help="folder for tokenizer.model and its conversions")
    check = add(
        actions,
        "check",
        "tell whether a drafter trained with A can draft for a target served with B",
        "dist-train tokenizer check tokenizer.model meta-llama/Llama-2-7b-chat-hf",
        _check_tokenizers,
    )
    check.add_argument("a", help="sentencepiece file, Hugging Face folder or hub id")
    check.add_argument("b", help="another")
    check.add_argument("--texts", nargs="+", default=[], help="compare on these documents too: JSONL, Parquet, text")
    check.add_argument("--text-field", default="text")


def _train_tokenizer(options: argparse.Namespace) -> None:
    from data_shards.inputs import read_texts
    from dist_train.tokenizer import train_tokenizer

    texts = read_texts(options.inputs, options.text_field)
    tokenizer = train_tokenizer(texts, options.out, options.vocab_size, chat_template=options.chat_template)
    print(f"tokenizer: {tokenizer.vocab_size:,} pieces, chat template {options.chat_template}; {options.out}")


def _check_tokenizers(options: argparse.Namespace) -> int:
    from data_shards.inputs import read_texts
    from dist_train.tokenizer import PROBES, conversion_note, differences, load_tokenizer

    a, b = load_tokenizer(options.a), load_tokenizer(options.b)
    texts = [*PROBES, *read_texts(options.texts, options.text_field)]
    found = differences(a, b, texts)
    for line in (*found, *filter(None, {conversion_note(tokenizer, texts) for tokenizer in (a, b)})):
        print(printable(line))
    print("different: a drafter cannot be shared" if found else "equal: a drafter trained with A drafts for B")
    return 1 if found else 0


# -- checkpoints ------------------------------------------------------------------------------------------------


def add_checkpoint(commands: argparse._SubParsersAction) -> None:
    """`checkpoint ls`, `checkpoint verify` and `checkpoint convert`."""
    group = add(
        commands,
        "checkpoint",
        "list the checkpoints of a run, verify every byte of them, or convert one for DeepSpeed",
        "dist-train checkpoint verify runs/pretrain",
        lambda options: None,
    )
    actions = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = add(actions, "ls", "list them", "dist-train checkpoint ls runs/pretrain", _list_checkpoints)
    verifying = add(
        actions,
        "verify",
        "compare every byte with its checksum",
        "dist-train checkpoint verify runs/pretrain",
        _list_checkpoints,
    )
    converting = add(
        actions,
        "convert",
        "write the newest one as DeepSpeed itself saves it, for N ranks (dist-train needs no converting to go on)",
        "dist-train checkpoint convert runs/pretrain --out converted --deepspeed zero1 --nproc 4",
        _convert_checkpoint,
    )
    for parser in (listing, verifying, converting):
        parser.add_argument("run", type=Path, help="run folder")
    converting.add_argument("--out", type=Path, required=True, help="new folder")
    converting.add_argument("--deepspeed", default="zero1", help="name in ds_configs or path of a DeepSpeed JSON")
    converting.add_argument("--nproc", type=processes, default=1, metavar="N", help="ranks that will load it")


def _list_checkpoints(options: argparse.Namespace) -> int:
    from data_shards.errors import DataError
    from dist_train.runtime.run_folder import list_checkpoints, read_manifest, verify

    folders = list_checkpoints(options.run)
    if not folders:
        raise UserError(f"{options.run}: no checkpoint here")
    damaged = 0
    for folder in folders:
        try:
            manifest = read_manifest(folder)
        except DataError as error:
            damaged += 1
            print(f"{folder.name}  {error}")
            continue
        size = sum(record["bytes"] for record in manifest["files"].values())
        ranks = manifest["world_size"]
        line = f"{folder.name}  {size / 2**20:.1f} MiB  written by {ranks} rank{'s' if ranks > 1 else ''}"
        misfits = verify(folder) if options.action == "verify" else []
        damaged += bool(misfits)
        whole = "whole" if options.action == "verify" else ""
        print(f"{line}  {'; '.join(misfits) or whole}".rstrip())
    return 1 if damaged else 0


def _convert_checkpoint(options: argparse.Namespace) -> int:
    from dist_train.runtime.launch import launch
    from dist_train.train.convert import check, convert

    config = check(options.run, options.out, options.deepspeed)
    if options.nproc > 1:
        words = ["checkpoint", "convert", options.run, "--out", options.out, "--deepspeed", options.deepspeed]
        return launch([str(word) for word in words], options.nproc)
    convert(config, options.run, options.out, options.deepspeed)
    return end(0)
