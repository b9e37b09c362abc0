"""The doctor: its judgement on tables made by hand, and its examination by real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from dist_train.config import GenerateConfig
from dist_train.doctor import inputs, judge
from dist_train.doctor.examine import rounds
from dist_train.doctor.findings import Finding, render
from dist_train.doctor.judge import Disk, Place
from dist_train.doctor.measure import gpu_faults, xid_faults
from dist_train.generate import stage

# -- judgement --------------------------------------------------------------------------------------------------


def places(*nodes, device="H100"):
    return [Place(rank, node, device) for rank, node in enumerate(nodes)]


def verdicts(findings):
    return {finding.where: finding.verdict for finding in findings}


def test_a_slow_node_is_named_and_no_other():
    rates = [[700, 705, 698], [702, 699, 701], [610, 622, 600], [701, 700, 650]]
    found = judge.judge_rates("gemm", "TFLOP/s", places("a", "b", "c", "d"), rates, "mend it")
    assert verdicts(found) == {"a": "ok", "b": "ok", "c": "FAIL", "d": "ok"}
    assert "rank 2 reaches 622 at best, 11% below the median" in found[2].text  # 1 - 622/701 = 11.3 %
    assert found[2].mend == "mend it" and not found[0].mend


def test_noise_names_nobody():
    """One good repeat is enough to be innocent: something else slowed the others down."""
    rates = [[700, 700, 700], [300, 350, 699], [700, 699, 701]]
    assert set(verdicts(judge.judge_rates("gemm", "TFLOP/s", places("a", "b", "c"), rates, "")).values()) == {"ok"}


@pytest.mark.parametrize(("best", "verdict"), [(90.1, "ok"), (90.0, "FAIL")])
def test_ten_percent_is_the_border(best, verdict):
    found = judge.judge_rates("gemm", "", places("a", "b", "c"), [[100], [100], [best]], "")
    assert verdicts(found)["c"] == verdict


def test_of_two_the_slower_is_named():
    found = judge.judge_rates("gemm", "", places("a", "b"), [[100, 100], [60, 61]], "")
    assert verdicts(found) == {"a": "ok", "b": "FAIL"}


def test_unlike_devices_are_not_compared_but_told():
    mixed = [Place(0, "a", "H100"), Place(1, "b", "A100"), Place(2, "c", "H100")]
    assert set(verdicts(judge.judge_rates("gemm", "", mixed, [[700], [250], [700]], "")).values()) == {"ok"}
    told = judge.judge_devices(mixed, [[], [], []], ["H100", "A100", "H100"])[-1]
    assert told.verdict == "FAIL" and "2 x H100, 1 x A100" in told.text


def test_a_node_is_as_fast_as_its_better_neighbourhood():
    """c is slow: both of its pairs are, while b and d have a fast one."""
    pairs = {("a", "b"): [40.0], ("b", "c"): [20.0], ("c", "d"): [21.0], ("d", "a"): [41.0]}
    found = judge.judge_pairs("links", ["a", "b", "c", "d"], pairs, "cable")
    assert verdicts(found) == {"a": "ok", "b": "ok", "c": "FAIL", "d": "ok"}


@pytest.mark.parametrize("count", range(2, 9))
def test_rounds_pair_each_node_with_both_neighbours_and_never_twice_at_once(count):
    nodes = [f"n{i}" for i in range(count)]
    made = rounds(nodes)
    for pairs in made:
        assert len({node for pair in pairs for node in pair}) == 2 * len(pairs)
    ring = {frozenset((nodes[i], nodes[(i + 1) % count])) for i in range(count)}
    assert {frozenset(pair) for pairs in made for pair in pairs} == ring
    assert sum(map(len, made)) == len(ring)


def test_a_device_with_faults():
    found = judge.judge_devices(
        places("a", "a", "b"), [[], ["uncorrected memory errors since boot (3)"], []], ["x"] * 3
    )
    assert verdicts(found) == {"a": "FAIL", "b": "ok"}
    assert "rank 1: uncorrected memory errors" in found[0].text


def test_what_nvidia_smi_and_the_kernel_say():
    fields = {"ecc": "memory errors", "rows": "rows that could not be remapped", "pending": "rows to be remapped"}
    assert gpu_faults(fields, ["0", "No", "No"]) == []
    assert gpu_faults(fields, ["[N/A]", "[N/A]", "[N/A]"]) == []
    assert gpu_faults(fields, ["2", "Yes", "No"]) == ["memory errors (2)", "rows that could not be remapped (Yes)"]
    log = "[1.0] usb 1-1: new device\n[99.5] NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.\n"
    assert xid_faults(log) == ["1 Xid reports, the last: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."]
    assert xid_faults("nothing") == []


def test_versions_that_differ_from_most():
    same = {"torch": "2.13", "driver": "570"}
    found = judge.judge_versions(["a", "b", "c"], [same, {**same, "driver": "550"}, same])
    assert verdicts(found) == {"a": "ok", "b": "FAIL", "c": "ok"}
    assert found[1].text == "driver 550, elsewhere 570"
    missing = judge.judge_versions(["a", "b", "c"], [same, {"torch": "2.13"}, same])[1]
    assert missing.text == "driver none, elsewhere 570"


def test_a_clock_that_is_off():
    """b is 30 s ahead; leaving the barrier late by 50 ms blames nobody."""
    found = judge.judge_clocks(["a", "b", "c"], [[100, 200, 300], [130, 230, 330], [100.05, 200, 300]])
    assert verdicts(found) == {"a": "ok", "b": "FAIL", "c": "ok"}
    assert found[1].text == "30.000 s ahead of the median"


GIB = 2**30


def test_disks():
    good = Disk("", 0.01, (), 500 * GIB, 10**6)
    found = judge.judge_disk(
        "/shared",
        ["a", "b", "c", "d", "e"],
        [
            good,
            Disk("", 0.01, ("a", "c"), 500 * GIB, 10**6),
            Disk(error="Read-only file system"),
            Disk("", 0.01, (), 1 * GIB, 10**6),
            Disk("", 0.01, (), 500 * GIB, 12),
        ],
    )
    assert verdicts(found) == {"a": "ok", "b": "FAIL", "c": "FAIL", "d": "FAIL", "e": "FAIL"}
    for finding, text in zip(
        found[1:], ("files of a, c do not", "Read-only", "1.0 GiB free", "12 inodes"), strict=True
    ):
        assert text in finding.text and finding.mend
    uncounted = Disk("", 0.01, (), 500 * GIB, None)
    assert judge.judge_disk("/x", ["a"], [uncounted])[0].verdict == "ok"
    assert judge.judge_disk("/x", ["a"], [good], needed=600 * GIB)[0].verdict == "FAIL"


LISTING = "MPI plugin types are...\n\tnone\n\tcray_shasta\n\tpmi2\n\tpmix\nspecific pmix plugin versions: pmix_v4\n"


@pytest.mark.parametrize(
    ("wanted", "listing", "installed", "verdict"),
    [
        ("pmi2", LISTING, "4.1", "ok"),
        ("pmix_v4", LISTING, "4.1", "ok"),
        ("openmpi", LISTING, "4.1", "FAIL"),
        ("pmi2", "srun: MPI types are...\nsrun: pmi2\nsrun: none\n", "4.1", "ok"),
        ("pmi2", "", "4.1", "FAIL"),
        ("pmi2", LISTING, None, "FAIL"),
    ],
)
def test_mpi_plugins(wanted, listing, installed, verdict):
    assert inputs.judge_mpi(wanted, listing, installed).verdict == verdict


def test_a_machine_without_slurm_is_no_fault_but_a_job_without_it_is(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert [finding.verdict for finding in inputs.slurm_findings({})] == ["note"]
    assert [finding.verdict for finding in inputs.slurm_findings({"SLURM_JOB_ID": "7"})] == ["FAIL"]


def test_what_all_nodes_find_is_one_line_and_what_one_finds_is_its_own():
    fine = [[Finding("target", node, "ok", "x"), Finding("data", node, "ok", "y")] for node in ("a", "b")]
    assert [finding.where for finding in inputs.together(fine)] == ["all", "all"]
    fine[1][1] = Finding("data", "b", "FAIL", "gone")
    assert [(finding.where, finding.verdict) for finding in inputs.together(fine)] == [
        ("all", "ok"),
        ("a", "ok"),
        ("b", "FAIL"),
    ]


def test_rows_line_up():
    finding = Finding("disk", "node7", "FAIL", " ".join(["word"] * 60), "mend")
    lines = render(finding, 8).splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= 120
    assert {line.index("word") for line in lines} == {lines[0].index("word")}


# -- examination ------------------------------------------------------------------------------------------------


def rows(output):
    """(check, where) to (verdict, text) of a printed table."""
    found = {}
    for line in output.splitlines():
        if match := re.match(r"(ok|note|FAIL) {2,4}(\S.{0,13}?) {2,}(\S+) {2,}(.*)", line):
            verdict, check, where, text = match.groups()
            found[check, where] = [verdict, text]
        elif line.startswith(" "):
            found[check, where][1] += " " + line.strip()
    return found


def doctors(tmp_path, ranks, *words, size=None, nodes=None):
    """The doctor as SLURM would start it on nodes of these names: its processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in ranks:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size or len(ranks), "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        if nodes:
            place["SLURMD_NODENAME"] = nodes[rank]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "dist_train", "doctor", "--folder", str(tmp_path), *words],
                env={**os.environ, **{name: str(value) for name, value in place.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def outcome(processes, timeout=150):
    try:
        return [(*process.communicate(timeout=timeout), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


@contextmanager
def throttled(process):
    """Let a process run a fifth of the time at most, as a CPU quota would: slow whatever else this machine does."""
    over = threading.Event()

    def turn():
        while not over.wait(0.008):
            process.send_signal(signal.SIGSTOP)
            over.wait(0.032)
            process.send_signal(signal.SIGCONT)

    thread = threading.Thread(target=turn)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def shown_until(process, check):
    """The table of a doctor at work up to the first row of `check`."""
    shown = ""
    while not re.match(rf"\w+ +{re.escape(check)} ", line := process.stdout.readline()):
        assert line, shown + process.stderr.read()
        shown += line
    return shown + line


def test_a_slow_rank_is_named_with_its_node(tmp_path):
    first, second = doctors(tmp_path, [0, 1], nodes=["n1", "n2"])
    try:
        shown = shown_until(first, "ranks")  # long enough before the first that is measured
        with throttled(second):
            shown += shown_until(first, "operators")
        shown += first.stdout.read()
        complaint, silent = first.stderr.read(), second.stdout.read()
        assert (first.wait(60), second.wait(60)) == (1, 1) and silent == ""
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
    found = rows(shown)
    assert found["gemm fp32", "n2"][0] == "FAIL", shown + complaint
    assert "rank 1 reaches" in found["gemm fp32", "n2"][1] and "other processes" in found["gemm fp32", "n2"][1]
    assert found["gemm fp32", "n1"][0] == "ok"
    assert shown.splitlines()[-1] == "1 to mend"
    # Two nodes: everything of one node, and what is between them.
    for rank, node in enumerate(("n1", "n2")):
        for check in ("device", "versions", "operators", "clock", "disk"):
            assert found[check, node][0] == "ok", shown
        device = rf"(no GPU: \d+ cores, \d+\.\d GiB free a rank|.+, \d+ of \d+ GiB free) \(rank {rank}\)"
        assert re.fullmatch(device, found["device", node][1]), shown
    assert "seen by all nodes" in found["disk", "n2"][1]
    assert ("links, between", "all") in found and ("links, all", "all") in found
    assert not list(tmp_path.iterdir()), "the trial files are taken away"


def test_alone_with_a_configuration(tiny, cli, tmp_path):
    words = [f"run.dir={tmp_path / 'run'}", f"tokenizer={tiny.tokenizer}", *tiny.data("chats"), "train.steps=5"]
    words += [f"target.path={tiny.target}", "train.precision=fp32"]
    done = cli("doctor", *words)
    found = rows(done.stdout)
    assert {verdict for verdict, _ in found.values()} <= {"ok", "note"}
    assert "320 pieces; no id is another piece of the target's own" in found["tokenizer", "all"][1]
    assert "vocabulary 320" in found["target", "all"][1]
    assert str(tiny.chats) in found["data", "all"][1] and "begins anew" in found["run folder", "all"][1]
    assert found["memory", "all"][0] == "ok" and found["stage", "all"][0] == "ok"
    assert done.stdout.splitlines()[-1] == "all well"


def test_inputs_that_are_wrong_are_lines_with_a_mend(tiny, cli, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((tiny.target / "config.json").read_text())
    words = [f"run.dir={tmp_path / 'run'}", "tokenizer=/nowhere.model", "data.sources=[{path: /gone}]", "train.steps=5"]
    done = cli("doctor", *words, f"target.path={bare}", "--folder", "/proc", expect=1)
    found = rows(done.stdout)
    assert "check tokenizer" in found["tokenizer", "all"][1]
    assert "a configuration without weights; fetch the rest" in found["target", "all"][1]
    assert "no prepared corpus here" in found["data", "all"][1]
    for check in ("tokenizer", "target", "data", "stage"):
        assert found[check, "all"][0] == "FAIL"
    ((verdict, text),) = [row for (check, _), row in found.items() if check == "disk"]
    assert verdict == "FAIL" and "choose another folder" in text
    assert not done.stderr


def test_what_generate_would_refuse_is_found_before(tiny, tmp_path):
    """Weights that were cut off, and prompts for which the target has no positions."""
    target, seeds = tmp_path / "target", tmp_path / "seeds.jsonl"
    shutil.copytree(tiny.target, target)
    (target / "model.safetensors").write_bytes((target / "model.safetensors").read_bytes()[:-100])
    seeds.write_text(json.dumps({"prompt": "token " * 400}))
    tree = {"target": {"path": str(target)}, "seeds": {"inputs": str(seeds)}, "out": str(tmp_path / "out")}
    found = inputs.input_findings(stage, GenerateConfig.model_validate(tree), "n1")
    wrong = {finding.check: finding.text for finding in found if finding.verdict == "FAIL"}
    assert wrong.keys() == {"target", "stage"}
    assert "model.safetensors: " in wrong["target"] and "has 256 positions" in wrong["stage"]


def test_ranks_that_do_not_come_are_named_in_bounded_time(tmp_path):
    """Rank 0 waits for two others, and elsewhere rank 1 for rank 0."""
    began = time.monotonic()
    waiting = doctors(tmp_path, [0], "--wait", "2", size=3)
    waiting += doctors(tmp_path, [1], "--wait", "1", size=2, nodes=["n1", "n2"])
    (shown, complaint, code), (silent, other_complaint, other_code) = outcome(waiting)
    assert time.monotonic() - began < 90
    assert (code, other_code) == (1, 1) and not shown and not silent
    assert complaint.startswith("FAIL  ranks  ranks 1, 2 of 3 did not come within 2 s; look at their logs")
    assert complaint.count("\n") == 1
    assert re.search(r"FAIL  ranks  rank 1 on n2: rank 0 does not answer at 127.0.0.1:\d+ within 1 s", other_complaint)


def test_a_rank_that_hangs_in_the_middle_ends_the_others_in_bounded_time(tmp_path):
    first, second = doctors(tmp_path, [0, 1], "--wait", "12")
    try:
        shown_until(first, "versions")
        second.send_signal(signal.SIGSTOP)
        _, complaint = first.communicate(timeout=100)
        assert first.returncode == 1
        assert re.search(r"FAIL  \w+: rank 0 on \S+ still waits after 12 s", complaint), complaint
    finally:
        for process in (first, second):
            process.kill()
            process.wait()


def test_nproc(cli, tmp_path):
    """Whatever else this machine is doing: the code says what the table says."""
    with_code = subprocess.run(
        [sys.executable, "-m", "dist_train", "doctor", "--nproc", "2", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    found = rows(with_code.stdout)
    failed = [key for key, (verdict, _) in found.items() if verdict == "FAIL"]
    assert with_code.returncode == (1 if failed else 0)
    assert {check for check, _ in failed} <= {"gemm fp32", "links, node"}, with_code.stdout
    assert "2 started by" in found["ranks", "all"][1]


def test_bad_arguments(refused):
    assert "--wait 0.0: seconds, above 0" in refused("doctor", "--wait", "0")
    assert "unknown key train.leraning_rate" in refused("doctor", "--stage", "pretrain", "train.leraning_rate=1")
