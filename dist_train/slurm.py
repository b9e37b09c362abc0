"""`dist-train submit`: a batch script of `slurm/`, checked and handed to sbatch."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_train.errors import UserError
from dist_train.resources import resource


@dataclass(frozen=True)
class Resources:
    """What is asked of SLURM; None leaves the template's or the site's default."""

    nodes: int = 1
    gpus_per_node: int | None = None
    """tasks per node too: one task a GPU; 0: no GPUs are asked for, and one task a node runs on its processor"""
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    after: str | None = None
    """job ids, separated by colons, that must end well before this one starts"""

    def options(self) -> list[str]:
        """The options of sbatch. They win over the template's own."""
        tasks = self.tasks_per_node or self.gpus_per_node
        if self.gpus_per_node == 0:
            tasks = self.tasks_per_node or 1
        given = {
            "--nodes": self.nodes,
            "--gpus-per-node": self.gpus_per_node,
            "--ntasks-per-node": tasks,
            "--cpus-per-task": self.cpus_per_task,
            "--time": self.time,
            "--partition": self.partition,
            "--account": self.account,
            "--dependency": f"afterok:{self.after}" if self.after else None,
        }
        return [f"{name}={value}" for name, value in given.items() if value is not None]


def sbatch_command(stage: str, arguments: Sequence[str], resources: Resources) -> list[str]:
    """The sbatch command of one stage: `arguments` are its configuration file and overrides."""
    template = resource("slurm", f"{stage}.sbatch")
    return ["sbatch", "--parsable", *resources.options(), str(template.resolve()), *arguments]


def job_environment(env_file: Path | None) -> dict[str, str]:
    """Variables for the batch script: this interpreter, the templates' folder and, if given, the site's own env.sh."""
    found = {
        "DIST_TRAIN_PYTHON": sys.executable,
        "DIST_TRAIN_TEMPLATES": str(resource("slurm", "run_stage.sh").resolve().parent),
    }
    if env_file is not None:
        if not env_file.is_file():
            raise UserError(f"{env_file}: no such file; --env takes a site's own version of slurm/env.sh")
        found["DIST_TRAIN_ENV"] = str(env_file.resolve())
    return found


def describe(command: Sequence[str], environment: dict[str, str]) -> str:
    """What would be submitted, to read or to paste: the variables, the command and the template."""
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    script = next(Path(word) for word in command if word.endswith(".sbatch"))
    return f"{variables} \\\n{shlex.join(command)}\n\n# {script}\n{script.read_text()}"


def submit(command: Sequence[str], environment: dict[str, str]) -> str:
    """Hand it to SLURM; the job id. Raises UserError with SLURM's own words when it refuses."""
    if shutil.which("sbatch") is None:
        raise UserError("no sbatch here; submit from a login node of the cluster, or start the stage with --nproc")
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise UserError(f"sbatch refused: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
