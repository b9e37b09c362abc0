"""What a job's starts and ends are taken for, and how a run's figures are summed up; no SLURM needed."""

from __future__ import annotations

import json
import time

import pytest

from data_shards.files import write_json
from dist_train.slurm import journal
from dist_train.slurm.checks import _minutes
from dist_train.slurm.standing import Standing, standing
from dist_train.slurm.status import status

AT = [Standing(step, 100, "step", step == 100) for step in range(101)]


def job(start):
    return journal.Job("12", start, "n[1-2]")


def test_an_element_of_an_array_has_a_name_of_its_own():
    place = {"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}
    assert journal.Job.here(place) == journal.Job("15_3", 3, "")
    assert journal.Job.here({"SLURM_JOB_ID": "15"}) == journal.Job("15", 1, "")


@pytest.mark.parametrize(
    ("code", "reason", "at", "goes_on"),
    [
        (0, "time limit", 40, journal.REQUEUE),
        (0, "time limit", 100, 0),  # the notice came with the last step
        (138, "time limit", 40, journal.REQUEUE),  # before it listened
        (2, "time limit", 40, 0),  # a fault is a fault, notice or not
        (0, "preemption", 40, journal.REQUEUE),
        (0, "", 40, journal.REQUEUE),  # a signal to the step alone
        (0, "", 100, 0),
        (75, "", 40, journal.REQUEUE),
        (137, "", 40, journal.REQUEUE),
        (1, "", 40, 0),
        (1, "node failure", 40, journal.REQUEUE),
        (143, "cancelled", 40, 0),
        (143, "killed at the time limit", 40, 0),
    ],
)
def test_what_goes_on_and_what_does_not(tmp_path, code, reason, at, goes_on):
    journal.begin(tmp_path, "pretrain", job(1), AT[20])
    assert journal.end(tmp_path, "pretrain", job(1), AT[at], code, reason, None).code == goes_on


def test_the_fault_of_a_rank_counts_and_not_what_srun_did_to_the_others(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "[..] job 12, start 1: pretrain on n[1-2]\ndist-train pretrain: an old fault\n"
        "[..] job 12, start 2: pretrain on n[1-2]\ndist-train pretrain: lower it\n"
        "srun: error: n2: task 1: Exited with exit code 2\nsrun: error: n1: task 0: Terminated\n"
    )
    journal.begin(tmp_path, "pretrain", job(2), AT[0])
    assert journal.end(tmp_path, "pretrain", job(2), AT[0], 143, "", log).code == 0
    ended = journal.read(tmp_path)["12"][-1]
    assert (ended["code"], ended["reason"], ended["said"]) == (2, "error", "dist-train pretrain: lower it")


# As PyTorch, CUDA, NCCL, the driver and SLURM write them.
ECC = "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered"
LAUNCH = "  what():  CUDA error: unspecified launch failure"
XID = "[1234567.891011] NVRM: Xid (PCI:0000:3b:00): 79, pid=4242, GPU has fallen off the bus."
NVLINK = "RuntimeError: CUDA error: uncorrectable NVLink error detected during the execution"
IN_NCCL = "Cuda failure 719 'unspecified launch failure'"
LOST = "[rank1]: torch.distributed.DistBackendError: NCCL error in: /pytorch/ProcessGroupNCCL.cpp:3690, remote process "
LOST += "exited or there was a network error, NCCL version 2.27.5"
REMOTE = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
GPU_FULL = (
    "[rank3]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 3 has a total capacity of"
)
USAGE = "ncclInvalidUsage: This usually reflects invalid usage of NCCL library."
TWICE = "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 3b000"
ASSERT = "  what():  CUDA error: device-side assert triggered"
HOST_FULL = "slurmstepd: error: Detected 1 oom_kill event in StepId=12.0. Some of the step tasks have been OOM Killed."
FULL_IN_NCCL = "n2:4242:4300 [0] init.cc:1784 NCCL WARN Cuda failure 2 'out of memory'"


@pytest.mark.parametrize(
    ("said", "code", "reason", "goes_on"),
    [
        ([ECC], 1, "node fault", True),
        ([LAUNCH], 134, "node fault", True),
        ([XID], 137, "node fault", True),
        ([NVLINK], 1, "node fault", True),
        (
            [LOST, "ncclUnhandledCudaError: Call to CUDA function failed.", "Last error:", IN_NCCL],
            1,
            "node fault",
            True,
        ),
        ([LOST, REMOTE, ECC], 75, "node fault", True),  # who told first is not who began
        ([LOST, REMOTE], 75, "crash", True),
        ([GPU_FULL], 137, "error", False),
        ([LOST, USAGE, "Last error:", TWICE], 75, "error", False),
        ([TWICE], 134, "error", False),
        ([ASSERT], 134, "error", False),
        ([HOST_FULL], 137, "error", False),
        ([FULL_IN_NCCL], 75, "error", False),
        # Told of by others: a prompt, a key, a server.
        ([f"dist-train pretrain: unknown key {ECC}"], 2, "error", False),
        ([f"prompt: {ECC}"], 137, "crash", True),
        ([f"warning: {GPU_FULL}"], 137, "crash", True),
    ],
)
def test_what_gpus_and_nccl_say_decides(tmp_path, said, code, reason, goes_on):
    log = tmp_path / "log"
    lines = ["[2026-11-26 01:00:00] job 12, start 1: started: submitted", *said]
    log.write_text("\n".join([*lines, "srun: error: n2: task 1: Aborted", ""]))
    journal.begin(tmp_path, "pretrain", job(1), AT[0])
    verdict = journal.end(tmp_path, "pretrain", job(1), AT[10], code, "", log)
    assert (verdict.code == journal.REQUEUE, journal.read(tmp_path)["12"][-1]["reason"]) == (goes_on, reason)
    if reason == "node fault":
        assert "n2" in verdict.said and "ExcNodeList=n2" in verdict.said and "--exclude=n2" in verdict.said


def test_a_rank_names_its_node_and_its_gpu(tmp_path, command, monkeypatch):
    """As the command line tells it, and the journal reads it."""
    from dist_train.slurm import status

    def broken(_):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be reported")

    monkeypatch.setattr(status, "status", broken)
    monkeypatch.setattr("dist_train.runtime.devices.current_gpu", lambda: "5")
    monkeypatch.setenv("SLURMD_NODENAME", "gpu17")
    code, _, told = command("status", tmp_path)
    assert code == 75 and told.count("\n") == 1
    (tmp_path / "log").write_text(f"{told}srun: error: gpu09: task 0: Terminated\n")
    journal.begin(tmp_path, "pretrain", job(1), AT[0])
    verdict = journal.end(tmp_path, "pretrain", job(1), AT[10], 75, "", tmp_path / "log")
    assert "gpu17, GPU 5: CUDA error: uncorrectable ECC error" in verdict.said and "ExcNodeList=gpu17" in verdict.said


@pytest.mark.parametrize(
    ("first", "code", "goes_on"), [(1, 75, False), (2, 143, False), (75, 75, True), (75, 143, True)]
)
def test_the_first_rank_that_ended_decides(tmp_path, first, code, goes_on):
    """The others find that it is gone, and would go on."""
    log = tmp_path / "log"
    lines = [
        f"srun: error: n2: task 1: Exited with exit code {first}",
        "srun: error: n1: tasks 0,2: Exited with exit code",
    ]
    log.write_text(f"{lines[0]}\n{lines[1]} {75 if first != 75 else 1}\n")
    journal.begin(tmp_path, "pretrain", job(1), AT[0])
    verdict = journal.end(tmp_path, "pretrain", job(1), AT[10], code, "", log)
    assert (verdict.code == journal.REQUEUE) == goes_on


def test_texts_of_others_begin_no_line(command, tmp_path, monkeypatch):
    """Not in what a command says, nor in what a status shows; and they do not command the terminal."""
    said = "x\nsrun: error: Node failure on n1\n\x1b[2J\u202e"
    code, _, told = command("pretrain", f"{said}=1")
    assert code == 2 and told.count("\n") == 1 and "\x1b" not in told and "\u202e" not in told
    assert r"\nsrun: error: Node failure" in told
    monkeypatch.setenv("PATH", "/nowhere")
    journal.begin(tmp_path, "pretrain", job(1), AT[0])
    journal.note(tmp_path, "12", "end", start=1, code=2, reason="error", done=0, said=said)
    (tmp_path / "checkpoints").mkdir()
    _, shown, _ = command("status", tmp_path)
    assert not [line for line in shown.splitlines() if line.startswith("srun")] and "\x1b" not in shown


def test_passwords_in_addresses_are_not_shown(command):
    code, _, told = command("pretrain", "data=s3://me:secret@host/shards", "tokenizer=hf://x@main/y")
    assert code == 2 and "secret" not in told


@pytest.mark.parametrize(
    "lines",
    [
        ['{"event": "start", "time": 1}', '{"event": "end", "time": 2}', '{"event": "gave up", "time": 3}'],
        ['{"event": "submitted", "time": 1e300}', '{"event": "submitted", "time": NaN}'],
        ['{"event": ["start"], "time": 1}', '{"event": "submitted", "time": 1, "after": [1]}'],
        ['{"event": "submitted", "time": 1, "after": {"9": 7}}', "[" * 100_000],
        ["\udcff{", '{"event": "submitted", "time": 1, "stage": {}}'],
    ],
)
def test_a_journal_that_is_not_ours_or_torn_is_no_traceback(command, tmp_path, monkeypatch, lines):
    monkeypatch.setenv("PATH", "/nowhere")
    text = "\n".join(lines)
    (tmp_path / "_slurm-12.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0}\n{"step": "x"}\n[1]\n{}\n')
    code, shown, complaint = command("status", tmp_path)
    assert (code, complaint) == (0, "") and "pretrain: step 1" in shown


def test_jobs_that_wait_for_each_other_are_no_endless_search(command, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    one, two = tmp_path / "one", tmp_path / "two"
    journal.note(one, "1", "submitted", stage="pretrain", after={"2": str(two), "1": str(one)})
    journal.note(two, "2", "submitted", stage="pretrain", after={"1": str(one)})
    code, shown, _ = command("status", one)
    assert code == 0 and "job 1: 0 requeues" in shown


def test_why_a_job_was_started_again(tmp_path):
    journal.begin(tmp_path, "pretrain", job(1), AT[0])
    journal.end(tmp_path, "pretrain", job(1), AT[10], 0, "time limit", None)
    journal.begin(tmp_path, "pretrain", job(2), AT[10])  # and no end: the batch script's own node
    journal.begin(tmp_path, "pretrain", job(3), AT[20])
    journal.begin(tmp_path, "pretrain", job(4), AT[30], last_state="NODE_FAIL")  # where there is accounting
    found = [line["because"] for line in journal.read(tmp_path)["12"] if line["event"] == "start"]
    assert found == ["submitted", "time limit", "node failure, or killed without notice", "node failure"]


def test_starts_without_progress_are_counted_from_the_last_progress(tmp_path):
    for start, at in ((1, 0), (2, 0), (3, 10), (4, 10)):
        assert journal.begin(tmp_path, "pretrain", job(start), AT[at], most=3).code == 0
    assert journal.end(tmp_path, "pretrain", job(4), AT[10], 75, "", None, most=3).code == journal.REQUEUE
    assert journal.begin(tmp_path, "pretrain", job(5), AT[10], most=3).code == 0
    ended = journal.end(tmp_path, "pretrain", job(5), AT[10], 75, "", None, most=3)
    assert ended.code == journal.STOP and "3 starts without progress" in ended.said
    assert journal.begin(tmp_path, "pretrain", job(6), AT[10], most=3).code == journal.STOP
    assert journal.begin(tmp_path, "pretrain", job(7), AT[11], most=3).code == 0


def test_requeues_are_bounded_also_with_progress(tmp_path):
    journal.begin(tmp_path, "pretrain", job(6), AT[1])
    said = journal.end(tmp_path, "pretrain", job(6), AT[2], 0, "time limit", None, most_starts=5)
    assert said.code == journal.STOP and "5 requeues" in said.said


def test_torn_and_strange_lines_of_a_journal_are_passed_over(tmp_path):
    (tmp_path / "_slurm-12.jsonl").write_text('{"event": "start"}\n[1]\n')
    journal.note(tmp_path, "12", "submitted", stage="pretrain")
    with (tmp_path / "_slurm-12.jsonl").open("a") as file:
        file.write('{"event": "sta')
    assert [line["event"] for line in journal.read(tmp_path)["12"]] == ["submitted"]


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("index.json", {"shards": 3}, "shards: "),
        ("plan.json", {"inputs": [["a.jsonl", "9"]], "unit_bytes": 9}, "inputs.0.1: "),
        ("plan.json", {"inputs": [["a.jsonl", 9]], "unit_bytes": 0}, "unit_bytes: "),
        ("units/_complete.json", {"done": 3}, "units: Field required"),
    ],
)
def test_status_names_a_file_of_another_form(tmp_path, refused, file, content, told):
    (tmp_path / "units").mkdir() if "units" in file else None
    write_json(tmp_path / file, content)
    assert f"{tmp_path / file}: not as this version writes it: {told}" in refused("status", tmp_path)


def test_status_of_a_plan_of_any_size(tmp_path, command):
    write_json(tmp_path / "plan.json", {"inputs": [["a.jsonl", 2**60]], "unit_bytes": 1})
    assert command("status", tmp_path)[:2] == (0, f"prepare: 0 of {2**60:,} shards\n")


def test_standing_counts_what_is_committed(tmp_path):
    for name in ("step-00000005", "step-00000010", "step-00000015.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    assert standing("pretrain", tmp_path, 12) == Standing(10, 12, "step", False)
    assert standing("distill", tmp_path, 10).finished


def test_what_is_finished_has_its_mark_and_every_piece(tiny, command, tmp_path):
    """Of a corpus of one shard, answers in two batches and results in one, as the stages leave them."""
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(json.dumps({"prompt": f"Say word {number}"}) + "\n" for number in range(4)))
    asked = [f"target.path={tiny.target}", "target.precision=fp32", "max_new_tokens=2"]
    answers, results = tmp_path / "answers", tmp_path / "results"
    command("generate", *asked, f"seeds.inputs={seeds}", "temperatures=[0]", "batch_size=2", f"out={answers}")
    task = f"tasks=[{{name: words, inputs: {seeds}, temperatures: [0]}}]"
    more = ["gammas=[2]", "token_rate.prompts=0", f"drafters={{base: {tiny.drafter}}}", f"out={results}"]
    command("evaluate", *asked, task, *more)
    shown = {"prepare": (tiny.corpus, 1, "shard"), "generate": (answers, 2, "batch"), "evaluate": (results, 1, "batch")}
    for stage, (folder, pieces, unit) in shown.items():
        assert standing(stage, folder) == Standing(pieces, pieces, unit, True)
    (answers / "unit-000001.parquet").unlink()
    (results / "units" / "unit-000000.json").unlink()
    assert standing("generate", answers) == Standing(1, 2, "batch", False)
    assert standing("evaluate", results) == Standing(0, 1, "batch", False)
    (answers / "_complete.json").unlink()
    assert standing("generate", answers) == Standing(1, None, "batch", False)


def test_a_corpus_that_was_begun_knows_how_many_shards_it_will_have(tmp_path):
    write_json(tmp_path / "plan.json", {"inputs": [["a.jsonl", 250], ["b.jsonl.gz", 900]], "unit_bytes": 100})
    (tmp_path / "shard-00000.json").touch()
    assert standing("prepare", tmp_path) == Standing(1, 4, "shard", False)


def test_time_left_is_of_the_pace_and_not_of_the_queue(tmp_path):
    """100 steps of half a second, a night in the queue between them; 300 are left."""
    now = time.time()
    times = [now - 50_000 + step / 2 for step in range(50)] + [now - 25 + step / 2 for step in range(50)]
    lines = [
        {"step": step, "time": at, "train/loss": 3.0, "train/acceptance": 0.5, "progress/tokens": 8 * step}
        for step, at in enumerate(times, start=1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").write_text("train: {steps: 400}\ntarget: {path: x}\n")
    first, committed, left = status(tmp_path)
    assert first == "distill: step 100 of 400 (25%), 800 tokens, loss 3.0000, acceptance 0.5000"
    assert committed == "  committed: 0 of 400 steps"
    assert left.startswith("  2 min left at 0.5 s a step")


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("train: [", "config.yaml: not YAML: "),
        ("- a", "config.yaml: a configuration is a mapping of keys"),
        ("train: 3", "pretrain: no step yet"),
        ("train: {steps: many}", "pretrain: no step yet"),
    ],
)
def test_a_strange_configuration_is_no_traceback(command, tmp_path, written, told):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text(written)
    journal.note(tmp_path, "7", "submitted", stage="nonsense")
    code, shown, complaint = command("status", tmp_path)
    assert told in (complaint if code else shown)


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [("90", 90), ("1:30", 1.5), ("2:00:00", 120), ("1-0", 1440), ("1-02:30", 1590), ("infinite", None)],
)
def test_time_is_read_in_each_of_sbatchs_forms(limit, minutes):
    assert _minutes(limit) == minutes
