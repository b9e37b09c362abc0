"""The batch scripts, submitted by hand to a real SLURM of two nodes."""

from __future__ import annotations

import re
import shutil
import sys
import urllib.request

import pytest
from slurm_jobs import TEMPLATES, TWO_NODES, journal, site

STAGES = ("prepare", "pretrain", "generate", "distill", "evaluate")


@pytest.mark.parametrize("stage", [*STAGES, "tensorboard"])
def test_a_template_is_shell_that_sbatch_accepts(slurm, stage, tmp_path):
    """The site's defaults: eight GPUs a node, which this cluster does not have and says so."""
    slurm.run("bash", "-n", TEMPLATES / f"{stage}.sbatch")
    slurm.run("sbatch", "--test-only", *TWO_NODES, TEMPLATES / f"{stage}.sbatch", "x.yaml", cwd=tmp_path)


def test_prepare_by_mpi_on_two_nodes_gives_the_bytes_of_one_process(slurm, tiny, cli, tmp_path):
    keys = [f"inputs={tiny.root / 'text.jsonl'}", f"tokenizer={tiny.tokenizer}", "shard_bytes=4096"]
    cli("prepare", *keys, f"out={tmp_path / 'one'}")
    options = ("--nodes=2", "--ntasks-per-node=1")
    job = slurm.submit(*options, TEMPLATES / "prepare.sbatch", *keys, f"out={tmp_path / 'two'}", cwd=tmp_path)
    log = tmp_path / f"prepare-{job}.log"
    assert slurm.wait(job, log)["JobState"] == "COMPLETED", log.read_text()
    assert "2 ranks" in log.read_text()
    for one in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / one.name).read_bytes() == one.read_bytes(), one.name


def test_a_job_that_inherits_nothing_or_too_much_with_blanks_in_every_path(slurm, tiny, tmp_path):
    """sbatch --export=NONE, from within another job whose memory was asked for otherwise."""
    folder, out = tmp_path / "my own runs", tmp_path / "my own runs" / "the shards"
    shutil.copytree(TEMPLATES, folder / "the templates")
    root = TEMPLATES.parent
    site = [f"export PATH={slurm.environment['PATH']!r} PYTHONPATH={str(root)!r} OMP_NUM_THREADS=1", "", "site=ours"]
    (folder / "the templates" / "env.sh").write_text("\n".join([*site, f"DIST_TRAIN_PYTHON={sys.executable}\n"]))
    outer = ("env", "SLURM_MEM_PER_CPU=100", "SLURM_MEM_PER_NODE=200", "sbatch", "--parsable", "--export=NONE")
    asked = (
        "--nodes=2",
        "--ntasks-per-node=1",
        f"--output={folder}/a log-%j.log",
        folder / "the templates/prepare.sbatch",
    )
    keys = [f"inputs={tiny.root / 'text.jsonl'}", f"tokenizer={tiny.tokenizer}", f"out={out}"]
    job = slurm.run(*outer, *asked, *keys, cwd=folder).stdout.strip()
    log = folder / f"a log-{job}.log"
    assert slurm.wait(job, log)["JobState"] == "COMPLETED", log.read_text()
    assert "2 ranks" in log.read_text()
    assert [line["event"] for line in journal(out, job)] == ["start", "end"]


def test_srun_without_its_mpi_is_an_error_that_names_the_mend(slurm, tiny, tmp_path):
    """N tasks that each believe to be alone would write the same shards N times."""
    keys = [f"inputs={tiny.root / 'text.jsonl'}", f"tokenizer={tiny.tokenizer}", f"out={tmp_path / 'out'}"]
    command = [sys.executable, "-m", "dist_train", "prepare", *keys]
    told = slurm.run("srun", "--nodes=2", "--ntasks=2", "--mpi=none", *command, cwd=tmp_path, expect=2)
    assert told.stderr.count("srun --mpi=") == 1
    assert not (tmp_path / "out").exists()


def test_the_doctor_inside_a_job_tells_of_every_node(slurm, tmp_path):
    command = f"srun {sys.executable} -m dist_train doctor --folder {tmp_path}"
    job = slurm.submit(*TWO_NODES, "--output=doctor.log", f"--wrap={command}", cwd=tmp_path)
    known, said = slurm.wait(job, tmp_path / "doctor.log"), (tmp_path / "doctor.log").read_text()
    assert "2 started by slurm, 2 nodes" in said
    for check in ("device", "versions", "gemm fp32", "clock", "disk"):
        for node in ("n1", "n2"):
            assert re.search(rf"^ok +{check} +{node} ", said, re.MULTILINE), said
    assert (known["JobState"], "all well" in said) == ("COMPLETED", True), said


def test_an_element_of_an_array_that_failed_is_repeated_alone(slurm, tiny, tmp_path):
    lines = tmp_path / "seeds.jsonl"
    lines.write_text("".join(f'{{"prompt": "Say word {number}"}}\n' for number in range(6)))
    out = tmp_path / "answers"
    keys = [f"target.path={tiny.target}", "target.precision=fp32", f"seeds.inputs={lines}", f"out={out}"]
    keys += ["max_new_tokens=4", "batch_size=3", "temperatures=[0.0]"]
    fault = "if stage == 'generate' and os.environ['SLURM_ARRAY_TASK_ID'] == '1' and not os.path.exists('mended'):\n"
    fault += "    sys.exit('dist-train generate: the disk of this node is gone')"
    place = (f"--export=ALL,DIST_TRAIN_ENV={site(tmp_path, patch=fault)}", "--nodes=1", "--gpus-per-node=1")
    place += ("--ntasks-per-node=1", "--cpus-per-task=1", TEMPLATES / "generate.sbatch")
    first = slurm.submit("--array=0-1", *place, *keys, cwd=tmp_path)
    states = {}
    for element in ("0", "1"):
        log = tmp_path / f"generate-{first}_{element}.log"
        states[element] = slurm.wait(f"{first}_{element}", log)["JobState"]
    assert states == {"0": "COMPLETED", "1": "FAILED"}, log.read_text()
    assert "the disk of this node is gone" in journal(out, f"{first}_1")[-1]["said"]
    answers = {path.name: path.stat().st_mtime_ns for path in out.glob("unit-*.parquet")}
    assert len(answers) == 2

    (tmp_path / "mended").touch()
    again = slurm.submit("--array=1", *place, *keys, cwd=tmp_path)
    log = tmp_path / f"generate-{again}_1.log"
    assert slurm.wait(f"{again}_1", log)["JobState"] == "COMPLETED", log.read_text()
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("unit-*.parquet")} == answers


def test_tensorboard_is_reached_as_its_log_says(slurm, tiny, tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "runs" / "one")) as writer:
        writer.add_scalar("train/loss", 1.0, 1)
    job = slurm.submit("--cpus-per-task=1", TEMPLATES / "tensorboard.sbatch", tmp_path / "runs", cwd=tmp_path)
    log = tmp_path / f"tensorboard-{job}.log"
    try:
        slurm.until("it says where it is", lambda: log.exists() and "6006:" in log.read_text(), log)
        said = log.read_text().split("6006:")[1].split()
        (node, port), way = said[0].split(":"), said[1:4]
        assert node == "127.0.0.1" and way[0] == "-J"

        def runs():
            try:
                with urllib.request.urlopen(f"http://{node}:{port}/data/runs", timeout=5) as answer:
                    return answer.read().decode() == '["one"]'
            except OSError:
                return False

        slurm.until("it shows the run", runs, log, timeout=120)
    finally:
        slurm.run("scancel", job)


@pytest.mark.parametrize("kind", ["apptainer", "pyxis"])
def test_a_container_is_one_line_in_env(slurm, tiny, tmp_path, kind):
    """Stand-ins for Apptainer, and for srun with Pyxis: they write down the image and run what they are given."""
    stand_in = {
        "apptainer": 'while [[ $1 != *.sif ]]; do shift; done\necho "image $1" >&2\nshift\nexec "$@"\n',
        "srun": 'given=()\nfor word in "$@"; do\n    case $word in\n    --container-*) echo "$word" ;;\n'
        '    *) given+=("$word") ;;\n    esac\ndone\nexec /usr/bin/srun "${given[@]}"\n',
    }
    name = {"apptainer": "apptainer", "pyxis": "srun"}[kind]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{stand_in[name]}")
    (tmp_path / "bin" / name).chmod(0o755)
    image = {"apptainer": "/images/dist-train.sif", "pyxis": "/images/dist-train.sqsh"}[kind]
    env = site(tmp_path, f"PATH={tmp_path}/bin:$PATH", f"container={image}", "container_mounts=/shared:/shared")
    out = tmp_path / "out"
    keys = [f"inputs={tiny.root / 'text.jsonl'}", f"tokenizer={tiny.tokenizer}", f"out={out}"]
    job = slurm.submit(
        f"--export=ALL,DIST_TRAIN_ENV={env}", "--ntasks-per-node=2", TEMPLATES / "prepare.sbatch", *keys, cwd=tmp_path
    )
    log = tmp_path / f"prepare-{job}.log"
    assert slurm.wait(job, log)["JobState"] == "COMPLETED", log.read_text()
    said = log.read_text()
    assert "2 ranks" in said
    assert [line["event"] for line in journal(out, job)] == ["start", "end"], said
    shown = {"apptainer": f"image {image}", "pyxis": f"--container-image={image}\n--container-mounts=/shared:/shared"}
    assert shown[kind] in said
