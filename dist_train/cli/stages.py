"""The commands that read a configuration."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from dist_train.api.run import launch_stage, resolved, run
from dist_train.api.stages import SERVED, Stage
from dist_train.cli.parser import add, processes
from dist_train.errors import UserError, without_passwords
from dist_train.runtime.world import find_world

RESUME = {"--resume": ("run.resume=must", "an error if there is nothing to resume")}
VERIFY = {"--verify": ("verify=true", "compare every byte of the corpus `out` with its checksums; make nothing")}
CHECK = {"--check": ("check={}", "check the folder `drafter` against TARGET, a folder or hub id; write nothing")}


class Command(NamedTuple):
    """What the command line says of a stage. `flags`: option to the override that it stands for, and its help; `{}` in
    it is where the option's value goes.
    """

    summary: str
    example: str
    flags: Mapping[str, tuple[str, str]] = MappingProxyType({})


COMMANDS = {
    "prepare": Command(
        "tokenize text or conversations into shards",
        "dist-train prepare inputs='corpus/*.jsonl.zst' tokenizer=tokenizer.model out=shards/corpus --nproc 8",
        VERIFY,
    ),
    "pretrain": Command(
        "train a drafter on a text corpus, with the target in the loop if one is named",
        "dist-train pretrain pretrain.yaml train.learning_rate=3e-4 --nproc 8",
        RESUME,
    ),
    "generate": Command(
        "let the target answer seed instructions",
        "dist-train generate target.path=meta-llama/Llama-2-7b-chat-hf seeds.inputs=oig.jsonl out=answers --nproc 8",
    ),
    "distill": Command(
        "fine-tune a drafter against the target's distributions",
        "dist-train distill distill.yaml objective='{tvdpp: 1.0}' --nproc 8",
        RESUME,
    ),
    "evaluate": Command(
        "measure block efficiency, memory-bound speed-up and token rate",
        "dist-train evaluate target.path=llama-2-7b-chat drafters='{base: runs/pretrain, tvdpp: runs/tvdpp}' "
        "tasks='[{preset: dolly, inputs: dolly.jsonl}]' out=results",
    ),
    "export": Command(
        "write a drafter as a Hugging Face folder that servers load",
        "dist-train export drafter=runs/tvdpp target.path=meta-llama/Llama-2-7b-chat-hf out=llama-2-7b-chat-drafter",
        CHECK,
    ),
}


def add_stage(commands: argparse._SubParsersAction, stage: Stage) -> None:
    """The command of a stage."""
    summary, example, flags = COMMANDS[stage.name]
    parser = add(commands, stage.name, summary, example, _run_stage)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG.yaml | section.key=value",
        help="a configuration file, then overrides; overrides alone will do",
    )
    parser.add_argument("--nproc", type=processes, metavar="N", help="start N processes on this machine")
    parser.add_argument(
        "--dry-run", action="store_true", help="print configuration, world and memory estimate, check; stop"
    )
    for flag, (override, text) in flags.items():
        if "{}" in override:
            parser.add_argument(flag, dest="flags", action="append", type=override.format, metavar="TARGET", help=text)
        else:
            parser.add_argument(flag, dest="flags", action="append_const", const=override, help=text)
    parser.stage = stage
    parser.set_defaults(stage=stage, flags=None)
    if stage.name == "evaluate":
        _add_evaluate_modes(parser)


def _add_evaluate_modes(parser: argparse.ArgumentParser) -> None:
    """What `evaluate` does besides evaluating."""
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="RESULTS",
        help="differences between finished results folders, with intervals: FOLDER, FOLDER:DRAFTER, or "
        "METHOD=FOLDER,FOLDER,... for several training runs; out=DIR before it keeps them",
    )
    parser.add_argument(
        "--server",
        metavar="URL",
        help="measure on a vLLM server, by its own counters; also takes beside=RESULTS, model, concurrency, timeout",
    )
    parser.add_argument(
        "--serve",
        choices=["vllm", "llama.cpp"],
        help="evaluate, then start this server with each drafter and without one, and measure it on the same prompts; "
        "as serve.engine=",
    )
    parser.set_defaults(function=_run_evaluate)


def _run_evaluate(options: argparse.Namespace) -> int:
    if options.compare and options.server is not None:
        raise UserError("--compare and --server: one at a time; compare what is in results folders")
    if options.serve is not None and (options.compare or options.server is not None):
        other = "--compare" if options.compare else "--server"
        raise UserError(f"--serve and {other}: one at a time; --serve starts a server, --server asks one that runs")
    if options.compare:
        if options.dry_run or (options.nproc or 1) > 1:
            flag = "--dry-run" if options.dry_run else f"--nproc {options.nproc}"
            raise UserError(f"{flag}: --compare only reads results, in one process; leave it out")
        from dist_train.evaluate.compare import compare

        words = dict(word.split("=", 1) for word in options.words if "=" in word)
        if strays := [word for word in options.words if not word.startswith("out=")]:
            raise UserError(f"--compare: takes results folders and out=DIR, not {strays[0]!r}")
        compare(options.compare, Path(words["out"]) if "out" in words else None)
        return 0
    if options.server is not None:
        if not options.server:
            raise UserError("--server: needs the address of a server, such as http://node7:8000")
        options.stage = SERVED
        options.words.append(f"server={options.server}")
    if options.serve is not None:
        options.words.append(f"serve.engine={options.serve}")
    return _run_stage(options)


def end(code: int) -> int:
    """The exit code of a command; where several ranks ran it, the process ends here.

    All is written. What PyTorch's communication threads do while the interpreter goes down can abort a process, and a
    finished run would count as failed.
    """
    if find_world().size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run_stage(options: argparse.Namespace) -> int:
    stage: Stage = options.stage
    words = [*options.words, *(options.flags or [])]
    if options.dry_run:
        return _dry_run(stage, words, options.nproc or find_world().size)
    if options.nproc and options.nproc > 1:
        return launch_stage(stage, words, options.nproc)
    if stage.mpi:  # a rank that failed here alone would have the others wait for it
        from data_shards.ranks import together
        from dist_train.runtime.mpi import communicator

        return run(together(communicator(), lambda: (stage.load(), stage.read(words))[1]))
    return end(run(stage.read(words)))


def _dry_run(stage: Stage, words: Sequence[str], world_size: int) -> int:
    from dist_train.config import dump_config

    config, module = resolved(stage.read(words)), stage.load()
    print(without_passwords(dump_config(config)), end="")
    print(f"# world: {world_size} process(es)")
    module.check(config)
    if hasattr(module, "memory_report"):
        print(module.memory_report(config, world_size))
    return 0
