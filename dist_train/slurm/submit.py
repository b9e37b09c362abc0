"""`dist-train submit`: a batch script of `slurm/`, checked and handed to sbatch."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_train.config import SlurmSection
from dist_train.errors import UserError
from dist_train.runtime.resources import resource


def sbatch_options(resources: SlurmSection, after: Sequence[str] = ()) -> list[str]:
    """The options of sbatch; they win over the template's own. `after`: jobs that must end well before."""
    tasks = resources.tasks_per_node or resources.gpus_per_node
    if resources.gpus_per_node == 0:
        tasks = resources.tasks_per_node or 1
    given = {
        "--nodes": resources.nodes,
        "--gpus-per-node": resources.gpus_per_node,
        "--ntasks-per-node": tasks,
        "--cpus-per-task": resources.cpus_per_task,
        "--time": resources.time,
        "--signal": f"B:USR1@{resources.notice}" if resources.notice else None,
        "--partition": resources.partition,
        "--account": resources.account,
        "--array": resources.array,
        "--dependency": f"afterok:{':'.join(after)}" if after else None,
    }
    return [*(f"{name}={value}" for name, value in given.items() if value is not None), *resources.options]


def sbatch_command(
    stage: str, arguments: Sequence[str], resources: SlurmSection, after: Sequence[str] = ()
) -> list[str]:
    """The sbatch command of one stage: `arguments` are its configuration file and overrides."""
    template = resource("slurm", f"{stage}.sbatch")
    return ["sbatch", "--parsable", *sbatch_options(resources, after), str(template.resolve()), *arguments]


def with_defaults(stage: str, resources: SlurmSection) -> SlurmSection:
    """`resources` with the template's own number of GPUs where none is given."""
    if resources.gpus_per_node is not None:
        return resources
    line = re.search(r"^#SBATCH --gpus-per-node=(\d+)", resource("slurm", f"{stage}.sbatch").read_text(), re.MULTILINE)
    return resources.model_copy(update={"gpus_per_node": int(line[1]) if line else 0})


def job_environment(resources: SlurmSection) -> dict[str, str]:
    """Variables for the batch script: this interpreter, the templates' folder and, if given, the site's own env.sh.

    Raises UserError when that is not there.
    """
    found = {
        "DIST_TRAIN_PYTHON": sys.executable,
        "DIST_TRAIN_TEMPLATES": str(resource("slurm", "run_stage.sh").resolve().parent),
    }
    if resources.env is not None:
        if not resources.env.is_file():
            raise UserError(f"{resources.env}: no such file; --env takes a site's own version of slurm/env.sh")
        found["DIST_TRAIN_ENV"] = str(resources.env.resolve())
    if resources.notice is not None:
        found["DIST_TRAIN_NOTICE"] = str(resources.notice)
    return found


def describe(command: Sequence[str], environment: dict[str, str]) -> str:
    """What would be submitted, to read or to paste: the variables, the command and the template."""
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    script = next(Path(word) for word in command if word.endswith(".sbatch"))
    return f"{variables} \\\n{shlex.join(command)}\n\n# {script}\n{script.read_text()}"


def submit(command: Sequence[str], environment: dict[str, str]) -> str:
    """Hand it to SLURM; the job's id. Raises UserError with SLURM's own words when it refuses."""
    if shutil.which("sbatch") is None:
        raise UserError("no sbatch here; submit from a login node of the cluster, or start the stage with --nproc")
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        said = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.strip().splitlines()]
        raise UserError(f"sbatch refused: {'; '.join(said)}")
    return done.stdout.strip().split(";")[0]
