"""env.sh, which every batch script sources: what it takes from folders that others can write to."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from slurm_jobs import TEMPLATES

from dist_train.runtime.process_group import settle_allocator

CACHES = ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


@pytest.fixture
def sourced(tmp_path):
    """`sourced(NAME=value)`: the environment after env.sh, in a folder of a job with a virtual environment."""
    activate = tmp_path / "job" / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("export ACTIVATED=1\n")
    (tmp_path / "disk").mkdir()

    def run(**given):
        places = {
            "SLURM_SUBMIT_DIR": str(tmp_path / "job"),
            "TMPDIR": str(tmp_path / "disk"),
        }
        command = ["bash", "-c", f"source {TEMPLATES / 'env.sh'} && env -0"]
        done = subprocess.run(
            command, env={"PATH": os.environ["PATH"], **places, **given}, capture_output=True, text=True, check=True
        )
        return dict(word.split("=", 1) for word in done.stdout.split("\0") if "=" in word)

    return run


def test_compilers_find_nothing_that_another_has_put_there(sourced, tmp_path):
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    planted = [tmp_path / "disk" / name for name in (f"dist-train-{user}", f"dist-train-{os.getuid()}")]
    for folder in planted:
        folder.mkdir(mode=0o777, exist_ok=True)
    used = set()
    for _ in range(2):
        environment = sourced()
        (folder,) = {Path(environment[name]).parent for name in CACHES}
        assert folder.parent == tmp_path / "disk"
        assert folder.stat().st_mode & 0o777 == 0o700
        assert folder.stat().st_uid == os.getuid()
        used.add(folder)
    assert len(used) == 2, "a name that can be known before"
    assert not used & set(planted)


def test_what_the_user_has_set_stays(sourced):
    assert sourced(TRITON_CACHE_DIR="/mine")["TRITON_CACHE_DIR"] == "/mine"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, None),
    ],
)
def test_gpu_memory_grows_in_place_unless_the_user_says_otherwise(sourced, given, expected):
    """In a batch script, and in a stage that is started without one."""
    assert sourced(**given).get("PYTORCH_CUDA_ALLOC_CONF") == expected
    environment = dict(given)
    settle_allocator(environment)
    assert environment.get("PYTORCH_CUDA_ALLOC_CONF") == expected


@pytest.mark.parametrize(("given", "activated"), [({}, True), ({"DIST_TRAIN_PYTHON": "/opt/python"}, False)])
def test_the_submit_folders_environment_is_sourced_where_no_python_is_named(sourced, given, activated):
    assert ("ACTIVATED" in sourced(**given)) == activated
