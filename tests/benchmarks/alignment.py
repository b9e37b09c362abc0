"""Base drafter and drafters aligned by each loss on three kinds of held-out task: the comparison of Goel et al. (2024)
at small scale, through the stage commands; prints Markdown tables.

    python tests/benchmarks/alignment.py --data DIR --out DIR [--variants]

DIR/instructions.{train,eval}.jsonl.gz hold records {task, prompt, response} of P3 templates. One process on one core;
started again, it goes on where it was. `results.json` in `--out` has the tokens and target calls of every prompt.

A chat target is trained on the conversations of these tasks and on their text, a base drafter on the text alone. The
target answers open-ended and summarisation seeds; the translation-like ones (facts to biography and back, paraphrases:
one form of a content into another, as the data have no translation) are in no distillation seed. Every loss distils
the same base, for each seed number with the same answers in the same order. `--variants` adds TVD++ with batch
normalisation, and TVD++ with translation-like seeds.
Intervals: a two-level bootstrap draws seeds and prompts again, paired over methods. Three seeds make them too narrow.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from data_shards.files import read_json, write_json

TEMPLATES = {
    "open-ended": re.compile(
        "gigaword_(write_an_article|reverse_writing)|samsum_Write|dream_(answer_to_dialogue|generate)"
        "|duorc_.*build_story|cnn_.*story|app_reviews_generate|multi_news_expand"
    ),
    "summarisation": re.compile("gigaword|samsum|xsum|cnn_|multi_news"),
    "translation-like": re.compile("wiki_bio_(?!guess)|glue_mrpc_generate|paws_.*paraphrase"),
}
TASKS = tuple(TEMPLATES)
SAMPLING = {0.6: TASKS[:1], 0.0: TASKS[1:]}  # tasks by temperature; top-p is 0.9
LOSSES, VARIANTS = ("kld", "tvd", "tvdpp", "lk"), ("tvdpp-batch", "tvdpp-ood")
PAIRS = (("tvdpp", "kld"), ("tvdpp", "tvd"), ("lk", "kld"), ("tvdpp-batch", "tvdpp"), ("tvdpp-ood", "tvdpp"))
SEEDS, GAMMAS = (1, 2, 3), (3, 5)
HELD_OUT, EVALUATED = 96, 64  # prompts of a task that training does not see, where there are so many; and decoded ones
PROMPT_CHARACTERS, SEQUENCE_LENGTH, NEW_TOKENS = 600, 256, 64
TARGET_SHAPE = {"hidden_size": 256, "layers": 3, "heads": 4, "mlp_size": 688, "max_positions": 1024}
DRAFTER_SHAPE = {"hidden_size": 64, "layers": 1, "heads": 2, "mlp_size": 176, "max_positions": 1024}
RECIPES = {"target": (1400, 4, 2e-3), "base": (250, 16, 6e-3), "distill": (100, 8, 3e-3)}  # steps, batch, learning rate
ANSWERED = {"seeds": 700, "seeds-ood": 200}  # each at temperatures 0, 0.3, 0.7 and 1

Record = dict[str, str]
Counts = npt.NDArray[np.int64]  # [seeds, prompts, 2]: tokens and target calls
Key = tuple[str, str, int]  # method, task, gamma


def make_data(data: Path, out: Path) -> str:
    """Write the held-out prompts of each task, and conversations, texts and seeds that share no passage with them."""
    shuffled = random.Random(0)
    train, held_out = (read(data / f"instructions.{part}.jsonl.gz", shuffled) for part in ("train", "eval"))
    short = [r for r in held_out if len(r["prompt"]) <= PROMPT_CHARACTERS]
    chosen = {task: distinct(r for r in short if kind(r) == task)[:HELD_OUT] for task in TASKS}
    kept = without_passages_of([r for records in chosen.values() for r in records], train)
    chats = [r for r in kept if kind(r) in TASKS and len(r["prompt"]) <= PROMPT_CHARACTERS and r["response"]]
    files = {
        **chosen,
        "chats": chats,
        "text": [{"text": f"{r['prompt'].strip()} {r['response']}"} for r in chats],
        "seeds": distinct(r for r in chats if kind(r) in TASKS[:2]),
        "seeds-ood": distinct(r for r in chats if kind(r) == TASKS[2]),
    }
    (out / "data").mkdir(exist_ok=True)
    for name, records in files.items():
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (out / "data" / f"{name}.jsonl").write_text("".join(lines))
    assert not {r["prompt"] for r in kept} & {r["prompt"] for records in chosen.values() for r in records}
    return f"{len(kept)} of {len(train)} records; " + ", ".join(f"{name}: {len(r)}" for name, r in files.items())


def read(path: Path, shuffled: random.Random) -> list[Record]:
    """The records of a file in random order, without the end-of-text marker that responses carry as text."""
    with gzip.open(path, "rt") as lines:
        records = [json.loads(line) for line in lines]
    shuffled.shuffle(records)
    return [{**r, "response": r["response"].removesuffix("<|endoftext|>").strip()} for r in records]


def kind(record: Record) -> str | None:
    """The kind of task of a record's template: the first whose pattern fits."""
    return next((task for task, pattern in TEMPLATES.items() if pattern.match(record["task"])), None)


def distinct(records: Iterable[Record]) -> list[Record]:
    """Those whose prompt was not there before."""
    return list({record["prompt"]: record for record in reversed(list(records))}.values())[::-1]


def without_passages_of(held_out: list[Record], train: list[Record], words: int = 8, common: int = 30) -> list[Record]:
    """The training records that share no run of 8 words with a held-out prompt or response: templates use one passage
    again and again. Runs in more than `common` records are the templates' own words.
    """

    def runs(record: Record) -> set[int]:
        found = f"{record['prompt']} {record['response']}".split()
        return {hash(tuple(found[i : i + words])) for i in range(len(found) - words + 1)}

    secret = set().union(*map(runs, held_out))
    shared = [runs(record) & secret for record in train]
    seen = Counter(run for found in shared for run in found)
    return [r for r, found in zip(train, shared, strict=True) if all(seen[run] > common for run in found)]


class Experiment:
    """The steps below one folder; those that are done are not done again."""

    def __init__(self, data: Path, out: Path) -> None:
        self.data, self.out = data, out
        self.tokenizer, self.target = str(out / "tokenizer"), {"path": str(out / "target")}
        self.seconds = read_json(out / "steps.json")["seconds"] if (out / "steps.json").exists() else {}

    def step(self, name: str, action: Callable[[], Any]) -> None:
        """Do it once, and remember how long it took."""
        if name not in self.seconds:
            began = time.monotonic()
            result = action()
            self.seconds[name] = time.monotonic() - began
            write_json(self.out / "steps.json", {"seconds": self.seconds})
            print(f"{name}: {self.seconds[name]:.0f} s {result or ''}", flush=True)

    def command(self, label: str, *words: str) -> None:
        """A command of dist-train; what it says goes to a file."""
        log = self.out / "logs" / f"{label}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("a") as lines:
            done = subprocess.run([sys.executable, "-m", "dist_train", *words], stdout=lines, stderr=lines)
        if done.returncode:
            sys.exit(f"{label}: exit code {done.returncode}; see {log}")

    def stage(self, name: str, label: str, **config: Any) -> None:
        """A stage, with a configuration file that stays."""
        path = self.out / "configs" / f"{label}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        self.command(label, name, str(path))

    def path(self, *names: str) -> str:
        """A place below `out`, as configurations hold it."""
        return str(self.out.joinpath(*names))

    def prepare(self, name: str, inputs: str, form: str) -> None:
        """Shards of a corpus."""
        folder, packing = self.path("shards", name), {"format": form, "sequence_length": SEQUENCE_LENGTH}
        self.stage("prepare", f"prepare-{name}", inputs=inputs, tokenizer=self.tokenizer, out=folder, **packing)

    def train(self, stage: str, label: str, sources: dict[str, float], seed: int = 0, **config: Any) -> None:
        """A run with its recipe's settings."""
        shards = [{"path": self.path("shards", name), "weight": weight} for name, weight in sources.items()]
        steps, batch, rate = RECIPES.get(label, RECIPES["distill"])
        training = {"steps": steps, "global_batch": batch, "micro_batch": batch, "learning_rate": rate}
        config |= {
            "run": {"dir": self.path("runs", label), "seed": seed, "hang_timeout": 7200.0},
            "data": {"sources": shards, "sequence_length": SEQUENCE_LENGTH},
            "train": training | {"warmup_steps": steps // 20},
        }
        self.stage(stage, label, tokenizer=self.tokenizer, **config)

    def generate(self, seeds: str, answers: str) -> None:
        """The target's answers to a file of seeds, as shards."""
        settings = {"out": self.path(answers), "max_new_tokens": NEW_TOKENS, "batch_size": 100}
        section = {"inputs": self.path("data", f"{seeds}.jsonl"), "limit": ANSWERED[seeds]}
        self.stage("generate", f"generate-{answers}", target=self.target, seeds=section, **settings)
        self.prepare(answers, self.path(answers), "chat")

    def distil(self, method: str, seed: int) -> None:
        """One aligned drafter. The paper mixes distillation and pretraining data 9 to 1."""
        sources = {"answers": 9.0, "text": 1.0}
        loss, _, variant = method.partition("-")
        if variant == "ood":
            share = ANSWERED["seeds-ood"] / sum(ANSWERED.values())
            sources |= {"answers": 9.0 * (1 - share), "answers-ood": 9.0 * share}
        options: dict[str, Any] = {"loss": {"tvdpp_normalize": "batch"}} if variant == "batch" else {}
        options |= {"drafter": {"init_from": self.path("runs", "base")}, "objective": {loss: 1.0}}
        self.train("distill", f"{method}-{seed}", sources, seed, target=self.target, **options)

    def evaluate(self, methods: Sequence[str]) -> None:
        """All drafters of some methods on all tasks. One batch a condition, so one unit file a condition."""
        drafters = {run: self.path("runs", run) for method in methods for run in runs_of(method)}
        models = {"target": self.target | {"precision": "fp32"}, "drafters": drafters, "token_rate": {"prompts": 0}}
        for temperature, tasks in SAMPLING.items():
            label = f"{methods[-1]}-T{temperature}"
            prompts = [{"name": t, "inputs": self.path("data", f"{t}.jsonl"), "limit": EVALUATED} for t in tasks]
            decoding = {"gammas": list(GAMMAS), "temperatures": [temperature], "top_p": 0.9}
            sizes = {"max_new_tokens": NEW_TOKENS, "batch_size": EVALUATED, "out": self.path("evaluation", label)}
            self.stage("evaluate", f"evaluate-{label}", tasks=prompts, **models, **decoding, **sizes)

    def counts(self, methods: Sequence[str]) -> dict[Key, Counts]:
        """Tokens and target calls of every seed and prompt of each condition."""
        runs = [run for method in methods for run in runs_of(method)]
        cells: dict[Key, list[list[int]]] = {}
        for temperature, tasks in SAMPLING.items():
            folder = self.out / "evaluation" / f"{methods[-1]}-T{temperature}" / "units"
            keys = [(run, task, gamma) for task in tasks for run in runs for gamma in GAMMAS]  # the stage's own order
            for unit, key in enumerate(keys):
                cells[key] = [[sum(b), len(b)] for b in read_json(folder / f"unit-{unit:06d}.json")["blocks"]]
        keys = [(method, task, gamma) for method in methods for task in TASKS for gamma in GAMMAS]
        return {(m, task, gamma): np.array([cells[run, task, gamma] for run in runs_of(m)]) for m, task, gamma in keys}


def runs_of(method: str) -> list[str]:
    """The names of a method's runs; there is one base."""
    return [method] if method == "base" else [f"{method}-{seed}" for seed in SEEDS]


def efficiencies(counts: Counts, seeds: Counts, prompts: Counts) -> npt.NDArray[np.float64]:
    """Block efficiency, the mean over seeds, of each resample: `seeds` [R, S] and `prompts` [R, P] drawn; [R]."""
    if len(counts) == 1:
        seeds = np.zeros_like(seeds)
    drawn = counts[seeds[:, :, None], prompts[:, None, :]].sum(2)  # [R, S, 2]: sums before ratios
    return (drawn[..., 0] / drawn[..., 1]).mean(1)


def estimate(counts: Counts, minus: Counts | None = None) -> tuple[float, float, float]:
    """Block efficiency, or its difference from that of another method, and the ends of its 95 % interval."""

    def figure(*drawn: Counts) -> npt.NDArray[np.float64]:
        return efficiencies(counts, *drawn) - (0.0 if minus is None else efficiencies(minus, *drawn))

    rng, prompts = np.random.default_rng(0), counts.shape[1]
    drawn = figure(rng.integers(0, len(SEEDS), (4000, len(SEEDS))), rng.integers(0, prompts, (4000, prompts)))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(figure(np.arange(len(SEEDS))[None], np.arange(prompts)[None])[0]), float(low), float(high)


def tables(counts: dict[Key, Counts]) -> str:
    """Block efficiencies of all methods, then differences, as Markdown."""
    conditions = list(product(TASKS, GAMMAS))
    header = f"| | {' | '.join(f'{task}, gamma {gamma}' for task, gamma in conditions)} |\n|---|{'---|' * 6}\n"
    methods = list(dict.fromkeys(method for method, _, _ in counts))
    pairs = [(a, b) for a, b in PAIRS if {a, b} <= set(methods)] + [(method, "base") for method in methods[1:]]

    def cell(task: str, gamma: int, a: str, b: str = "") -> str:
        mean, low, high = estimate(counts[a, task, gamma], counts[b, task, gamma] if b else None)
        sign, winner = ("+", a if mean > 0 else b) if b else ("", "")
        verdict = f" **{winner}**" if b and (low > 0 or high < 0) else ""
        return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]{verdict}"

    def rows(compared: Sequence[tuple[str, ...]]) -> str:
        lines = (f"| {' - '.join(m)} | {' | '.join(cell(*c, *m) for c in conditions)} |\n" for m in compared)
        return header + "".join(lines)

    told = "Paired differences; the better one is named where the interval excludes 0"
    return f"Block efficiency:\n\n{rows([(method,) for method in methods])}\n{told}:\n\n{rows(pairs)}"


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    e = Experiment(options.data, options.out)
    e.step("data", lambda: make_data(e.data, e.out))
    tokenizer = ("tokenizer", "train", e.path("data", "text.jsonl"), "--vocab-size", "4096", "--out", e.tokenizer)
    e.step("tokenizer", lambda: e.command("tokenizer", *tokenizer))
    for name, form in (("text", "text"), ("chats", "chat")):
        e.step(f"prepare {name}", partial(e.prepare, name, e.path("data", f"{name}.jsonl"), form))
    e.step("target", lambda: e.train("pretrain", "target", {"chats": 1.0, "text": 1.0}, drafter=TARGET_SHAPE))
    export = {"drafter": e.path("runs", "target"), "tokenizer": e.tokenizer, "out": e.target["path"]}
    e.step("export target", lambda: e.stage("export", "export-target", **export))
    e.step("base", lambda: e.train("pretrain", "base", {"text": 1.0}, 1, drafter=DRAFTER_SHAPE))
    e.step("answers", lambda: e.generate("seeds", "answers"))
    if options.variants:
        e.step("answers-ood", lambda: e.generate("seeds-ood", "answers-ood"))
    counts: dict[Key, Counts] = {}
    for methods in (("base", *LOSSES), *([VARIANTS] if options.variants else [])):
        for seed, method in product(SEEDS, sorted({*methods} - {"base"})):
            e.step(f"distil {method}-{seed}", partial(e.distil, method, seed))
        e.step(f"evaluate {' '.join(methods)}", partial(e.evaluate, methods))
        counts |= e.counts(methods)
    raw = [{"method": m, "task": t, "gamma": g, "tokens_and_calls": c.tolist()} for (m, t, g), c in counts.items()]
    write_json(options.out / "results.json", {"seconds": e.seconds, "counts": raw})
    markdown = f"{sum(e.seconds.values()) / 60:.0f} minutes.\n\n{tables(counts)}"
    (options.out / "results.md").write_text(markdown)
    print(markdown)


if __name__ == "__main__":
    main()
