"""MPI's world: the ranks of `dist-train prepare`."""

from __future__ import annotations

import os
from typing import Any

from data_shards.ranks import Alone, Communicator
from dist_train.errors import UserError


def communicator() -> Communicator:
    """MPI's world. Raises UserError when a launcher started more processes than MPI knows of."""
    try:
        from mpi4py import MPI

        world: Any = MPI.COMM_WORLD
    except (ImportError, RuntimeError):
        world = Alone()
    expected = int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("PMI_SIZE") or 1)
    if world.size != expected and world.size == 1:
        raise UserError(
            f"started as {expected} tasks, but MPI sees 1: each would do all the work; use srun --mpi=pmi2 or pmix as "
            "the site's MPI needs, or mpiexec"
        )
    return world
