"""`dist-train submit` and `dist-train status`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from slurm_jobs import TEMPLATES, journal, steps_of, training

CLI = [sys.executable, "-m", "dist_train"]


def as_tree(keys):
    """The overrides of a stage as the mapping that a pipeline's file has."""
    tree = {}
    for key in keys:
        name, value = key.split("=", 1)
        node = tree
        for part in name.split(".")[:-1]:
            node = node.setdefault(part, {})
        node[name.split(".")[-1]] = yaml.safe_load(value)
    return tree


@pytest.fixture
def stages(tiny, tmp_path):
    """The method from seeds to results, as the stages of a pipeline."""
    lines = tmp_path / "seeds.jsonl"
    lines.write_text("".join(json.dumps({"prompt": f"Say word {number}"}) + "\n" for number in range(8)))
    target = [f"target.path={tiny.target}", "target.precision=fp32"]
    generate = [*target, f"seeds.inputs={lines}", f"out={tmp_path / 'answers'}", "max_new_tokens=8", "batch_size=4"]
    prepare = [f"inputs={tmp_path / 'answers'}", "format=chat", f"tokenizer={tiny.tokenizer}"]
    prepare += [f"out={tmp_path / 'shards'}", f"sequence_length={tiny.sequence_length}"]
    distill = training(tiny, tmp_path / "run", *target, f"data.sources=[{{path: {tmp_path / 'shards'}}}]", steps=3)
    evaluate = [*target, f"drafters={{base: {tmp_path / 'run'}}}", f"tasks=[{{name: words, inputs: {lines}}}]"]
    evaluate += [f"out={tmp_path / 'results'}", "max_new_tokens=8", "token_rate.prompts=0"]
    one = {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0}
    return {
        "generate": {"config": as_tree(generate)},
        "answers": {"stage": "prepare", "config": as_tree(prepare), "slurm": one},
        "distill": {"config": as_tree(distill)},
        "evaluate": {"config": as_tree(evaluate), "slurm": {"nodes": 1}},
    }


def pipeline(tmp_path, stages, **slurm):
    site = tmp_path / "site.sh"
    site.write_text("echo the site has spoken\n")
    asked = {"nodes": 2, "gpus_per_node": 1, "cpus_per_task": 1, "env": str(site), **slurm}
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"slurm": asked, "stages": stages}, sort_keys=False))
    return path


def jobs_in(told):
    return [line.split("as job ")[1].split(";")[0] for line in told.splitlines() if line.startswith("submitted")]


def test_a_pipeline_is_one_command(slurm, stages, tmp_path):
    told = slurm.run(*CLI, "submit", "pipeline", pipeline(tmp_path, stages), cwd=tmp_path).stdout
    jobs = jobs_in(told)
    assert len(jobs) == 4
    for stage, job in zip(("generate", "prepare", "distill", "evaluate"), jobs, strict=True):
        log = tmp_path / (f"{stage}-{job}_0.log" if stage == "generate" else f"{stage}-{job}.log")
        assert slurm.wait(job, log)["JobState"] == "COMPLETED", log.read_text()
        assert "the site has spoken" in log.read_text()
    assert list((tmp_path / "answers").glob("unit-*.parquet"))
    assert steps_of(tmp_path / "run") == [1, 2, 3]
    assert (tmp_path / "results" / "results.md").exists()
    watched = next(line for line in told.splitlines() if line.startswith("watch: dist-train ")).split()[2:]
    shown = slurm.run(*CLI, *watched, cwd=tmp_path).stdout
    assert "distill: step 3 of 3 (100%), 384 tokens, loss" in shown and "acceptance" in shown
    assert shown.count("finished") == 4, shown


def test_a_failing_stage_stops_the_chain_with_its_reason(login_node, command, tiny, tmp_path):
    """A fault is not requeued, what waits for the job is cancelled, and `status` says why, two jobs further on."""
    bad = training(tiny, tmp_path / "one", "train.learning_rate=1e30", steps=50)
    then = training(tiny, tmp_path / "two", f"drafter.init_from={tmp_path / 'one'}", steps=2)
    last = training(tiny, tmp_path / "three", f"drafter.init_from={tmp_path / 'two'}", steps=2)
    stages = {
        name: {"stage": "pretrain", "config": as_tree(keys)}
        for name, keys in (("one", bad), ("two", then), ("three", last))
    }
    code, told, _ = command("submit", "pipeline", pipeline(tmp_path, stages))
    assert code == 0
    first, second, third = jobs_in(told)
    log = tmp_path / f"pretrain-{first}.log"
    known = login_node.wait(first, log)
    assert (known["JobState"], known["Restarts"]) == ("FAILED", "0"), log.read_text()
    assert login_node.wait(second, log)["JobState"] == login_node.wait(third, log)["JobState"] == "CANCELLED"
    code, shown, _ = command("status", tmp_path / "three")
    assert code == 0
    assert "CANCELLED" in shown
    assert f"job {first} ({tmp_path / 'one'}), on which it depends, failed with code 2: dist-train pretrain: " in shown
    assert "lower train.learning_rate" in shown
    assert journal(tmp_path / "one", first)[-1]["reason"] == "error"


def known_jobs(slurm):
    return set(slurm.run("squeue", "-h", "-a", "-t", "all", "-o", "%A").stdout.split())


def test_submit_refuses_before_slurm_is_asked(login_node, refused, tiny, stages, tmp_path):
    before = known_jobs(login_node)
    keys = training(tiny, tmp_path / "run", steps=3)
    small = ("--gpus-per-node", "1")
    for more, complaint in (
        (("data.sources.0.path=nowhere",), "nowhere"),
        (("--env", "nowhere.sh", *small), "nowhere.sh: no such file"),
        (("--partition", "moon"), "no partition moon here; there are all, urgent"),
        ((), "1 nodes with 8 GPUs each are asked for; partition all has 2 nodes with at most 2"),
        (("--nodes", "3", *small), "3 nodes with 1 GPUs"),
        (("--partition", "urgent", "--time", "1:00:00", *small), "--time 1:00:00 is more than partition urgent allows"),
        (("--array", "0-3", *small), "--array 0-3: only generate"),
        (("--sbatch-option=--qos=none", "--sbatch-option=--begin=never", *small), "sbatch refused: "),
        (("drafter.hidden_size=1048576", "drafter.mlp_size=1048576", *small), "GiB free, checkpoints will take"),
    ):
        assert complaint in refused("submit", "pretrain", *keys, *more)
    assert "3 nodes with 1 GPUs" in refused("submit", "pipeline", pipeline(tmp_path, stages), "slurm.nodes=3")
    assert known_jobs(login_node) <= before  # ended ones are forgotten after some minutes


@pytest.mark.parametrize(
    ("mistake", "complaint"),
    [
        ("distill.config.train.stpes=3", "stages.distill.config: unknown key train.stpes; did you mean"),
        ("distill.slurm.partitoin=x", "unknown key stages.distill.slurm.partitoin; did you mean"),
        ("distill.after=[generat]", "generat is not before it; did you mean generate?"),
        ("distill.after=[]", "/shards here, and no stage before makes it; stages.answers makes it"),
        ("answers.config.inputs=nowhere", "stages.answers.config: inputs: no nowhere here"),
        ("distill.config.run.dir={tmp}/shards", "both write to"),
        ("answers.stage=null", "stages.answers: no stage of that name; add stage: one of"),
        ("generate.config.more_seeds=[{inputs: /no}]", "stages.generate.config: more_seeds.0.inputs: no /no here"),
        ("answers.config.tokenizer=/no", "stages.answers: /no: no such tokenizer"),
        ("distill.config.tokenizer=/no", "stages.distill: /no: no such tokenizer"),
        ("distill.config.target.path=/no", "stages.distill: /no: no target model"),
        ("distill.config.drafter.init_from={other}", "stages.distill: drafter.init_from: {other}: a vocabulary of 310"),
        ("distill.config.held_out.path={other}", "stages.distill: {other}: "),
        ("evaluate.config.drafters.other={other}", "stages.evaluate: drafters.other: {other}: a vocabulary of 310"),
        ("evaluate.config.tasks.0.inputs=/no", "stages.evaluate.config: tasks.0.inputs: no /no here"),
        ("evaluate.config.tasks.0.prompt_field=word", "stages.evaluate: "),
        ("evaluate.slurm.env=/no", "stages.evaluate: /no: no such file; --env takes"),
        ("distill.slurm.array=0-3", "stages.distill: --array 0-3: only generate"),
    ],
)
def test_a_pipeline_is_refused_before_its_first_stage_is_submitted(
    refused, stages, tiny, tmp_path, monkeypatch, mistake, complaint
):
    """Also for what only a later stage reads, where no stage before makes it."""
    monkeypatch.setenv("PATH", "/nowhere")  # no SLURM
    other = tmp_path / "other"
    shutil.copytree(tiny.drafter, other)
    shape = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**shape, "vocab_size": 310}))
    mistake, complaint = (
        text.replace("{tmp}", str(tmp_path)).replace("{other}", str(other)) for text in (mistake, complaint)
    )
    assert complaint in refused("submit", "pipeline", pipeline(tmp_path, stages), f"stages.{mistake}")
    assert not list(tmp_path.rglob("_slurm-*"))


def test_what_is_asked_of_slurm_for_all_stages_is_checked_and_kept(command, refused, stages, tmp_path):
    again = {"stage": "generate", "config": {**stages["generate"]["config"], "out": "more"}, "after": []}
    asked = ("submit", "pipeline", pipeline(tmp_path, {**stages, "again": again}), "--dry-run")
    assert "stages.answers: --array 0-3: only generate" in refused(*asked, "--array", "0-3")
    assert "gpus_per_node: " in refused(*asked, "--gpus-per-node=-1")
    code, told, _ = command(*asked, "--after", "77:78")
    options = [line for line in told.splitlines() if line.startswith("sbatch ")]
    assert code == 0
    assert ["--dependency=afterok:77:78" in line for line in options] == [True, False, False, False, True]


def test_what_sbatch_takes_needs_no_quotes(command, stages, tmp_path, monkeypatch):
    """slurm/README.md's own example, and numbers that are names."""
    monkeypatch.setenv("PATH", "/nowhere")  # no SLURM
    path = pipeline(tmp_path, {"generate": stages["generate"]})
    slurm = f"slurm: {{time: 12:00:00, account: 0123, partition: 7, array: 3, env: {tmp_path / 'site.sh'}}}\n"
    path.write_text(slurm + path.read_text()[path.read_text().index("stages:") :])
    for more, option in (
        ((), "--time=12:00:00"),
        (("slurm.time=1-2:30",), "--time=1-2:30"),
        (("slurm.time=90",), "--time=90"),
    ):
        code, told, complaint = command("submit", "pipeline", path, "--dry-run", *more)
        assert code == 0, complaint
        options = next(line for line in told.splitlines() if line.startswith("sbatch ")).split()
        assert {option, "--account=0123", "--partition=7", "--array=3"} <= set(options)


def test_dry_run_prints_the_script_and_submits_nothing(login_node, command, tiny, stages, tmp_path):
    before = known_jobs(login_node)
    keys = training(tiny, tmp_path / "run", steps=3)
    options = ("--nodes", 4, "--gpus-per-node", 8, "--notice", 120, "--sbatch-option=--qos=high", "--dry-run")
    code, told, _ = command("submit", "pretrain", *keys, *options)
    assert code == 0
    assert "--nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --signal=B:USR1@120 --qos=high" in told
    assert "DIST_TRAIN_NOTICE=120" in told
    assert (TEMPLATES / "pretrain.sbatch").read_text() in told
    assert "# note: would be refused: 4 nodes with 8 GPUs each" in told
    code, told, _ = command("submit", "pipeline", pipeline(tmp_path, stages), "--dry-run")
    assert code == 0
    assert "--dependency=afterok:'<generate>'" in told or "'--dependency=afterok:<generate>'" in told
    assert known_jobs(login_node) <= before  # ended ones are forgotten after some minutes
    assert not list(tmp_path.rglob("_slurm-*"))


def test_a_wheel_submits_and_reports_without_slurm(tiny, tmp_path):
    """Away from the checkout and without SLURM's commands: templates and DeepSpeed configurations travel with it."""
    root = Path(__file__).parents[2]
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, root]
    subprocess.run(list(map(str, build)), check=True, cwd=tmp_path, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site-packages")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site-packages"), "PATH": "/nowhere"}

    def run(*words):
        command = [*CLI, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = run("submit", "pretrain", *training(tiny, tmp_path / "run", steps=3), "--dry-run")
    assert str(tmp_path / "site-packages" / "dist_train" / "_resources" / "slurm" / "pretrain.sbatch") in told
    packed = tmp_path / "site-packages" / "dist_train" / "_resources"
    for folder in ("slurm", "ds_configs"):
        tracked = {path.name for path in (root / folder).iterdir() if path.is_file()}
        assert {path.name for path in (packed / folder).iterdir()} == tracked
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "_slurm-7.jsonl").write_text('{"event": "submitted", "time": 1, "stage": "pretrain"}\n')
    assert "job 7: 0 requeues; no squeue here to ask" in run("status", "run")
