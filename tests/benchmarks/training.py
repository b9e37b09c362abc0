"""What our training machinery costs: tokens a second against a bare PyTorch loop and transformers' Trainer.

    python tests/benchmarks/training.py bare --ranks 1 --pairs 6
    python tests/benchmarks/training.py trainer --pairs 3
    python tests/benchmarks/training.py online --target-layers 8
    python tests/benchmarks/training.py checkpoint

`bare`: the same drafter, batches, AdamW and dtype in a loop of PyTorch alone, DistributedDataParallel where there are
several ranks, cross-entropy of whole logits; pairs take turns, and the ratio of each pair is one observation. `online`:
a step with the target in the loop against its target pass and a drafter step measured by themselves. `checkpoint`: how
long training stops for one that is written while it goes on, and for one that it waits for. On a GPU the same, in
bf16, with train.compile, and the share of the device's arithmetic (MFU).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

SHAPE = {"hidden_size": 512, "layers": 4, "heads": 8, "mlp_size": 1408, "max_positions": 2048}
VOCAB = 8000


def prepared(folder: Path, tokens: int = 2_000_000) -> tuple[Path, Path]:
    """A tokenizer and a corpus of random words."""
    from dist_train.cli import main
    from dist_train.tokenizer import train_tokenizer

    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 9))) for _ in range(20_000)]
    texts = [" ".join(rng.choice(words, 200)) for _ in range(tokens // 600)]
    train_tokenizer(texts[:2000], folder / "tokenizer", VOCAB)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = folder / "corpus"
    main(["prepare", f"inputs={folder / 'text.jsonl'}", f"tokenizer={folder / 'tokenizer'}", f"out={out}"])
    return folder / "tokenizer", out


def random_target(folder: Path, tokenizer: Path, layers: int, width: int) -> Path:
    """A Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dist_train.tokenizer import load_tokenizer

    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_attention_heads": width // 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_hidden_layers=layers, **sizes))
    model.to(torch.bfloat16 if torch.cuda.is_available() else torch.float32).save_pretrained(folder / "target")
    load_tokenizer(tokenizer).save(folder / "target")
    return folder / "target"


def seconds_a_step(run: Path, first: int) -> float:
    """The median over the steps after the first ones, of the run's own lines."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = [line["time"] for line in lines]
    return statistics.median(np.diff(times)[first:])


def launch(command: list[str], ranks: int) -> None:
    """`command` in so many processes that know each other; ends with their complaint if one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MASTER_ADDR": "127.0.0.1"}
        environment |= {name: str(value) for name, value in place.items()}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    for process in processes:
        _, complaint = process.communicate()
        if process.returncode:
            raise SystemExit(complaint.decode()[-2000:])


def ours(folder: Path, tokenizer: Path, corpus: Path, options: argparse.Namespace, *more: str) -> tuple[float, Path]:
    """Seconds a step of `dist-train pretrain`, and its run folder."""
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    words = [
        f"run.dir={run}",
        f"tokenizer={tokenizer}",
        f"data.sources=[{{path: {corpus}}}]",
        f"data.sequence_length={options.length}",
        *(f"drafter.{name}={value}" for name, value in SHAPE.items()),
        f"train.steps={options.steps}",
        f"train.global_batch={options.batch * options.ranks}",
        f"train.micro_batch={options.batch}",
        f"train.precision={options.dtype}",
        f"train.deepspeed={options.stage}",
        f"train.compile={str(options.compile).lower()}",
        "checkpoint.every=1000000",
        *more,
    ]
    launch([sys.executable, "-m", "dist_train", "pretrain", *words], options.ranks)
    return seconds_a_step(run, 2), run


def bare(folder: Path, corpus: Path, options: argparse.Namespace) -> float:
    """Seconds a step of a loop of PyTorch alone, in processes of its own."""
    out = Path(tempfile.mkdtemp(dir=folder)) / "times.json"
    settings = {**vars(options), "corpus": str(corpus), "out": str(out)}
    launch([sys.executable, __file__, "_bare", "--settings", json.dumps(settings)], options.ranks)
    return statistics.median(json.loads(out.read_text())[2:])


def bare_loop(settings: dict) -> None:
    """On one rank: the loop that a page of PyTorch's documentation would have."""
    import torch.nn.functional as F

    from data_shards import ShardedTokens
    from dist_train.config import DrafterSection
    from dist_train.drafter import drafter_config, new_drafter

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    tokens = ShardedTokens(settings["corpus"])
    model = new_drafter(drafter_config(DrafterSection(**SHAPE), VOCAB, 1, 2), 0).to(device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings["dtype"]]
    if settings["compile"]:
        model = torch.compile(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=on_gpu)
    batch, length = settings["batch"], settings["length"]
    rng = np.random.default_rng(rank)
    times = []
    for _ in range(settings["steps"]):
        began = time.perf_counter()
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
        times.append(time.perf_counter() - began)
    if rank == 0:
        Path(settings["out"]).write_text(json.dumps(times))
    torch.distributed.destroy_process_group()


def trainer(folder: Path, corpus: Path, options: argparse.Namespace) -> float:
    """Seconds a step of transformers' Trainer, in one process of its own."""
    out = Path(tempfile.mkdtemp(dir=folder)) / "times.json"
    settings = {**vars(options), "corpus": str(corpus), "out": str(out)}
    subprocess.run([sys.executable, __file__, "_trainer", "--settings", json.dumps(settings)], check=True)
    return statistics.median(json.loads(out.read_text())[2:])


def trainer_loop(settings: dict) -> None:
    """Its own loop over rows of the corpus; seconds between its steps."""
    import transformers

    from data_shards import ShardedTokens
    from dist_train.config import DrafterSection
    from dist_train.drafter import drafter_config, new_drafter

    tokens, length = ShardedTokens(settings["corpus"]), settings["length"]

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return (len(tokens) - 1) // length

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.from_numpy(tokens[index * length : (index + 1) * length].astype(np.int64))
            return {"input_ids": ids, "labels": ids}

    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            times.append(time.perf_counter())

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
    model = new_drafter(drafter_config(DrafterSection(**SHAPE), VOCAB, 1, 2), 0)
    transformers.Trainer(model, arguments, train_dataset=Rows(), callbacks=[Clock()]).train()
    Path(settings["out"]).write_text(json.dumps([0.0, *np.diff(times).tolist()]))


def interval(ratios: list[float]) -> str:
    """Mean and its 95 % interval by Student's t."""
    from scipy import stats

    mean = statistics.fmean(ratios)
    if len(ratios) < 2:
        return f"{mean:.3f}"
    half = stats.t.ppf(0.975, len(ratios) - 1) * statistics.stdev(ratios) / len(ratios) ** 0.5
    return f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Pairs of ours and the peer, taking turns."""
    tokenizer, corpus = prepared(folder)
    peer = bare if options.what == "bare" else trainer
    tokens = options.batch * options.ranks * options.length
    ratios = []
    for pair in range(options.pairs):
        order = (True, False) if pair % 2 == 0 else (False, True)
        seconds = {}
        for mine in order:
            seconds[mine] = ours(folder, tokenizer, corpus, options)[0] if mine else peer(folder, corpus, options)
        ratios.append(seconds[False] / seconds[True])
        print(
            f"pair {pair + 1}: ours {tokens / seconds[True]:.0f} tokens/s ({seconds[True]:.2f} s a step), "
            f"{options.what} {tokens / seconds[False]:.0f}, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    print(f"ours over {options.what}, {options.ranks} rank(s), {len(ratios)} pairs: {interval(ratios)}")


def online(folder: Path, options: argparse.Namespace) -> None:
    """Online distillation against the time of its parts, each measured in runs of the same command."""
    tokenizer, corpus = prepared(folder)
    target = random_target(folder, tokenizer, options.target_layers, options.target_width)
    alone, _ = ours(folder, tokenizer, corpus, options)
    given = (f"target.path={target}", f"target.precision={options.dtype}", "objective={kld: 1.0}")
    both, run = ours(folder, tokenizer, corpus, options, *given)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][2:]
    forward = statistics.median(line["perf/target"] for line in lines) * both
    print(f"a step {both:.2f} s; target pass {forward:.2f} s, drafter step with cross-entropy {alone:.2f} s")
    print(
        f"speed over that of target pass + drafter step: {(forward + alone) / both:.3f}; target's share of the step ",
        end="",
    )
    print(f"{forward / both:.2f}; MFU {lines[-1].get('perf/mfu', 'unknown on this device')}")


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
    parser.add_argument("what", choices=["bare", "trainer", "online", "checkpoint", "_bare", "_trainer"])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=6)
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
        {"bare": compare, "trainer": compare, "online": online, "checkpoint": checkpoint}[options.what](
            Path(folder), options
        )


if __name__ == "__main__":
    main()
