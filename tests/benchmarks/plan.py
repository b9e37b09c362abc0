"""How far the throughput model of `dist-train plan` is off, on this machine's CPU.

    python tests/benchmarks/plan.py

The peak is that of a matrix product, the two shares of it are measured on models of other sizes than those that are
then planned: the drafter's on a training run, the target's on forward passes alone. With these three numbers tokens/s
of a pretraining and of an online distillation are predicted, and both are run. One process with all cores, fp32.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from training_runs import VOCABS, finish, prepared, random_target, seconds_a_step, start

from dist_train.config import TrainConfig, load_config
from dist_train.doctor.measure import gemm_rates
from dist_train.plan import Assumptions, Machine, plan_training
from dist_train.plan.machine import Gpu
from dist_train.plan.shapes import measure
from dist_train.train.timing import flops_per_token

KNOWN = {"hidden_size": 512, "layers": 4, "heads": 8, "mlp_size": 1408}
PLANNED = {"hidden_size": 640, "layers": 6, "heads": 10, "mlp_size": 1760}
STEPS, FIRST = 6, 2
TURNS = 3


def words(run: Path, tokenizer: Path, corpus: Path, shape: dict[str, int], length: int, batch: int) -> list[str]:
    return [
        f"run.dir={run}",
        f"tokenizer={tokenizer}",
        f"data.sources=[{{path: {corpus}}}]",
        f"data.sequence_length={length}",
        *(f"drafter.{name}={value}" for name, value in shape.items()),
        f"train.steps={STEPS}",
        f"train.global_batch={batch}",
        f"train.micro_batch={batch}",
        "train.precision=fp32",
        "checkpoint.every=1000000",
    ]


def tokens_a_second(stage: str, run: Path, config: list[str], tokens: int) -> float:
    finish(start([sys.executable, "-m", "dist_train", stage, *config], 1))
    return tokens / seconds_a_step(run, FIRST)


def target_flops(path: Path, length: int) -> float:
    """FLOP/s of the target's forward pass, head included, by the median of five."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path).eval()
    size = measure(model.config)
    ids = torch.randint(VOCABS["small"], (4, length))
    times = []
    with torch.no_grad():
        for _ in range(6):
            began = time.perf_counter()
            model(ids, use_cache=False)
            times.append(time.perf_counter() - began)
    work = flops_per_token(size.shape, size.matrix_parameters, length) * ids.numel()
    return work / statistics.median(times[1:])


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer, corpus = prepared(folder, 200_000)
        peak = 1e12 * statistics.median(gemm_rates(torch.device("cpu"), torch.float32))
        machine = Machine(Gpu("CPU", {"fp32": peak}, 16e9, 1e10, 1e9, 1e9), 1)
        vocab_size = VOCABS["small"]
        small = random_target(folder / "small", tokenizer, 3, 768, vocab_size)
        target = random_target(folder / "target", tokenizer, 8, 512, vocab_size)
        teach = [f"target.path={target}", "target.precision=fp32", "objective={kld: 1}"]
        runs = {
            "known": ("pretrain", KNOWN, 256, 8, ["objective={ce: 1}"]),
            "pretrain": ("pretrain", PLANNED, 512, 4, ["objective={ce: 1}"]),
            "distill": ("distill", PLANNED, 512, 4, teach),
        }
        rates: dict[str, list[float]] = {name: [] for name in runs}
        configs = {}
        for turn in range(TURNS):  # in turns, so that a slower minute is everybody's
            for name, (stage, shape, length, batch, more) in runs.items():
                run = folder / f"{name}-{turn}"
                given = [*words(run, tokenizer, corpus, shape, length, batch), *more]
                configs[name] = load_config(TrainConfig, None, given)
                rates[name].append(tokens_a_second(stage, run, given, batch * length))
        measured = {name: statistics.median(found) for name, found in rates.items()}
        at_peak = plan_training(configs["known"], machine, Assumptions(mfu=1.0), vocab_size, "pretrain")["tokens/s"]
        assumed = Assumptions(mfu=measured["known"] / at_peak, target_mfu=target_flops(small, 256) / peak)
        print(f"peak {peak / 1e9:.1f} GFLOP/s; drafter {assumed.mfu:.1%} of it, target {assumed.target_mfu:.1%}")
        for name in ("pretrain", "distill"):
            predicted = plan_training(configs[name], machine, assumed, vocab_size, name)["tokens/s"]
            shown = ", ".join(f"{rate:.0f}" for rate in rates[name])
            off = predicted / measured[name] - 1
            print(f"{name}: predicted {predicted:.0f} tokens/s, measured {shown}: {off:+.1%} off the median")


if __name__ == "__main__":
    main()
