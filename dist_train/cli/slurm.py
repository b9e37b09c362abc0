"""Stages on SLURM: `submit`, `status`, and `job`, by which batch scripts keep count."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.api.run import resolved
from dist_train.api.stages import STAGES, Stage
from dist_train.cli.parser import Parser, add, processes

if TYPE_CHECKING:
    from dist_train.config import PipelineConfig, SlurmSection
    from dist_train.slurm.checks import Node

_STAGES = {name: stage for name, stage in STAGES.items() if name != "export"}
PIPELINE = "pipeline"

# -- submit -----------------------------------------------------------------------------------------------------


def add_submit(commands: argparse._SubParsersAction) -> None:
    """`submit`: a stage on SLURM, or a chain of them."""
    parser = add(
        commands,
        "submit",
        "run a stage, or a pipeline of them, on SLURM, through the templates of slurm/",
        "dist-train submit distill distill.yaml --nodes 4 --gpus-per-node 8 --time 12:00:00",
        _run_submit,
    )
    parser.add_argument("stage", choices=[*_STAGES, PIPELINE])
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | section.key=value", help="as for the stage itself")
    parser.add_argument("--nodes", type=processes, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="one task each; 0: a cluster without GPUs")
    parser.add_argument("--tasks-per-node", type=processes, metavar="T", help="instead of one a GPU")
    parser.add_argument("--cpus-per-task", type=processes, metavar="C")
    parser.add_argument("--time", help="as sbatch takes it; the job saves, requeues and goes on when it is over")
    parser.add_argument("--notice", type=processes, metavar="SECONDS", help="before that, to save (default 600)")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--array", help="generate: elements that share the work, 0-15 say")
    parser.add_argument("--env", type=Path, metavar="FILE", help="the site's own version of slurm/env.sh")
    parser.add_argument(
        "--sbatch-option",
        dest="options",
        action="append",
        metavar="OPTION",
        help="any other of sbatch's, --sbatch-option=--qos=high say; may be repeated",
    )
    parser.add_argument("--after", metavar="JOB", help="start when these jobs (12:13) ended well")
    parser.add_argument("--dry-run", action="store_true", help="print the command and the script; submit nothing")


def _run_submit(options: argparse.Namespace) -> None:
    from dist_train.config import SlurmSection, load_config
    from dist_train.config.read import read_tree
    from dist_train.slurm.checks import find_nodes

    given = {key: getattr(options, key) for key in SlurmSection.model_fields if getattr(options, key) is not None}
    resources = read_tree(SlurmSection, given, "arguments")
    after = dict.fromkeys(options.after.split(":"), "") if options.after else {}
    if options.stage == PIPELINE:
        from dist_train.config import PipelineConfig

        named = options.words[:1] if options.words and "=" not in options.words[0] else []
        config = load_config(PipelineConfig, Path(named[0]) if named else None, options.words[len(named) :])
        config.slurm = config.slurm.model_copy(update=given)
        _submit_pipeline(config, after, dry_run=options.dry_run)
        return
    stage = _STAGES[options.stage]
    config = stage.read(options.words)
    _check(stage, config, resources, find_nodes(), waits=bool(after), only_tell=options.dry_run)
    _hand_over(stage, config, options.words, resources, after, dry_run=options.dry_run)


def _check(
    stage: Stage, config: Any, resources: SlurmSection, nodes: Sequence[Node] | None, *, waits: bool, only_tell: bool
) -> None:
    """Everything that can be known before SLURM is asked; a stage that waits for another may lack its inputs still.

    Raises UserError or DataError; with `only_tell` what concerns cluster and disk is printed instead.
    """
    from dist_train.errors import UserError
    from dist_train.slurm.checks import check_cluster, check_disk, gpu_gib
    from dist_train.slurm.submit import job_environment, with_defaults

    if resources.array and stage.name != "generate":
        raise UserError(f"--array {resources.array}: only generate shares its work among independent jobs")
    job_environment(resources)
    full = with_defaults(stage.name, resources)
    config = resolved(config, "bf16" if full.gpus_per_node else None)  # on the nodes, not here
    module = stage.load()
    if not waits:
        module.check(config)
    try:
        warnings = check_cluster(full, nodes) if nodes else []
        needed = module.checkpoints_bytes(config) if stage.trains and not waits else 0
        warnings += check_disk(stage.folder(config), needed)
        gib = gpu_gib(full, nodes) if nodes and full.gpus_per_node else None
        if stage.trains and not waits and gib is not None and config.run.check_memory:
            from dist_train.train.memory import check_fit

            check_fit(
                module.estimate_memory(config, full.nodes * (full.tasks_per_node or full.gpus_per_node or 1)), gib
            )
    except UserError as error:
        if not only_tell:
            raise
        warnings = [f"would be refused: {error}"]
    for warning in warnings:
        print(f"{'# ' if only_tell else ''}note: {warning}")


def _hand_over(
    stage: Stage, config: Any, words: Sequence[str], resources: SlurmSection, after: dict[str, str], *, dry_run: bool
) -> str:
    """Submit one stage and tell what to watch; the job's id. `after`: job to its folder, where that is known."""
    from dist_train.slurm import journal, submit

    command = submit.sbatch_command(stage.name, words, resources, list(after))
    environment = submit.job_environment(resources)
    if dry_run:
        print(submit.describe(command, environment), end="")
        return f"<{stage.name}>"
    job = submit.submit(command, environment)
    folder = stage.folder(config)
    journal.note(folder, job, "submitted", stage=stage.name, after={k: v for k, v in after.items() if v})
    log = f"{stage.name}-{job}_0.log and so on" if stage.name == "generate" else f"{stage.name}-{job}.log"
    print(f"submitted {stage.name} as job {job}; squeue -j {job}; log {log}; dist-train status {folder}")
    return job


def _submit_pipeline(config: PipelineConfig, first: dict[str, str], *, dry_run: bool) -> None:
    """All stages are checked before the first is submitted; those that wait for no other wait for the jobs `first`."""
    from data_shards import DataError
    from dist_train.errors import UserError
    from dist_train.slurm import pipeline
    from dist_train.slurm.checks import find_nodes

    stages = {name: _STAGES[section.stage or name] for name, section in config.stages.items()}
    configs = {name: pipeline.load_stage(name, config.stages[name], stages[name].config_class) for name in stages}
    folders = {name: stages[name].folder(configs[name]) for name in stages}
    awaited = pipeline.check_wiring(config, configs, folders)
    nodes = find_nodes()
    for name in stages:
        try:
            if awaited[name]:
                pipeline.check_rest(configs[name], awaited[name])
            waits = bool(awaited[name])
            _check(stages[name], configs[name], config.job(name), nodes, waits=waits, only_tell=dry_run)
        except (UserError, DataError) as error:
            raise UserError(f"stages.{name}: {error}") from error
    jobs: dict[str, str] = {}
    for name, section in config.stages.items():
        words = [str(pipeline.keep_config(configs[name], folders[name], stages[name].name, dry_run=dry_run))]
        after = {jobs[other]: str(folders[other].resolve()) for other in section.after or []} or first
        jobs[name] = _hand_over(stages[name], configs[name], words, config.job(name), after, dry_run=dry_run)
    if not dry_run:
        print(f"watch: dist-train status {' '.join(map(str, folders.values()))}")


# -- status -----------------------------------------------------------------------------------------------------


def add_status(commands: argparse._SubParsersAction) -> None:
    """`status`: where runs stand."""
    parser = add(
        commands,
        "status",
        "tell where a run stands: step, loss, time left, requeues and their reasons",
        "dist-train status runs/pretrain",
        _run_status,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that a stage writes to")


def _run_status(options: argparse.Namespace) -> None:
    from dist_train.slurm.status import status

    for run in options.runs:
        print(*([f"{run}"] if len(options.runs) > 1 else []), *status(run), sep="\n")


# -- job --------------------------------------------------------------------------------------------------------


def add_job(commands: argparse._SubParsersAction) -> None:
    """`job`: for `slurm/run_stage.sh` alone, and so not listed."""
    parser: Parser = commands.add_parser("job", description="Keep count of a job's starts, for slurm/run_stage.sh.")
    parser.set_defaults(function=_run_job)
    parser.add_argument("event", choices=("begin", "end"))
    parser.add_argument("--last-state", default="", help="of the start before, by sacct")
    parser.add_argument("--code", type=int, default=0, help="of srun")
    parser.add_argument("--reason", default="", help="why the step ended")
    parser.add_argument("--log", type=Path, help="the job's own")
    parser.add_argument("stage", choices=list(_STAGES))
    parser.add_argument("words", nargs=argparse.REMAINDER)


def _run_job(options: argparse.Namespace) -> int:
    from dist_train.slurm import journal
    from dist_train.slurm.standing import standing

    stage = _STAGES[options.stage]
    config = stage.read([word for word in options.words if not word.startswith("--")])
    folder = stage.folder(config)
    now = standing(stage.name, folder, config.train.steps if stage.trains else None)
    job = journal.Job.here(os.environ)
    most = int(os.environ.get("DIST_TRAIN_MAX_FRUITLESS", journal.MAX_FRUITLESS))
    if options.event == "begin":
        verdict = journal.begin(folder, stage.name, job, now, options.last_state, most)
    else:
        most_starts = int(os.environ.get("DIST_TRAIN_MAX_REQUEUES", 200))
        verdict = journal.end(
            folder, stage.name, job, now, options.code, options.reason, options.log, most, most_starts
        )
    print(verdict.said)
    return verdict.code
