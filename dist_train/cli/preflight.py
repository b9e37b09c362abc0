"""What is asked before a run: is this machine well (`doctor`), and what will it take (`plan`)."""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_train.api.run import resolved
from dist_train.api.stages import STAGES, Stage
from dist_train.cli.parser import add, processes
from dist_train.cli.stages import end
from dist_train.errors import UserError

_PLANNED = ("pretrain", "generate", "distill")


def add_preflight(commands: argparse._SubParsersAction) -> None:
    """`doctor` and `plan`."""
    _add_doctor(commands)
    _add_plan(commands)


def _stage_of(words: list[str], given: str | None) -> Stage:
    """The stage that is named, or that the configuration's sections tell."""
    from dist_train.plan.shapes import stage_of

    path = Path(words[0]) if words and "=" not in words[0] else None
    return STAGES[given or stage_of(path, words[1:] if path else words)]


# -- doctor -----------------------------------------------------------------------------------------------------


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    parser = add(
        commands,
        "doctor",
        "check devices, links, disk, versions and a stage's inputs, one line each, with the mend",
        "dist-train doctor distill.yaml --nproc 8",
        _run_doctor,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG.yaml | section.key=value",
        help="check this stage's tokenizer, target, data and folder as well",
    )
    parser.add_argument("--nproc", type=processes, metavar="N", help="start N processes on this machine")
    parser.add_argument("--stage", choices=[name for name in STAGES if name != "export"], help="of the configuration")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="shared folder to try (default: where the run will write, or here)"
    )
    parser.add_argument(
        "--wait", type=float, default=180.0, metavar="S", help="seconds for each check, and for ranks to come (180)"
    )


def _run_doctor(options: argparse.Namespace) -> int:
    if options.wait <= 0:
        raise UserError(f"--wait {options.wait}: seconds, above 0")
    stage = _stage_of(options.words, options.stage) if options.words else None
    config = resolved(stage.read(options.words)) if stage else None
    if options.nproc and options.nproc > 1:
        from dist_train.runtime.launch import launch

        named = {"--stage": stage.name if stage else None, "--folder": options.folder, "--wait": options.wait}
        flags = [f"{name}={value}" for name, value in named.items() if value is not None]
        return launch(["doctor", *flags, *options.words], options.nproc)
    from dist_train.doctor.examine import examine

    code = examine(stage.module if stage else None, config, options.folder, options.wait)
    return end(code)


# -- plan -------------------------------------------------------------------------------------------------------


def _add_plan(commands: argparse._SubParsersAction) -> None:
    parser = add(
        commands,
        "plan",
        "estimate hours, memory, network and storage of a stage on GPUs that are not here",
        "dist-train plan distill.yaml --gpus 32 --gpu h100",
        _run_plan,
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | section.key=value", help="as for the stage itself")
    parser.add_argument("--gpus", type=processes, metavar="N")
    parser.add_argument("--gpu", choices=("h100", "h200", "a100"))
    parser.add_argument(
        "--suggest",
        action="store_true",
        help="instead, load the target here and tell which width and depth of a drafter can pay",
    )
    parser.add_argument("--stage", choices=_PLANNED, help="if the configuration's sections do not tell")
    parser.add_argument("--gpus-per-node", type=processes, default=8, metavar="G", help="default 8")
    parser.add_argument("--mfu", type=float, help="share of the peak that the drafter's passes reach")
    parser.add_argument("--target-mfu", type=float, help="share of the peak that the target's forward pass reaches")
    parser.add_argument("--network", type=float, metavar="GB/S", help="of the network adapter of each GPU, a direction")
    parser.add_argument("--target-parameters", type=float, metavar="P", help="plan with a Llama of that size (7e9)")
    parser.add_argument("--vocab-size", type=processes, metavar="V", help="instead of asking target or tokenizer")
    parser.add_argument("--seeds", type=processes, metavar="N", help="generate: instead of counting seeds.inputs")
    parser.add_argument("--answer-tokens", type=float, metavar="T", help="generate: mean length of an answer")


def _run_plan(options: argparse.Namespace) -> None:
    from dist_train import plan

    stage = _stage_of(options.words, options.stage)
    if stage.name not in _PLANNED:
        raise UserError(f"{stage.name} is not planned, {', '.join(_PLANNED)} are; --stage names one")
    config = stage.read(options.words)
    if options.suggest:
        _suggest(stage, config)
        return
    if options.gpus is None or options.gpu is None:
        raise UserError("plan needs --gpus N and --gpu KIND, or --suggest")
    machine = plan.Machine(plan.GPUS[options.gpu], options.gpus, options.gpus_per_node)
    if options.network is not None:
        machine = replace(machine, gpu=replace(machine.gpu, network=_above_0("--network", options.network) * 1e9))
    given = {name: getattr(options, name) for name in ("mfu", "target_mfu") if getattr(options, name) is not None}
    assumed = plan.Assumptions(**given)
    if stage.name == "generate" and options.seeds is None:
        options.seeds = _count_seeds(config)
    with tempfile.TemporaryDirectory() as folder:
        if options.target_parameters is not None:
            config = _with_llama(config, options, Path(folder))
        made = _plan_stage(stage, config, machine, assumed, options)
    print(plan.render(made), end="")


def _suggest(stage: Stage, config: Any) -> None:
    from dist_train.plan.suggest import report, suggest
    from dist_train.runtime.process_group import started

    if stage.name not in ("pretrain", "distill"):
        raise UserError(f"--suggest is about a drafter to be trained; {stage.name} trains none")
    with started() as runtime:
        print(report(suggest(resolved(config), runtime)))


def _plan_stage(stage: Stage, config: Any, machine: Any, assumed: Any, options: argparse.Namespace) -> Any:
    from dist_train import plan

    if stage.name != "generate":
        return plan.plan_training(config, machine, assumed, _vocab_size(config, options), stage.name)
    tokens = options.answer_tokens
    if tokens is None:
        tokens = config.max_new_tokens / 2
    return plan.plan_generation(config, machine, assumed, options.seeds, _above_0("--answer-tokens", tokens))


def _count_seeds(config: Any) -> int:
    """As generate finds them; a tokenizer is needed only where their tokens are limited."""
    from dist_train.models.target_tokenizer import named_tokenizer
    from dist_train.prompts.seeds import read_all_seeds

    sections = [config.seeds, *config.more_seeds]
    limited = any(section.min_tokens or section.max_tokens for section in sections)
    try:
        tokenizer = named_tokenizer(config.target, config.tokenizer, config.chat_template) if limited else None
    except UserError as error:
        raise UserError(f"{error}; or plan without it: --seeds 10000") from error
    return len(read_all_seeds(sections, tokenizer))


def _with_llama(config: Any, options: argparse.Namespace, folder: Path) -> Any:
    """The configuration with a target of the given size in the place of its own."""
    from dist_train.plan import llama_of
    from dist_train.plan.shapes import tokenizer_vocabulary

    if config.target is None:
        raise UserError("--target-parameters: this configuration has no target; set target.path to any name")
    parameters = _above_0("--target-parameters", options.target_parameters)
    vocab_size = options.vocab_size
    if vocab_size is None:
        vocab_size = tokenizer_vocabulary(config.tokenizer or config.target.path)
    llama_of(parameters, vocab_size).save_pretrained(folder)
    return config.model_copy(update={"target": config.target.model_copy(update={"path": str(folder)})})


def _vocab_size(config: Any, options: argparse.Namespace) -> int:
    """As training finds it: of the target, else of the tokenizer; what is given goes before both."""
    from dist_train.plan.shapes import target_size, tokenizer_vocabulary

    if options.vocab_size is not None:
        return int(options.vocab_size)
    if config.target is not None:
        return int(target_size(config.target).shape.vocab_size)
    return tokenizer_vocabulary(config.tokenizer)


def _above_0(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise UserError(f"{name} {value}: above 0, and finite")
    return value
