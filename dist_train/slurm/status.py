"""`dist-train status RUN`: where a run stands, from its folder, and from squeue where there is one. Needs no torch."""

from __future__ import annotations

import itertools
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from dist_train.config.read import read_yaml
from dist_train.errors import UserError, printable
from dist_train.runtime.run_folder import CONFIG, read_metrics
from dist_train.slurm import journal
from dist_train.slurm.standing import STAGES, TRAINING, Standing, standing

_WINDOW = 100  # steps that the pace is taken from


def status(folder: Path) -> list[str]:
    """Lines about a folder that a stage writes to. Raises UserError where there is nothing of a stage."""
    jobs = journal.read(folder)
    stage = _stage(folder, jobs)
    if stage is None:
        raise UserError(f"{folder}: no stage has written or was submitted here")
    steps = _steps(folder) if stage in TRAINING else None
    now = standing(stage, folder, steps)
    lines = _training(folder, stage, now) if stage in TRAINING else [f"{stage}: {now}"]
    lines[0] += ", finished" if now.finished else ""
    for job, events in jobs.items():
        lines += _job(job, events, last=job == list(jobs)[-1])
    return [printable(line) for line in lines]


def _stage(folder: Path, jobs: dict[str, list[dict[str, Any]]]) -> str | None:
    """What the newest job was, or what the files look like."""
    told = [line["stage"] for lines in jobs.values() for line in lines if line.get("stage") in STAGES]
    if told:
        return str(told[-1])
    if (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists():
        target = _read_config(folder).get("target")
        return "distill" if target else "pretrain"
    signs = {"evaluate": "units", "generate": "_plan.json", "prepare": "index.json"}
    found = [stage for stage, name in signs.items() if (folder / name).exists()]
    return found[0] if found else "prepare" if (folder / "plan.json").exists() else None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    return read_yaml(path) if path.exists() else {}


def _steps(folder: Path) -> int | None:
    train = _read_config(folder).get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    return steps if isinstance(steps, int) else None


def _training(folder: Path, stage: str, now: Standing) -> list[str]:
    """Step, tokens, loss, acceptance and time left, from the figures; and what of it is safe."""
    figures = read_metrics(folder)
    if not figures:
        return [f"{stage}: no step yet", f"  committed: {now}"]
    last = figures[-1]
    step = int(last["step"])
    of = f" of {now.total:,} ({step / now.total:.0%})" if now.total else ""
    parts = [f"step {step:,}{of}", f"{int(last.get('progress/tokens', 0)):,} tokens"]
    for label, tag in (("loss", "train/loss"), ("acceptance", "train/acceptance")):
        if tag in last:
            parts.append(f"{label} {last[tag]:.4f}")
    lines = [f"{stage}: {', '.join(parts)}", f"  committed: {now}"]
    pace = _seconds_per_step(figures)
    if pace is not None and now.total and step < now.total:
        ago = _duration(max(0.0, time.time() - last["time"]))
        left = _duration((now.total - step) * pace)
        lines.append(f"  {left} left at {pace:.3g} s a step, without queueing; last step {ago} ago")
    return lines


def _seconds_per_step(figures: list[dict[str, float]]) -> float | None:
    """The median, in which a wait between two starts does not count."""
    times = [line["time"] for line in figures[-_WINDOW:]]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return statistics.median(gaps) if gaps else None


def _job(job: str, events: list[dict[str, Any]], *, last: bool) -> list[str]:
    """A job's starts and ends with their reasons; of the newest job SLURM's own word too."""
    starts = [event for event in events if event["event"] == "start"]
    requeues = max((event["start"] for event in starts), default=1) - 1
    head = f"  job {job}: {requeues} requeue{'' if requeues == 1 else 's'}"
    state = _queue_state(job) if last or not starts else None
    lines = [head + (f"; {state}" if state else "")]
    if not starts:
        lines += [f"    {line}" for line in _why_not(events)]
    for event in events:
        when = time.strftime("%F %T", time.localtime(event["time"]))
        if event["event"] == "start":
            lines.append(f"    {when} start {event['start']} on {event['nodes']}: {event['because']}; {_done(event)}")
        elif event["event"] == "end":
            reason = event["reason"] or "ended"
            lines.append(f"    {when}   end, code {event['code']}: {reason}; at {event['done']:,}")
            lines += [f"      {event['said']}"] if event["said"] else []
        elif event["event"] == "gave up":
            lines.append(f"    {when}   given up: no progress beyond {event['done']:,}")
    return lines


def _why_not(events: list[dict[str, Any]], seen: frozenset[tuple[str, str]] = frozenset()) -> list[str]:
    """Of a job that did not start: what became of those that it waits for; `seen` are those that are asked already."""
    after: dict[str, str] = next((event["after"] for event in events if event.get("after")), {})
    return [line for other in after.items() if other not in seen for line in _before(*other, seen | {other})]


def _before(job: str, folder: str, seen: frozenset[tuple[str, str]]) -> list[str]:
    """Of a job that another waits for: why it, or what it waits for itself, did not end well."""
    for name, events in journal.read(Path(folder)).items():
        if name.split("_")[0] != job:
            continue
        lines = [event for event in events if event["event"] in ("start", "end", "gave up")]
        if not lines:
            if found := _why_not(events, seen):
                return found
        elif lines[-1]["event"] == "gave up":
            return [f"job {job} ({folder}), on which it depends, was given up: no progress"]
        elif lines[-1]["event"] == "end" and lines[-1]["code"] and lines[-1]["reason"] == "error":
            end = lines[-1]
            return [f"job {job} ({folder}), on which it depends, failed with code {end['code']}: {end['said']}"]
    return []


def _done(event: dict[str, Any]) -> str:
    return str(Standing(event["done"], event["total"], event["unit"], False))


def _queue_state(job: str) -> str:
    """SLURM's word on a job: squeue for one that is queued, scontrol for one that has just left."""
    if shutil.which("squeue") is None:
        return "no squeue here to ask"
    asked = subprocess.run(
        ["squeue", "--noheader", "--jobs", job, "--format=%T (%r), %M of %l"], capture_output=True, text=True
    )
    if asked.returncode == 0 and asked.stdout.strip():
        return asked.stdout.strip().splitlines()[0]
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout.split()
    known = dict(word.split("=", 1) for word in shown if "=" in word)
    if "JobState" in known:
        return f"{known['JobState']} ({known.get('Reason', 'None')})"
    return "not in the queue"


def _duration(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
