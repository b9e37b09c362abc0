"""Who am I: the place in the world that each launcher gives."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.errors import UserError
from dist_train.runtime.process_group import started
from dist_train.runtime.world import find_world

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
SRUN = {
    "SLURM_JOB_ID": "41234",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[7-8]",
    "MASTER_ADDR": "gpu7",  # else scontrol is asked, see tests/slurm
}


def test_torchrun():
    world = find_world(TORCHRUN)
    assert (world.rank, world.local_rank, world.size) == (5, 1, 8)
    assert (world.master_addr, world.master_port) == ("node0", 1234)


def test_srun_gives_each_job_its_own_port():
    world = find_world(SRUN)
    assert (world.rank, world.local_rank, world.size, world.master_addr) == (3, 1, 4, "gpu7")
    assert 20_000 <= world.master_port < 32_768
    assert find_world({**SRUN, "SLURM_JOB_ID": "41235"}).master_port != world.master_port


def test_what_the_user_sets_goes_before_slurm():
    world = find_world({**SRUN, "MASTER_ADDR": "ib-gpu7", "MASTER_PORT": "5555"})
    assert (world.master_addr, world.master_port) == ("ib-gpu7", 5555)


def test_a_batch_script_outside_of_srun_is_one_process():
    """sbatch sets SLURM_PROCID and SLURM_NTASKS in the script itself."""
    world = find_world({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"})
    assert world.size == 1


def test_nothing_set_is_one_process():
    assert find_world({}).size == 1


def test_a_silent_scontrol_names_the_way_out(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        find_world({**SRUN, "MASTER_ADDR": ""})


def test_nothing_is_compiled_at_the_start(tmp_path):
    """No C++ compiler, and no build of a killed process, can hold a run up."""
    for name in ("python", "sh", "ninja"):
        found = shutil.which(name)
        if found:
            Path(tmp_path, name).symlink_to(found)
    start = "from dist_train.runtime.process_group import started\nwith started() as runtime: print(runtime.world_size)"
    done = subprocess.run(
        [sys.executable, "-c", start],
        env={**os.environ, "PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "operators")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["1"], done.stderr
    assert not (tmp_path / "operators").exists()


def test_what_a_process_starts_later_does_not_inherit_its_place(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with started() as runtime:
        assert runtime.world_size == 1 and os.environ["WORLD_SIZE"] == "1"
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"} & os.environ.keys()
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
