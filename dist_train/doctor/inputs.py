"""What a stage's configuration names, looked at one by one; and SLURM's side of this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_shards import DataError, ShardedTokens
from dist_train.config import TargetSection, TrainConfig
from dist_train.doctor.findings import Finding
from dist_train.errors import UserError
from dist_train.runtime.process_group import Runtime

_COMMANDS = ("sbatch", "srun", "scontrol", "squeue", "scancel")
_TOOL_SECONDS = 20.0


def input_findings(module: Any, config: Any, node: str) -> list[Finding]:
    """Tokenizer, target, data and run folder of a stage, and the stage's own check, as this node sees them."""
    target: TargetSection | None = getattr(config, "target", None)
    tokenizer = getattr(config, "tokenizer", None) or (target.path if target else "")
    training = isinstance(config, TrainConfig)
    looks: list[tuple[str, Callable[[], str]]] = []
    if tokenizer:
        looks.append(("tokenizer", partial(_look_at_tokenizer, tokenizer, target, strict=not training)))
    if target is not None:
        looks.append(("target", lambda: _look_at_target(target)))
    if training:
        looks += [("data", partial(_look_at_data, source.path)) for source in config.data.sources]
        looks.append(("run folder", lambda: _look_at_run(config.run.dir)))
    looks.append(("stage", lambda: module.check(config) or "its own check finds nothing wrong"))
    found = []
    for check, look in looks:
        try:
            found.append(Finding(check, node, "ok", look()))
        except (UserError, DataError) as error:
            found.append(Finding(check, node, "FAIL", str(error)))
    return found


def memory_finding(config: TrainConfig, runtime: Runtime, available: Sequence[float]) -> Finding:
    """Whether the training fits into what is free for the rank that has least."""
    from dist_train.train.memory import check_fit
    from dist_train.train.stage import estimate_memory

    try:
        estimate = estimate_memory(config, runtime.world_size)
        check_fit(estimate, min(available))
    except UserError as error:
        return Finding("memory", "all", "FAIL", str(error))
    return Finding("memory", "all", "ok", f"{sum(estimate.values()):.2f} GiB a rank of {min(available):.1f} free")


def together(found: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Findings of several nodes: those that are the same everywhere once, the others node by node."""
    merged: list[Finding] = []
    for same in zip(*found, strict=True):
        alike = len({(one.verdict, one.text) for one in same}) == 1
        merged += [Finding(same[0].check, "all", same[0].verdict, same[0].text, same[0].mend)] if alike else same
    return merged


def _look_at_tokenizer(source: str, target: TargetSection | None, *, strict: bool) -> str:
    from dist_train.models.target_tokenizer import compare_with_target, named_tokenizer

    tokenizer = named_tokenizer(target, source)
    text = f"{source}: {tokenizer.vocab_size:,} pieces"
    if target is None or source == target.path:
        return text
    same = "the target's own encodes alike" if strict else "no id is another piece of the target's own"
    return f"{text}; {compare_with_target(tokenizer, source, target, strict=strict) or same}"


def _look_at_target(section: TargetSection) -> str:
    from dist_train.models.load import check_target, read_target_config

    check_target(section)
    shape = read_target_config(section)
    return f"{section.path}: {shape.model_type}, {shape.num_hidden_layers} layers, vocabulary {shape.vocab_size:,}"


def _look_at_data(path: Path) -> str:
    corpus = ShardedTokens(path)
    return f"{path}: {len(corpus):,} tokens in {corpus.num_documents:,} documents, no file missing or cut"


def _look_at_run(folder: Path) -> str:
    from dist_train.runtime.run_folder import list_checkpoints

    kept = list_checkpoints(folder)
    return f"{folder}: " + (f"goes on from {kept[-1].name}" if kept else "begins anew")


# -- SLURM ------------------------------------------------------------------------------------------------------


def slurm_findings(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """SLURM's commands, the MPI plugin that prepare needs, and whether srun started this."""
    missing = [name for name in _COMMANDS if shutil.which(name) is None]
    if len(missing) == len(_COMMANDS) and "SLURM_JOB_ID" not in environment:
        return [Finding("slurm", "all", "note", "none on this machine; stages start with --nproc")]
    if missing:
        mend = "install SLURM's client commands here, or submit from a node that has them"
        return [Finding("slurm", "all", "FAIL", f"{', '.join(missing)} missing", mend)]
    found = [Finding("slurm", "all", "ok", "its commands are there")]
    tasks = int(environment.get("SLURM_NTASKS", "1"))
    if tasks > 1 and "SLURM_STEP_NUM_TASKS" not in environment and "RANK" not in environment:
        text = f"the job has {tasks} tasks, this is one process outside of srun"
        found.append(Finding("launcher", "all", "FAIL", text, "srun python -m dist_train doctor"))
    listing = _srun_mpi_list()
    if "MPI" not in listing and "SLURM_JOB_ID" not in environment:
        return [Finding("slurm", "all", "note", "its commands are here, but no cluster answers them; --nproc will do")]
    wanted = environment.get("DIST_TRAIN_MPI", "pmi2")
    return [*found, judge_mpi(wanted, listing, _installed("mpi4py"))]


def judge_mpi(wanted: str, listing: str, mpi4py: str | None) -> Finding:
    """Whether `prepare` can run under srun: mpi4py, and the plugin named in DIST_TRAIN_MPI in `srun --mpi=list`."""
    if mpi4py is None:
        return Finding("mpi", "all", "FAIL", "no mpi4py: prepare runs alone", "pip install 'dist-train[mpi]'")
    # "MPI plugin types are..." and one name a line, or, before Slurm 20.11, "srun: MPI types are..." and "srun: name".
    names = [line.removeprefix("srun:").strip() for line in listing.splitlines()]
    plugins = [name for name in names if re.fullmatch(r"[\w.-]+", name) and name != "none"]
    # "specific pmix plugin versions available: pmix_v4,pmix_v5" belongs to pmix.
    plugins += re.findall(r"pmix_v\d+", listing)
    if wanted not in plugins:
        have = ", ".join(dict.fromkeys(plugins)) or "none"
        mend = "set DIST_TRAIN_MPI in env.sh to one that your mpi4py was built for"
        return Finding("mpi", "all", "FAIL", f"srun has no MPI plugin {wanted} (it has {have})", mend)
    return Finding("mpi", "all", "ok", f"srun --mpi={wanted}, mpi4py {mpi4py}")


def _srun_mpi_list() -> str:
    try:
        done = subprocess.run(["srun", "--mpi=list"], capture_output=True, text=True, timeout=_TOOL_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout + done.stderr


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
