"""What happened to the jobs of a folder: `_slurm-JOB.jsonl`, a line for each submission, start and end.

One file a job, or an element of an array, because appending from several nodes to one file loses lines on NFS. The name
begins with an underscore, which readers of a folder of answers pass over. Written by the batch script
(`slurm/run_stage.sh`) through `dist-train job`, before the step and after it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from dist_train.errors import UserError, printable
from dist_train.runtime.faults import Fault, first_fault
from dist_train.slurm.standing import TRAINING, Standing

PREFIX = "_slurm-"
STOP = 3
"""Exit code of `dist-train job begin`: do not start."""
REQUEUE = 75
"""Exit code of `dist-train job end`: hand the job back to SLURM. The stages' own for the same (EX_TEMPFAIL)."""
MAX_FRUITLESS = 3
"""Starts at the same standing, one after the other, after which a job is given up."""

OVER = ("cancelled", "killed at the time limit", "requeued")
_KILLED = 128  # exit codes above: ended by a signal
# The states that sacct shows, where a site keeps accounts.
_NODE_FAULT = "node fault"
_STATES = {"NODE_FAIL": "node failure", "PREEMPTED": "preemption", "TIMEOUT": "time limit", "REQUEUED": "requeued"}


# What a line has beside its event and time, by event: lines are read that another version, or a torn write, has made.
_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "submitted": {},
    "start": {
        "start": int, "nodes": str, "because": str, "done": int, "total": (int, NoneType), "unit": str,
    },
    "end": {"start": int, "code": int, "reason": str, "done": int, "said": str},
    "gave up": {"start": int, "done": int},
}  # fmt: skip
_LATEST = 2.0**40  # seconds: beyond it is no time


@dataclass(frozen=True)
class Job:
    """One job as it sees itself: `start` counts from 1, and again for each requeue."""

    id: str
    start: int
    nodes: str

    @classmethod
    def here(cls, environment: Mapping[str, str]) -> Job:
        """From SLURM's variables; an element of an array is JOB_ELEMENT."""
        array = environment.get("SLURM_ARRAY_JOB_ID")
        name = f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"]
        start = int(environment.get("SLURM_RESTART_COUNT", 0)) + 1
        return cls(name, start, environment.get("SLURM_JOB_NODELIST", ""))


@dataclass(frozen=True)
class Verdict:
    """What to say in the job's log, and the exit code that tells the batch script what to do."""

    said: str
    code: int = 0


def note(folder: Path, job: str, event: str, **what: Any) -> None:
    """Append a line to a job's file; the folder is made where it is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{PREFIX}{job}.jsonl").open("a") as file:
        file.write(json.dumps({"event": event, "time": time.time(), **what}) + "\n")


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of every job of a folder, jobs in the order of their first lines; torn and strange ones left out.

    Raises UserError where a file cannot be read.
    """
    jobs = {}
    for path in folder.glob(f"{PREFIX}*.jsonl"):
        try:
            text = path.read_text(errors="replace")
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        lines = [event for line in text.splitlines() if (event := _event(line)) is not None]
        if lines:
            jobs[path.stem.removeprefix(PREFIX)] = lines
    return dict(sorted(jobs.items(), key=lambda entry: entry[1][0]["time"]))


def _event(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str) or event["event"] not in _FIELDS:
        return None
    fields = {"time": (int, float), **_FIELDS[event["event"]]}
    if not all(name in event and isinstance(event[name], kind) for name, kind in fields.items()):
        return None
    after = event.get("after", {})
    sane = isinstance(after, dict) and all(isinstance(place, str) for place in after.values())
    return event if sane and 0 <= event["time"] < _LATEST else None


def begin(
    folder: Path, stage: str, job: Job, now: Standing, last_state: str = "", most: int = MAX_FRUITLESS
) -> Verdict:
    """Note a start with the reason for it and the standing it finds; tells to stop after `most` that led nowhere.

    `last_state`: what sacct says of the start before, where there is accounting.
    """
    lines = read(folder).get(job.id, [])
    because = "submitted" if job.start == 1 else _why_again(lines, job.start - 1, last_state)
    tried = _fruitless(lines, now.done)
    if tried >= most:
        note(folder, job.id, "gave up", start=job.start, done=now.done)
        return Verdict(f"given up: {tried} starts without progress, {now} since; mend it and submit again", STOP)
    note(
        folder, job.id, "start", stage=stage, start=job.start, nodes=job.nodes, because=because, done=now.done,
        total=now.total, unit=now.unit,
    )  # fmt: skip
    return Verdict(f"started: {because}; {now} done" + (f", {tried} starts without progress" if tried > 1 else ""))


def _why_again(lines: list[dict[str, Any]], start: int, last_state: str) -> str:
    ended = [line["reason"] for line in lines if line["event"] == "end" and line["start"] == start]
    if last_state in _STATES and not (ended and ended[-1]):
        return _STATES[last_state]
    if not ended:  # the batch script was killed too: it was on that node, or had no time to write
        return "node failure, or killed without notice"
    return ended[-1] or "requeued"


def _fruitless(lines: list[dict[str, Any]], done: int) -> int:
    """How many starts, back from the newest, found the same standing as there is now."""
    found = 0
    for line in reversed([line for line in lines if line["event"] == "start"]):
        if line["done"] != done:
            break
        found += 1
    return found


def end(
    folder: Path, stage: str, job: Job, now: Standing, code: int, reason: str, log: Path | None,
    most: int = MAX_FRUITLESS, most_starts: int = 200,
) -> Verdict:  # fmt: skip
    """Note an end and decide how it goes on.

    `code` is srun's, `reason` what the batch script found out, `log` the job's own. A stage that tells an error (codes
    1 and 2), or whose log does (out of memory, a device-side assert, a misused NCCL), is not started again; one that
    was interrupted, crashed (killed by a signal, hung, a peer lost) or met a broken GPU is, while it gets on.
    """
    said = _said(log, job.start)
    code = _first_exit(said, code)
    fault = first_fault(said) if code and reason not in (*OVER, "node failure") else None
    if fault and fault.kind == "node fault":
        reason = _NODE_FAULT
    again = (code == 0 and not now.finished) or code == REQUEUE or code > _KILLED
    again = reason in ("node failure", _NODE_FAULT) or (again and not (fault and fault.kind == "error"))
    if code and not again and reason not in OVER:
        reason = "error"
    elif code and not reason:
        reason = "crash"
    elif not code and not reason and stage in TRAINING and not now.finished:
        reason = "signal"  # to the step alone, which saved and ended well
    complaint = _complaint(said, fault) if code and reason not in OVER else ""
    note(folder, job.id, "end", start=job.start, code=code, reason=reason, done=now.done, said=complaint)
    how = f"ended with {code}{f' ({reason})' if reason else ''}: {now} done"
    if fault and reason == _NODE_FAULT:
        how += f"; {_whose(fault, job)}"
    if reason in OVER or not again or not reason:
        return Verdict(how)
    if job.start > most_starts:
        return Verdict(f"{how}; not requeued: {most_starts} requeues (DIST_TRAIN_MAX_REQUEUES) are made", STOP)
    tried = _fruitless(read(folder)[job.id], now.done)
    if tried >= most:
        note(folder, job.id, "gave up", start=job.start, done=now.done)
        return Verdict(f"{how}; given up: {tried} starts without progress; mend it and submit again", STOP)
    return Verdict(f"{how}; requeued", REQUEUE)


def _whose(fault: Fault, job: Job) -> str:
    """Which node, and which GPU of it, has failed, and how to keep a job off it."""
    if not fault.node:
        return f"one of {job.nodes}: {printable(fault.words)[:200]}"
    gpu = f", GPU {fault.gpu}" if fault.gpu else ""
    return (
        f"{fault.node}{gpu}: {printable(fault.words)[:200]}; to keep off it: "
        f"scontrol update JobId={job.id} ExcNodeList={fault.node}, or submit with --exclude={fault.node}"
    )


def _said(log: Path | None, start: int) -> list[str]:
    """The lines of this start in a job's log."""
    if log is None or not log.exists():
        return []
    lines = log.read_text(errors="replace").splitlines()
    own = re.compile(rf"\[[^]]*\] job \S+, start {start}: ")
    began = [number for number, line in enumerate(lines) if own.match(line)]
    return lines[began[0] :] if began else lines


def _first_exit(said: list[str], code: int) -> int:
    """The code of the first task that ended, where srun's own is of those that it killed or that missed that one."""
    found = [re.match(r"srun: error: \S+: tasks? \S+: Exited with exit code (\d+)$", line) for line in said]
    told = [int(match[1]) for match in found if match]
    return told[0] if told and told[0] in (1, 2) and (code > _KILLED or code == REQUEUE) else code


def _complaint(said: list[str], fault: Fault | None) -> str:
    """The last line in which a stage says what is wrong, or the fault's, or the last of all but SLURM's."""
    told = [line for line in said if line.startswith("dist-train ")]
    others = [line for line in said if line.strip() and not line.startswith(("srun:", "slurmstepd", "["))]
    line = fault.words if fault and not told else (told or others or [""])[-1]
    return printable(line)[:500]
