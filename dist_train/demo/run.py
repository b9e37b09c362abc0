"""`dist-train demo`: the whole method of Goel et al. (2024) at small scale, step by step, with the stage commands.

Each step writes into its own folder below `out` and is marked in `out/demo.json` when done; a killed demo, started
again, goes on with the step it was in, and the stages themselves go on where they were.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_shards.files import read_json, write_json
from dist_train.api.run import launch_stage
from dist_train.api.stages import STAGES
from dist_train.demo.recipe import DRAFTER_SHAPE, LOSSES, SEQUENCE_LENGTH, TARGET_SHAPE, VOCAB_SIZE, Recipe
from dist_train.errors import UserError
from dist_train.reports.results import read_tables

STATE = "demo.json"
REPORT = "report.html"


Step = tuple[str, str, Callable[[], None]]
"""Name, title, and what it does."""


def run_demo(demo: Demo) -> int:
    """Run what is missing of a demo; 0 when the report is written.

    Raises UserError before anything starts when an input is missing or the folder cannot be written.
    """
    demo.begin()
    steps, out = demo.steps(), demo.out
    for number, (name, title, action) in enumerate(steps, start=1):
        head = f"[{number}/{len(steps)}] {name}"
        if name in demo.seconds:
            print(f"{head}: done before, in {demo.seconds[name]:.0f} s", flush=True)
            continue
        print(f"{head}: {title}", flush=True)
        demo.began = time.monotonic()
        action()
        demo.finish(name, time.monotonic() - demo.began)
        print(f"{head}: {demo.seconds[name]:.0f} s\n", flush=True)
    print(
        f"demo: finished in {sum(demo.seconds.values()) / 60:.1f} minutes\n"
        f"report:      {out / REPORT} (also {out / 'report.md'})\n"
        f"TensorBoard: tensorboard --logdir {out / 'runs'}"
    )
    return 0


@dataclass
class Demo:
    """The folder of a demo that makes its own target, and its steps.

    `corpus`, `seeds`: JSONL files instead of documentation strings.
    """

    out: Path
    processes: int
    corpus: str | None = None
    seeds: str | None = None
    scale: float = 1.0
    seconds: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    began: float = 0.0

    def steps(self) -> list[Step]:
        """All of them, in order."""
        return [
            ("corpus", "real text and chat seeds, held-out parts set aside", self.make_corpus),
            ("tokenizer", "a Llama-2-style sentencepiece model", self.make_tokenizer),
            ("prepare", "token shards, by MPI ranks", self.prepare_corpora),
            ("target", "the chat model that is to decode faster", self.train_target),
            ("pretrain", "the drafter, on text alone", self.pretrain_drafter),
            ("generate", "the target answers the seeds", self.generate_answers),
            *(
                (f"distill {loss}", "the drafter against the target's distributions", self.distiller(loss))
                for loss in LOSSES
            ),
            ("evaluate", "block efficiency on held-out prompts", self.evaluate),
            ("export", "the best drafter, for servers", self.export),
            ("report", "plots and tables", self.report),
        ]

    @property
    def recipe(self) -> Recipe:
        """Its sizes."""
        return Recipe(self.scale, self.processes)

    # -- bookkeeping --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Read what is done; refuse bad input before an hour is spent."""
        from data_shards.inputs import find_files, plan_units

        for option, value in (("--corpus", self.corpus), ("--seeds", self.seeds)):
            if value is not None and not plan_units(find_files(value)):
                raise UserError(f"{option} {value}: the file is empty")
        self.check()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / ".writable").touch()
            (self.out / ".writable").unlink()
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be written: {error.strerror}; choose another folder") from error
        state = read_json(self.out / STATE) if (self.out / STATE).exists() else {"arguments": self.arguments()}
        if state["arguments"] != self.arguments():
            raise UserError(f"--out {self.out}: holds a demo begun with other arguments; remove it or choose another")
        self.seconds, self.sizes = state.get("seconds", {}), state.get("sizes", {})

    def check(self) -> None:
        """Raise UserError where an argument cannot be meant."""
        if not 0 < self.scale <= 100:
            raise UserError(f"--scale {self.scale}: a share of the training steps, above 0")

    def finish(self, step: str, seconds: float) -> None:
        """Mark a step as done."""
        self.seconds[step] = seconds
        self.save()

    def save(self) -> None:
        """Keep what is done, for a demo that goes on."""
        write_json(self.out / STATE, {"arguments": self.arguments(), "seconds": self.seconds, "sizes": self.sizes})

    def arguments(self) -> dict[str, Any]:
        """With which a demo goes on."""
        given = {"corpus": self.corpus, "seeds": self.seeds}
        return {"processes": self.processes, "scale": self.scale, **given}

    def stage(self, name: str, label: str, config: dict[str, Any], processes: int | None = None) -> None:
        """Run a stage, in processes of its own, with a configuration that stays readable in `out/configs`."""
        path = self.out / "configs" / f"{label}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        code = launch_stage(STAGES[name], [str(path)], processes or self.processes)
        if code:
            sys.exit(code)

    # -- where things are ---------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> str:
        """The tokenizer's folder."""
        return str(self.out / "tokenizer")

    @property
    def target_section(self) -> dict[str, Any]:
        """The target as stages read it."""
        return {"path": str(self.out / "target")}

    def data(self, *sources: tuple[str, float]) -> dict[str, Any]:
        """A `data` section from names of prepared corpora and weights."""
        return {
            "sources": [{"path": str(self.out / "shards" / name), "weight": weight} for name, weight in sources],
            "sequence_length": SEQUENCE_LENGTH,
        }

    # -- steps --------------------------------------------------------------------------------------------------

    def make_corpus(self) -> None:
        """Documentation strings, or the given files; prompts split into training and held-out ones."""
        folder = self.out / "corpus"
        if self.corpus is None or self.seeds is None:
            from dist_train.demo.corpus import build_corpus
            from dist_train.runtime.progress import Progress

            with Progress("corpus", 100, "%") as bar:
                stats = build_corpus(folder, progress=lambda done, total, _: bar.update(round(100 * done / total)))
            print(f"corpus: {stats}", flush=True)
        if self.seeds is not None:
            counts = split_seeds(self.seeds, folder)
            print(f"corpus: {counts[0]:,} seeds, {counts[1]:,} held out, from {self.seeds}", flush=True)

    @property
    def _text(self) -> str:
        return self.corpus or str(self.out / "corpus" / "train.jsonl")

    def make_tokenizer(self) -> None:
        """Train one."""
        from data_shards.inputs import read_texts
        from dist_train.tokenizer import train_tokenizer

        texts = read_texts(self._text)
        tokenizer = train_tokenizer(texts, self.out / "tokenizer", VOCAB_SIZE, chat_template="llama2")
        print(f"tokenizer: {tokenizer.vocab_size:,} pieces; {self.out / 'tokenizer'}", flush=True)

    def prepare_corpora(self) -> None:
        """The text, and the chats that the target learns to answer from."""
        self.prepare_text()
        self.prepare_chats("chats", str(self.out / "corpus" / "seeds.train.jsonl"))

    def prepare_text(self) -> None:
        """What drafters are pretrained on."""
        common = {"tokenizer": self.tokenizer, "shard_bytes": 4 << 20}
        self.stage(
            "prepare", "prepare-text", {"inputs": self._text, "out": str(self.out / "shards" / "text"), **common}
        )

    def prepare_chats(self, name: str, inputs: str) -> None:
        """Conversations, of which the answers are trained on."""
        config = {
            "inputs": inputs,
            "format": "chat",
            "tokenizer": self.tokenizer,
            "out": str(self.out / "shards" / name),
            "sequence_length": SEQUENCE_LENGTH,
            "shard_bytes": 1 << 20,
        }
        self.stage("prepare", f"prepare-{name}", config)

    def train_target(self) -> None:
        """Train a small chat model and export it, as if it had come from a hub."""
        run = str(self.out / "runs" / "target")
        config = {
            "run": {"dir": run},
            "tokenizer": self.tokenizer,
            "drafter": TARGET_SHAPE,
            "data": self.data(("text", 1.0), ("chats", 1.0)),
            "train": self.recipe.target(),
            "checkpoint": {"every": 100},
        }
        self.stage("pretrain", "target", config)
        export = {"drafter": run, "tokenizer": self.tokenizer, "out": str(self.out / "target"), "dtype": "fp32"}
        self.stage("export", "target-export", export, processes=1)

    def pretrain_drafter(self) -> None:
        """Next-token prediction on the text."""
        config = {
            "run": {"dir": str(self.out / "runs" / "base"), "seed": 1},
            "tokenizer": self.tokenizer,
            "drafter": DRAFTER_SHAPE,
            "data": self.data(("text", 1.0)),
            "train": self.recipe.drafter(),
            "checkpoint": {"every": 100},
        }
        self.stage("pretrain", "base", config)

    def generate_answers(self) -> None:
        """Every seed at four temperatures, then packed for training."""
        config = {
            "target": self.target_section,
            "seeds": {"inputs": str(self.out / "corpus" / "seeds.train.jsonl"), "limit": self.recipe.count(400)},
            "out": str(self.out / "answers"),
            "max_new_tokens": 128,
            "batch_size": 100,
        }
        self.stage("generate", "generate", config)
        self.prepare_chats("answers", str(self.out / "answers"))

    def distiller(self, loss: str) -> Callable[[], None]:
        """The step that distils with one loss."""

        def distil() -> None:
            config = {
                "run": {"dir": str(self.out / "runs" / loss), "seed": 2},
                "tokenizer": self.tokenizer,
                "drafter": {"init_from": str(self.out / "runs" / "base")},
                "target": self.target_section,
                # The paper mixes distillation and pretraining data 9 to 1.
                "data": self.data(("answers", 9.0), ("text", 1.0)),
                "objective": {loss: 1.0},
                "train": self.recipe.distillation(),
                "checkpoint": {"every": 100},
            }
            self.stage("distill", loss, config)

        return distil

    def evaluate(self) -> None:
        """Base and distilled drafters on held-out prompts."""
        config = {
            "target": self.target_section,
            "tokenizer": self.tokenizer,
            "drafters": {name: str(self.out / "runs" / name) for name in ("base", *LOSSES)},
            "tasks": [
                {
                    "name": "held-out",
                    "inputs": str(self.out / "corpus" / "seeds.heldout.jsonl"),
                    "limit": self.recipe.count(128),
                }
            ],
            "max_new_tokens": 64,
            "batch_size": 32,
            "token_rate": {"prompts": self.recipe.count(8, least=1)},
            "out": str(self.out / "evaluation"),
        }
        self.stage("evaluate", "evaluate", config)

    def export(self) -> None:
        """The drafter with the highest block efficiency, checked through transformers' assisted generation."""
        best = best_drafter(read_tables(self.out / "evaluation"))
        config = {
            "drafter": str(self.out / "runs" / best),
            "tokenizer": self.tokenizer,
            "out": str(self.out / "drafter"),
            "target": self.target_section,
            "prompts": {"inputs": str(self.out / "corpus" / "seeds.heldout.jsonl"), "limit": 8},
            "results": str(self.out / "evaluation"),
        }
        print(f"export: the best is {best}", flush=True)
        self.stage("export", "export", config, processes=1)

    def report(self) -> None:
        """One page."""
        self.write_report(LOSSES, is_real=False)

    def write_report(self, losses: Sequence[str], *, is_real: bool) -> None:
        """Of the drafters that were distilled with these losses."""
        from dist_train.demo.report import write_report

        write_report(self.out, self.seconds, losses, is_real=is_real)
        print(f"report: {self.out / REPORT}", flush=True)


def best_drafter(results: dict[str, Any]) -> str:
    """The distilled drafter with the highest mean block efficiency over all conditions."""
    totals: dict[str, float] = {}
    for row in results["rows"]:
        totals[row["drafter"]] = totals.get(row["drafter"], 0.0) + row["block_efficiency"]["value"]
    del totals[results["base"]]
    return max(totals, key=lambda name: totals[name])


def split_seeds(inputs: str, out: Path, held_out_share: float = 0.1) -> tuple[int, int]:
    """Split a file of seeds by a hash of each prompt into `seeds.train.jsonl` and `seeds.heldout.jsonl`; the counts."""
    from dist_train.config import SeedsSection
    from dist_train.prompts.seeds import read_seeds

    out.mkdir(parents=True, exist_ok=True)
    parts: dict[bool, list[str]] = {False: [], True: []}
    for messages in read_seeds(SeedsSection(inputs=inputs)):
        digest = hashlib.blake2b(json.dumps(messages).encode(), digest_size=8).digest()
        is_held_out = int.from_bytes(digest, "big") < held_out_share * 2**64
        parts[is_held_out].append(json.dumps({"prompt": messages}, ensure_ascii=False) + "\n")
    for is_held_out, name in ((False, "seeds.train.jsonl"), (True, "seeds.heldout.jsonl")):
        if not parts[is_held_out]:
            raise UserError(f"--seeds {inputs}: too few prompts to hold some out")
        _write_lines(out / name, parts[is_held_out])
    return len(parts[False]), len(parts[True])


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(lines), encoding="utf-8")
