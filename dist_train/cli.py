"""The command line: one word per stage, each with a configuration file, overrides and an example.

Imports of torch and its kind happen inside the stages, so that help and error messages come at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from data_shards.errors import DataError
from dist_train import __version__
from dist_train.errors import UserError
from dist_train.runtime import find_world

if TYPE_CHECKING:
    from dist_train.config import Section

BAD_INPUT = 2


@dataclass(frozen=True)
class Stage:
    """A command that reads a configuration: `module` has `check(config)`, quick, and `run(config)`, on every rank."""

    name: str
    summary: str
    module: str
    config: str
    example: str
    mpi: bool = False
    trains: bool = False

    @property
    def config_class(self) -> type[Section]:
        """The configuration's class."""
        from dist_train import config

        return getattr(config, self.config)


STAGES = (
    Stage(
        "prepare",
        "tokenize text or conversations into shards",
        "dist_train.prepare",
        "PrepareConfig",
        "dist-train prepare inputs='corpus/*.jsonl.zst' tokenizer=tokenizer.model out=shards/corpus --nproc 8",
        mpi=True,
    ),
    Stage(
        "pretrain",
        "train a drafter on a text corpus, with the target in the loop if one is named",
        "dist_train.train.stage",
        "PretrainConfig",
        "dist-train pretrain pretrain.yaml train.learning_rate=3e-4 --nproc 8",
        trains=True,
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
    ),
    Stage(
        "evaluate",
        "measure block efficiency, memory-bound speed-up and token rate",
        "dist_train.evaluate.stage",
        "EvaluateConfig",
        "dist-train evaluate target.path=llama-2-7b-chat drafters='{base: runs/pretrain, tvdpp: runs/tvdpp}' "
        "tasks='[{name: dolly, inputs: dolly.jsonl}]' out=results",
    ),
    Stage(
        "export",
        "write a drafter as a Hugging Face folder that servers load",
        "dist_train.export",
        "ExportConfig",
        "dist-train export drafter=runs/tvdpp tokenizer=tokenizer.model out=llama-2-7b-chat-drafter",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 for bad input, told in one line."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # Overrides may stand after options, which argparse does not expect of positional arguments.
    if rest and (not hasattr(options, "words") or any(word.startswith("-") for word in rest)):
        parser.error(f"unknown arguments: {' '.join(rest)}; see dist-train {options.command} --help")
    options.words = [*getattr(options, "words", []), *rest]
    try:
        return options.function(options) or 0
    except (UserError, DataError) as error:
        _tell(f"dist-train {options.command}: {error}")
        return BAD_INPUT
    except KeyboardInterrupt:
        return 130


def _tell(line: str) -> None:
    """Say it once: every rank finds the same fault."""
    if all(os.environ.get(name, "0") == "0" for name in ("RANK", "PMI_RANK", "SLURM_PROCID")):
        print(line, file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    """Errors are one line; the help of a stage lists the keys of its configuration."""

    stage: Stage | None = None

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, in one line, and exit with 2."""
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n")

    def format_help(self) -> str:
        """argparse's help, and what is not known before the configuration's class is imported."""
        text = super().format_help()
        if self.stage is None:
            return text
        from dist_train.config import describe

        keys = [
            (f"{key}={default}" if default else key, text) for key, default, text in describe(self.stage.config_class)
        ]
        width = min(44, max(len(key) for key, _ in keys))
        listed = "\n".join(f"  {key:<{width}}  {text}".rstrip() for key, text in keys)
        return f"{text}\nconfiguration keys (without a default: required):\n{listed}\n"


def _parser() -> _Parser:
    parser = _Parser(
        prog="dist-train",
        description="Train draft models for speculative decoding, aligned with a chat LLM.",
        epilog="example: dist-train demo --out demo-run",
    )
    parser.add_argument("--version", action="version", version=f"dist-train {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_tokenizer(commands)
    for stage in STAGES:
        _add_stage(commands, stage)
    _add_submit(commands)
    _add_checkpoint(commands)
    return parser


def _add(
    commands: argparse._SubParsersAction, name: str, summary: str, example: str, function: Callable[..., int | None]
) -> _Parser:
    parser: _Parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(function=function)
    return parser


def _processes(text: str) -> int:
    count = int(text) if text.isdigit() else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} processes; it takes at least 1")
    return count


# -- stages -----------------------------------------------------------------------------------------------------


def _add_stage(commands: argparse._SubParsersAction, stage: Stage) -> None:
    parser = _add(commands, stage.name, stage.summary, stage.example, _run_stage)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG.yaml | section.key=value",
        help="a configuration file, then overrides; overrides alone will do",
    )
    parser.add_argument("--nproc", type=_processes, metavar="N", help="start N processes on this machine")
    parser.add_argument("--dry-run", action="store_true", help="print configuration, world and memory estimate; stop")
    if stage.trains:
        parser.add_argument("--resume", action="store_true", help="an error if there is nothing to resume")
    parser.stage = stage
    parser.set_defaults(stage=stage)


def _load(stage: Stage, words: Sequence[str]) -> Any:
    """The configuration that a file, if the first word is one, and overrides give."""
    from dist_train.config import load_config

    named = words[:1] if words and "=" not in words[0] else []
    return load_config(stage.config_class, Path(named[0]) if named else None, words[len(named) :])


def _run_stage(options: argparse.Namespace) -> int:
    from dist_train.config import dump_config

    stage: Stage = options.stage
    words = [*options.words, *(["run.resume=must"] if getattr(options, "resume", False) else [])]
    config = _load(stage, words)
    module = importlib.import_module(stage.module)
    if options.dry_run:
        processes = options.nproc or find_world().size
        print(dump_config(config), end="")
        print(f"# world: {processes} process(es)")
        if stage.trains:
            print(module.memory_report(config, processes))
        return 0
    if options.nproc and options.nproc > 1:
        from dist_train.launch import launch, launch_mpi

        module.check(config)
        return (launch_mpi if stage.mpi else launch)([stage.name, *words], options.nproc)
    module.run(config)
    return 0


# -- SLURM ------------------------------------------------------------------------------------------------------


def _add_submit(commands: argparse._SubParsersAction) -> None:
    parser = _add(
        commands,
        "submit",
        "run a stage on SLURM, through the templates of slurm/",
        "dist-train submit distill distill.yaml --nodes 4 --gpus-per-node 8 --time 12:00:00",
        _run_submit,
    )
    parser.add_argument("stage", choices=[stage.name for stage in STAGES if stage.name != "export"])
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | section.key=value", help="as for the stage itself")
    parser.add_argument("--nodes", type=_processes, default=1, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="one task each; 0: a cluster without GPUs")
    parser.add_argument("--tasks-per-node", type=_processes, metavar="T", help="instead of one a GPU")
    parser.add_argument("--cpus-per-task", type=_processes, metavar="C")
    parser.add_argument("--time", help="as sbatch takes it; the job saves, requeues and goes on when it is over")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--after", metavar="JOB", help="start when these jobs (12:13) ended well")
    parser.add_argument("--env", type=Path, metavar="FILE", help="the site's own version of slurm/env.sh")
    parser.add_argument("--dry-run", action="store_true", help="print the command and the script; submit nothing")


def _run_submit(options: argparse.Namespace) -> None:
    from dist_train import slurm

    stage = next(stage for stage in STAGES if stage.name == options.stage)
    resources = slurm.Resources(**{field: getattr(options, field) for field in slurm.Resources.__dataclass_fields__})
    command = slurm.sbatch_command(stage.name, options.words, resources)
    environment = slurm.job_environment(options.env)
    config = _load(stage, options.words)
    if options.after is None:  # else its inputs may not be made yet
        importlib.import_module(stage.module).check(config)
    if options.dry_run:
        print(slurm.describe(command, environment), end="")
        return
    job = slurm.submit(command, environment)
    print(f"submitted {stage.name} as job {job}; squeue -j {job}; log {stage.name}-{job}.log")


# -- demo -------------------------------------------------------------------------------------------------------


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = _add(
        commands,
        "demo",
        "run the whole method at small scale, and write a report",
        "dist-train demo --out demo-run",
        _run_demo,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo-run"), help="folder of everything made; goes on if killed"
    )
    parser.add_argument("--nproc", type=_processes, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument("--target", help="a real target: Hugging Face folder or hub id, instead of one trained here")
    parser.add_argument("--corpus", help="text to pretrain on: JSONL with a text field, instead of docstrings")
    parser.add_argument(
        "--seeds", help="instructions: JSONL with a prompt field, instead of questions made from the corpus"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of the training steps; 0.02 is a smoke test")


def _run_demo(options: argparse.Namespace) -> int:
    from dist_train.demo.run import run_demo

    given = {name: getattr(options, name) for name in ("target", "corpus", "seeds", "scale")}
    return run_demo(options.out, processes=options.nproc, **given)


# -- tokenizer --------------------------------------------------------------------------------------------------


def _add_tokenizer(commands: argparse._SubParsersAction) -> None:
    group = _add(
        commands,
        "tokenizer",
        "train a Llama-2-style tokenizer, or compare two",
        "dist-train tokenizer check tokenizer.model meta-llama/Llama-2-7b-chat-hf",
        lambda options: None,
    )
    actions = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = _add(
        actions,
        "train",
        "train a sentencepiece model with Llama 2's settings",
        "dist-train tokenizer train 'corpus/*.jsonl' --vocab-size 32000 --out tokenizer",
        _train_tokenizer,
    )
    train.add_argument("inputs", nargs="+", help="JSONL, Parquet or text, as for prepare")
    train.add_argument("--vocab-size", type=int, default=32_000)
    train.add_argument("--text-field", default="text")
    train.add_argument("--out", type=Path, required=True, help="folder for tokenizer.model and its conversions")
    check = _add(
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


def _texts(options: argparse.Namespace, inputs: Sequence[str]) -> Iterator[str]:
    from data_shards.inputs import find_files, plan_units, read_records

    for unit in plan_units(find_files(inputs)):
        yield from (record.get(options.text_field) or "" for record in read_records(unit))


def _train_tokenizer(options: argparse.Namespace) -> None:
    from dist_train.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(_texts(options, options.inputs), options.out, options.vocab_size)
    print(f"tokenizer: {tokenizer.vocab_size:,} pieces; {options.out}")


def _check_tokenizers(options: argparse.Namespace) -> int:
    from dist_train.tokenizer import PROBES, conversion_note, differences, load_tokenizer

    a, b = load_tokenizer(options.a), load_tokenizer(options.b)
    texts = [*PROBES, *_texts(options, options.texts)]
    found = differences(a, b, texts)
    for line in (*found, *filter(None, {conversion_note(tokenizer, texts) for tokenizer in (a, b)})):
        print(line)
    print("different: a drafter cannot be shared" if found else "equal: a drafter trained with A drafts for B")
    return 1 if found else 0


# -- checkpoints ------------------------------------------------------------------------------------------------


def _add_checkpoint(commands: argparse._SubParsersAction) -> None:
    parser = _add(
        commands,
        "checkpoint",
        "list the checkpoints of a run, or verify every byte of them",
        "dist-train checkpoint verify runs/pretrain",
        _run_checkpoint,
    )
    parser.add_argument("action", choices=("ls", "verify"))
    parser.add_argument("run", type=Path, help="run folder")


def _run_checkpoint(options: argparse.Namespace) -> int:
    from dist_train.run_folder import list_checkpoints, verify

    folders = list_checkpoints(options.run)
    if not folders:
        raise UserError(f"{options.run}: no checkpoint here")
    damaged = 0
    for folder, manifest in folders:
        size = sum(record["bytes"] for record in manifest["files"].values())
        line = f"{folder.name}  {manifest['world_size']} ranks  ZeRO {manifest['zero_stage']}  {size / 2**20:.1f} MiB"
        misfits = verify(folder) if options.action == "verify" else []
        damaged += bool(misfits)
        whole = "whole" if options.action == "verify" else ""
        print(f"{line}  {'; '.join(misfits) or whole}".rstrip())
    return 1 if damaged else 0
