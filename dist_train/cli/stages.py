"""The commands that read a configuration."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.cli.parser import add, processes
from dist_train.errors import UserError
from dist_train.runtime.world import find_world

if TYPE_CHECKING:
    from dist_train.config import Section


@dataclass(frozen=True)
class Stage:
    """A command that reads a configuration: `module` has `check(config)`, quick, and `run(config)`, on every rank.

    `run` returns nothing, or the exit code.

    `alone`: by one process. `flags`: option to the override that it stands for, and its help; `{}` in it is where the
    option's value goes.
    """

    name: str
    summary: str
    module: str
    config: str
    example: str
    mpi: bool = False
    trains: bool = False
    alone: bool = False
    flags: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def config_class(self) -> type[Section]:
        """The configuration's class."""
        from dist_train import config

        return getattr(config, self.config)


RESUME = {"--resume": ("run.resume=must", "an error if there is nothing to resume")}
VERIFY = {"--verify": ("verify=true", "compare every byte of the corpus `out` with its checksums; make nothing")}
CHECK = {"--check": ("check={}", "check the folder `drafter` against TARGET, a folder or hub id; write nothing")}
STAGES = (
    Stage(
        "prepare",
        "tokenize text or conversations into shards",
        "dist_train.prepare.stage",
        "PrepareConfig",
        "dist-train prepare inputs='corpus/*.jsonl.zst' tokenizer=tokenizer.model out=shards/corpus --nproc 8",
        mpi=True,
        flags=VERIFY,
    ),
    Stage(
        "pretrain",
        "train a drafter on a text corpus, with the target in the loop if one is named",
        "dist_train.train.stage",
        "PretrainConfig",
        "dist-train pretrain pretrain.yaml train.learning_rate=3e-4 --nproc 8",
        trains=True,
        flags=RESUME,
    ),
    Stage(
        "generate",
        "let the target answer seed instructions",
        "dist_train.generate.stage",
        "GenerateConfig",
        "dist-train generate target.path=meta-llama/Llama-2-7b-chat-hf seeds.inputs=oig.jsonl out=answers --nproc 8",
    ),
    Stage(
        "distill",
        "fine-tune a drafter against the target's distributions",
        "dist_train.train.stage",
        "DistillConfig",
        "dist-train distill distill.yaml objective='{tvdpp: 1.0}' --nproc 8",
        trains=True,
        flags=RESUME,
    ),
    Stage(
        "evaluate",
        "measure block efficiency, memory-bound speed-up and token rate",
        "dist_train.evaluate.stage",
        "EvaluateConfig",
        "dist-train evaluate target.path=llama-2-7b-chat drafters='{base: runs/pretrain, tvdpp: runs/tvdpp}' "
        "tasks='[{preset: dolly, inputs: dolly.jsonl}]' out=results",
    ),
    Stage(
        "export",
        "write a drafter as a Hugging Face folder that servers load",
        "dist_train.export.stage",
        "ExportConfig",
        "dist-train export drafter=runs/tvdpp target.path=meta-llama/Llama-2-7b-chat-hf out=llama-2-7b-chat-drafter",
        alone=True,
        flags=CHECK,
    ),
)


def add_stage(commands: argparse._SubParsersAction, stage: Stage) -> None:
    """The command of a stage."""
    parser = add(commands, stage.name, stage.summary, stage.example, _run_stage)
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
    for flag, (override, text) in stage.flags.items():
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
    parser.set_defaults(function=_run_evaluate)


def _run_evaluate(options: argparse.Namespace) -> int:
    if options.compare and options.server is not None:
        raise UserError("--compare and --server: one at a time; compare what is in results folders")
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
        options.stage = replace(options.stage, module="dist_train.evaluate.served", config="ServedConfig", alone=True)
        options.words.append(f"server={options.server}")
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


def load(stage: Stage, words: Sequence[str]) -> Any:
    """The configuration that a file, if the first word is one, and overrides give."""
    from dist_train.config import load_config
    from dist_train.models.gguf import unpack_named

    named = words[:1] if words and "=" not in words[0] else []
    config = load_config(stage.config_class, Path(named[0]) if named else None, words[len(named) :])
    unpack_named(config)
    return config


def _run_stage(options: argparse.Namespace) -> int:
    from dist_train.config import dump_config

    stage: Stage = options.stage
    words = [*options.words, *(options.flags or [])]
    config = load(stage, words)
    module = importlib.import_module(stage.module)
    if options.dry_run:
        world_size = options.nproc or find_world().size
        print(dump_config(config), end="")
        print(f"# world: {world_size} process(es)")
        module.check(config)
        if hasattr(module, "memory_report"):
            print(module.memory_report(config, world_size))
        return 0
    if options.nproc and options.nproc > 1:
        if stage.alone:
            raise UserError(f"--nproc {options.nproc}: one process does this; leave it out")
        from dist_train.runtime.launch import launch, launch_mpi

        module.check(config)
        return (launch_mpi if stage.mpi else launch)([stage.name, *words], options.nproc)
    code: int = module.run(config) or 0
    return code if stage.mpi else end(code)
