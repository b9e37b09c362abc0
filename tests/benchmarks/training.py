"""What our training machinery costs: tokens a second against a bare PyTorch loop and transformers' Trainer.

    python tests/benchmarks/training.py bare --ranks 1 --pairs 8
    python tests/benchmarks/training.py trainer --pairs 3
    python tests/benchmarks/training.py online --target-layers 8
    python tests/benchmarks/training.py checkpoint
    python tests/benchmarks/training.py mfu --drafter 115m --batch 16 --length 2048

`bare`: the same drafter, batches, AdamW and dtype in a loop of PyTorch alone, DistributedDataParallel where there are
several ranks, cross-entropy of whole logits. Both are started, and take turns of a few seconds in which the other is
stopped, so that a machine that gets slower slows both; the ratio of neighbouring turns is one observation. `online`:
a step with the target in the loop against its target pass and a drafter step measured by themselves, and against the
same target's pass over the same tokens by transformers alone. `checkpoint`: how long training stops for one that is
written while it goes on, and for one that it waits for. `mfu`: tokens a second and the share of the device's arithmetic
eager, with the loss compiled, and with the drafter's blocks compiled, too. On a GPU all are in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from training_runs import (
    DRAFTERS,
    VOCABS,
    finish,
    ours,
    ours_command,
    prepared,
    random_target,
    start,
    vocabulary,
)


def bare_loop(settings: dict) -> None:
    """On one rank: the loop that a page of PyTorch's documentation would have."""
    import torch.nn.functional as F

    from data_shards import ShardedTokens
    from dist_train.config import DrafterSection
    from dist_train.models.drafter import drafter_config, new_drafter

    name = settings["drafter"]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    tokens = ShardedTokens(settings["corpus"])
    model: Any = new_drafter(drafter_config(DrafterSection(**DRAFTERS[name]), VOCABS[name], 1, 2), 0)
    model.to(device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["dtype"]]
    if settings["compile"]:
        model = torch.compile(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
    batch, length = settings["batch"], settings["length"]
    rng = np.random.default_rng(rank)
    for _ in range(settings["steps"]):
        starts = rng.integers(0, len(tokens) - length - 1, batch)
        rows = torch.from_numpy(np.stack([tokens[at : at + length + 1].astype(np.int64) for at in starts])).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = wrapped(input_ids=rows[:, :-1]).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        if rank == 0:
            note_time(settings["out"])


def note_time(path: str) -> None:
    """A step has ended now."""
    with Path(path).open("a") as file:
        file.write(json.dumps({"time": time.time()}) + "\n")


def trainer_loop(settings: dict) -> None:
    """Its own loop over rows of the corpus."""
    import transformers

    from data_shards import ShardedTokens
    from dist_train.config import DrafterSection
    from dist_train.models.drafter import drafter_config, new_drafter

    tokens, length = ShardedTokens(settings["corpus"]), settings["length"]

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return (len(tokens) - 1) // length

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.from_numpy(tokens[index * length : (index + 1) * length].astype(np.int64))
            return {"input_ids": ids, "labels": ids}

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            note_time(settings["out"])

    arguments = transformers.TrainingArguments(
        output_dir=str(Path(settings["out"]).parent),
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch"],
        bf16=settings["dtype"] == "bf16",
        torch_compile=settings["compile"],
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    name = settings["drafter"]
    model = new_drafter(drafter_config(DrafterSection(**DRAFTERS[name]), VOCABS[name], 1, 2), 0)
    transformers.Trainer(model, arguments, train_dataset=Rows(), callbacks=[Clock()]).train()


def interval(ratios: list[float]) -> str:
    """Mean and its 95 % interval by Student's t."""
    from scipy import stats

    mean = statistics.fmean(ratios)
    if len(ratios) < 2:
        return f"{mean:.3f}"
    half = stats.t.ppf(0.975, len(ratios) - 1) * statistics.stdev(ratios) / len(ratios) ** 0.5
    return f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"


def send(processes: list[subprocess.Popen[bytes]], number: int) -> None:
    """A signal to all of them."""
    for process in processes:
        process.send_signal(number)


def steps_noted(path: Path) -> list[float]:
    """When each step ended that is in the file by now."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["time"] for line in lines if line.endswith("}")]


def in_turn(times: list[float], began: float, ended: float) -> float:
    """Seconds a step of those that lie whole in the turn from `began` to `ended`.

    The least of them: what else the machine does only adds.
    """
    inside = [time for time in times if began < time < ended]
    return float(np.diff(inside).min())


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Turns of ours and of the peer."""
    tokenizer, corpus = prepared(folder)
    options.steps = 1_000_000
    run, out = folder / "run", folder / "times.jsonl"
    settings = {**vars(options), "corpus": str(corpus), "out": str(out)}
    peer = [sys.executable, __file__, f"_{options.what}", "--settings", json.dumps(settings)]
    more = vocabulary(folder, tokenizer, options)
    mine = start(ours_command(run, tokenizer, corpus, options, *more), options.ranks)
    while not (run / "metrics.jsonl").exists() and mine[0].poll() is None:
        time.sleep(0.2)
    send(mine, signal.SIGSTOP)
    other = start(peer, options.ranks)
    while len(steps_noted(out)) < 2 and other[0].poll() is None:
        time.sleep(0.2)
    send(other, signal.SIGSTOP)
    turns: list[tuple[bool, float, float]] = []
    for turn in range(2 * options.pairs + 1):  # ours begins and ends, and is compared with its neighbours' mean
        active = mine if turn % 2 == 0 else other
        send(active, signal.SIGCONT)
        began = time.time()
        time.sleep(options.turn)
        turns.append((turn % 2 == 0, began, time.time()))
        send(active, signal.SIGSTOP)
    send(other, signal.SIGCONT)
    send(other, signal.SIGKILL)
    send(mine, signal.SIGCONT)
    send(mine, signal.SIGTERM)
    finish(mine)
    report(steps_noted(run / "metrics.jsonl"), steps_noted(out), turns, options)


def report(
    mine: list[float], other: list[float], turns: list[tuple[bool, float, float]], options: argparse.Namespace
) -> None:
    """The ratio of each of the peer's turns to the mean of ours before and after it."""
    seconds = [in_turn(mine if is_mine else other, began, ended) for is_mine, began, ended in turns]
    tokens, ratios = options.batch * options.ranks * options.length, []
    for turn in range(1, len(turns), 2):
        beside = (seconds[turn - 1] + seconds[turn + 1]) / 2
        ratios.append(seconds[turn] / beside)
        print(
            f"pair {len(ratios)}: ours {tokens / beside:.0f} tokens/s ({beside:.2f} s a step), "
            f"{options.what} {tokens / seconds[turn]:.0f}, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    print(f"ours over {options.what}, {options.ranks} rank(s), {len(ratios)} pairs: {interval(ratios)}")


def online(folder: Path, options: argparse.Namespace) -> None:
    """Online distillation against the time of its parts, each measured in runs of the same command."""
    tokenizer, corpus = prepared(folder)
    vocab_size = VOCABS[options.drafter]
    target = random_target(folder / "target", tokenizer, options.target_layers, options.target_width, vocab_size)
    alone, _ = ours(folder, tokenizer, corpus, options, *vocabulary(folder, tokenizer, options))
    given = (f"target.path={target}", f"target.precision={options.dtype}", "objective={kld: 1.0}")
    both, run = ours(folder, tokenizer, corpus, options, *given)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][2:]
    forward = statistics.median(line["perf/target"] for line in lines) * both
    by_itself, parameters = forward_alone(target, vocab_size, options)
    tokens = options.batch * options.length
    print(f"{tokens} tokens a step beside a target of {parameters / 1e9:.2f}B parameters, {options.dtype}\n")
    print("| what | seconds | tokens/s | over the target's pass alone |\n|--|--|--|--|")
    rows = {
        "target's forward pass by transformers, alone": by_itself,
        "online distillation, a step": both,
        "of it, the target's pass": forward,
        "drafter step with cross-entropy, no target": alone,
    }
    for what, seconds in rows.items():
        print(f"| {what} | {seconds:.3f} | {tokens / seconds:.0f} | {seconds / by_itself:.3f} |")
    print(
        f"\nspeed over that of target pass + drafter step: {(forward + alone) / both:.3f}; "
        f"MFU {lines[-1].get('perf/mfu', 'unknown on this device')}"
    )


@torch.inference_mode()
def forward_alone(target: Path, vocab_size: int, options: argparse.Namespace) -> tuple[float, int]:
    """Seconds of a forward pass to the last hidden states over a step's tokens, the least of five; parameters."""
    from transformers import AutoModelForCausalLM

    on_gpu = torch.cuda.is_available()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).eval()
    model.to("cuda" if on_gpu else "cpu")
    ids = torch.randint(vocab_size, (options.batch, options.length), device=model.device)
    times = []
    for _ in range(6):
        began = time.perf_counter()
        model.model(input_ids=ids, use_cache=False)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:]), model.num_parameters()


def mfu(folder: Path, options: argparse.Namespace) -> None:
    """The same run in three ways."""
    tokenizer, corpus = prepared(folder)
    more = vocabulary(folder, tokenizer, options)
    tokens = options.batch * options.length
    print(f"{options.drafter} drafter, cross-entropy, {tokens} tokens a step, {options.dtype}, {options.stage}\n")
    print("| compiled | seconds a step | tokens/s | MFU | peak GiB |\n|--|--|--|--|--|")
    for loss, blocks in (("false", False), ("true", False), ("true", True)):
        options.compile = blocks
        seconds, run = ours(folder, tokenizer, corpus, options, *more, f"loss.compile={loss}")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][2:]
        known = "perf/mfu" in lines[0]
        share = f"{statistics.median(line['perf/mfu'] for line in lines):.3f}" if known else "unknown on this device"
        compiled = "loss and blocks" if blocks else "loss" if loss == "true" else "nothing"
        peak = lines[-1]["perf/memory_gib"]
        print(f"| {compiled} | {seconds:.3f} | {tokens / seconds:.0f} | {share} | {peak:.1f} |", flush=True)


def checkpoint(folder: Path, options: argparse.Namespace) -> None:
    """The step that saves against its neighbours."""
    tokenizer, corpus = prepared(folder)
    for asynchronous in ("true", "false"):
        more = ("checkpoint.every=5", f"checkpoint.asynchronous={asynchronous}")
        _, run = ours(folder, tokenizer, corpus, options, *more)
        times = [json.loads(line)["time"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        gaps = dict(enumerate(np.diff(times), start=2))  # the line of a step comes before its checkpoint
        after = [gap for step, gap in gaps.items() if step % 5 == 1 and step > 2]
        others = [gap for step, gap in gaps.items() if step % 5 in (3, 4, 0)]
        size = sum(f.stat().st_size for f in (run / "checkpoints").rglob("*") if f.is_file()) / 2 / 2**20
        stall = statistics.median(after) - statistics.median(others)
        print(f"asynchronous={asynchronous}: {size:.0f} MiB, training stops for {stall:.2f} s", flush=True)


def main() -> None:
    """Reads what to measure, prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["bare", "trainer", "online", "checkpoint", "mfu", "_bare", "_trainer"])
    parser.add_argument("--drafter", choices=DRAFTERS, default="small")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--turn", type=float, default=12.0, help="seconds of a turn")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=6, help="sequences a rank")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16" if torch.cuda.is_available() else "fp32")
    parser.add_argument("--stage", default="zero0")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--target-layers", type=int, default=8)
    parser.add_argument("--target-width", type=int, default=1024)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "_bare":
        bare_loop(json.loads(options.settings))
        return
    if options.what == "_trainer":
        trainer_loop(json.loads(options.settings))
        return
    with tempfile.TemporaryDirectory() as folder:
        ways = {"bare": compare, "trainer": compare, "online": online, "checkpoint": checkpoint, "mfu": mfu}
        ways[options.what](Path(folder), options)


if __name__ == "__main__":
    main()
