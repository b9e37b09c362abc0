"""`dist-train demo --target TARGET --minutes M`: the method with a real chat model, as much of it as the time allows.

Steps and counts are not fixed: a stage first runs for a moment, which tells what its steps cost on this machine, and
then for its share of the time that is left. What one stage takes too long, later ones go without.
"""

from __future__ import annotations

import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from data_shards.files import read_json
from dist_train.config import Engine, ServeSection, TargetSection
from dist_train.demo.recipe import SEQUENCE_LENGTH
from dist_train.demo.run import Demo, Step
from dist_train.errors import UserError
from dist_train.runtime.run_folder import read_metrics

LOSS = "kld"
"""One training: in minutes KLD, whose gradient is largest where a drafter knows least, gets furthest."""
REGRESSION = 0.5
"""Share of its steps that learn the target's projected hidden states, see tests/benchmarks/recipe.py."""
GAMMA, TEMPERATURES, NEW_TOKENS = 3, (0.0, 0.7), 64
SHARES = {
    "corpus": 4,
    "prepare": 2,
    "generate": 32,
    "distill": 42,
    "evaluate": 10,
    "export": 3,
    "served": 6,
    "report": 1,
}
"""Of the time, in percent; corpus, prepare, export and report take what they take."""
LEAST_MINUTES = 8.0
_MEASURED_STEPS, _MEASURED_SEEDS = 6, 8
_LEAST_STEPS, _LEAST_PROMPTS, _MOST_PROMPTS = 10, 8, 128
# What decoding a token with drafts takes, in tokens of plain decoding in full batches: on a CPU verifying gamma + 1
# tokens costs about as much as so many steps, and few drafts are accepted.
_DRAFTED_TOKEN = 3.5
_DRAFTER: dict[str, Any] = {"hidden_size": 128, "layers": 1, "heads": 2, "mlp_size": 344, "tie_embeddings": False}
_SERVER_STARTS = {"llama.cpp": 10.0, "vllm": 150.0}  # seconds, with a drafter and without one


def share_of(step: str, minutes: float, spent: float) -> float:
    """Seconds that `step` may take where `spent` are gone of all: its share of what is left for it and what follows."""
    names = list(SHARES)
    later = sum(SHARES[name] for name in names[names.index(step) :])
    return max(0.0, 60 * minutes - spent) * SHARES[step] / later


def fitting(seconds: float, each: float, least: int, most: int | None = None) -> int:
    """How many that take `each` seconds fit into `seconds`; at least `least`, at most `most`."""
    count = max(least, int(seconds / each))
    return count if most is None else min(count, most)


@dataclass
class TimedDemo(Demo):
    """A demo with a target that is given, in about so many minutes."""

    target: str = ""
    minutes: float = 30.0

    def steps(self) -> list[Step]:
        """All of them, in order."""
        return [
            ("corpus", "real text and chat seeds, held-out parts set aside", self.make_corpus),
            ("prepare", "token shards, by MPI ranks", self.prepare_text),
            ("generate", "the target answers the seeds", self.generate_answers),
            ("distill", "a drafter from the target's head, against its hidden states, then its logits", self.distil),
            ("evaluate", "block efficiency on held-out prompts", self.evaluate),
            ("export", "the drafter, for servers", self.export),
            ("served", "what a real server makes of it", self.serve),
            ("report", "plots and tables", self.report),
        ]

    def check(self) -> None:
        """Raise UserError where the target is no chat model that is here, or the time too short."""
        from dist_train.models.load import check_vocabulary, read_target_config
        from dist_train.models.target_tokenizer import load_target_tokenizer

        if self.minutes < LEAST_MINUTES:
            raise UserError(f"--minutes {self.minutes:g}: the least of every stage takes about {LEAST_MINUTES:g}")
        section = self.unpacked_target()
        tokenizer = load_target_tokenizer(section, None, None)
        if not tokenizer.chat_template:
            raise UserError(f"--target {self.target}: has no chat template; name a model that was tuned to chat")
        if read_target_config(section).vocab_size < tokenizer.vocab_size:
            check_vocabulary(section, tokenizer.vocab_size, "its tokenizer")
        planned = ", ".join(f"{name} {self.minutes * share / 100:.1f}" for name, share in SHARES.items())
        print(f"demo: {self.minutes:g} minutes for {self.target}: {planned}; sizes follow from what steps take here")

    def arguments(self) -> dict[str, Any]:
        """With which a demo goes on."""
        return {**super().arguments(), "target": self.target, "minutes": self.minutes}

    @property
    def tokenizer(self) -> str:
        """The target's own."""
        return self.target

    @property
    def target_section(self) -> dict[str, Any]:
        """The target as stages read it."""
        return {"path": self.target}

    def unpacked_target(self) -> TargetSection:
        """The same as it is loaded: a GGUF file as the folder made of it."""
        from dist_train.models.gguf import unpack_named

        section = TargetSection(path=self.target)
        unpack_named(section)
        return section

    # -- time ---------------------------------------------------------------------------------------------------

    def left(self, step: str) -> float:
        """Seconds that may still go into `step`."""
        inside = time.monotonic() - self.began
        return share_of(step, self.minutes, sum(self.seconds.values())) - inside

    def size(self, name: str, choose: Any) -> int:
        """A size that is chosen once, and kept for a demo that goes on."""
        if name not in self.sizes:
            self.sizes[name] = choose()
            self.save()
        return self.sizes[name]

    def steps_that_fit(self, step: str, stage: str, config: dict[str, Any]) -> int:
        """Optimizer steps for the time of `step`, from how long both kinds take and what goes on around them."""
        run = self.out / "measured" / step
        shutil.rmtree(run, ignore_errors=True)
        measured = {
            **config,
            "run": {**config["run"], "dir": str(run)},
            "train": {**config["train"], "steps": _MEASURED_STEPS, "warmup_steps": 0},
            "log": {"every": 1},
        }
        began = time.monotonic()
        self.stage(stage, f"measured-{step}", measured)
        tokens = config["train"]["global_batch"] * SEQUENCE_LENGTH
        seconds = [tokens / line["perf/tokens_per_s"] for line in read_metrics(run)]
        regression = round(REGRESSION * _MEASURED_STEPS)
        each = REGRESSION * statistics.median(seconds[1:regression])
        each += (1 - REGRESSION) * statistics.median(seconds[regression:])
        around = time.monotonic() - began - sum(seconds)
        steps = fitting(self.left(step) - around, each, _LEAST_STEPS)
        print(f"{step}: a step takes {each:.2f} s here, {around:.0f} s go on around them: {steps:,} steps", flush=True)
        return steps

    # -- steps --------------------------------------------------------------------------------------------------

    def distil(self) -> None:
        """Against the target's states and distributions; the paper mixes distillation and pretraining data 9 to 1."""
        from dist_train.models.load import read_target_config

        wide = read_target_config(self.unpacked_target()).hidden_size
        config = {
            "run": {"dir": str(self.out / "runs" / LOSS), "seed": 2},
            "tokenizer": self.tokenizer,
            "drafter": {**_DRAFTER, "hidden_size": min(_DRAFTER["hidden_size"], wide), "projected": True},
            "target": self.target_section,
            "data": self.data(("answers", 9.0), ("text", 1.0)),
            "objective": {LOSS: 1.0},
            "regression": {"share": REGRESSION},
        }
        train: dict[str, Any] = {
            "steps": _MEASURED_STEPS,
            "global_batch": 2 * self.processes,
            "micro_batch": 2,
            "learning_rate": 1.5e-3,
            "deepspeed": "zero1",
        }
        steps = self.size("distill", lambda: self.steps_that_fit("distill", "distill", {**config, "train": train}))
        train |= {"steps": steps, "warmup_steps": steps // 20}
        self.stage("distill", "distill", {**config, "train": train, "checkpoint": {"every": max(100, steps // 4)}})

    def generate_answers(self) -> None:
        """As many seeds as fit, each at four temperatures; then packed for training."""
        seeds = self.size("seeds", self.seeds_that_fit)
        self.stage("generate", "generate", self.generation(self.out / "answers", seeds, 128))
        self.prepare_chats("answers", str(self.out / "answers"))

    def generation(self, out: Path, seeds: int, batch_size: int) -> dict[str, Any]:
        """The configuration of `generate`."""
        return {
            "target": self.target_section,
            "seeds": {"inputs": str(self.out / "corpus" / "seeds.train.jsonl"), "limit": seeds},
            "out": str(out),
            "max_new_tokens": 128,
            "batch_size": batch_size,
        }

    def seeds_that_fit(self) -> int:
        """From how long a few take, on all processes; what packs the answers takes as long as what starts decoding."""
        out = self.out / "measured" / "answers"
        shutil.rmtree(out, ignore_errors=True)
        began = time.monotonic()
        self.stage("generate", "measured-generate", self.generation(out, _MEASURED_SEEDS, 16))
        whole, found = time.monotonic() - began, read_json(out / "_statistics.json")
        self.sizes["tokens per 1000 s"] = round(1000 * self.processes * found["tokens_per_s"])
        decoding = found["tokens"] / self.processes / found["tokens_per_s"]
        each, around = decoding / _MEASURED_SEEDS, 2 * max(0.0, whole - decoding)
        seeds = fitting(self.left("generate") - around, each, _MEASURED_SEEDS)
        print(f"generate: four answers to a seed take {each:.1f} s here: {seeds:,} seeds", flush=True)
        return seeds

    def prompts_that_fit(self, step: str, around: float, conditions: float) -> int:
        """Held-out prompts, decoded under so many conditions, from how fast answers were generated."""
        a_token = 1000 / self.sizes["tokens per 1000 s"]
        each = conditions * NEW_TOKENS * _DRAFTED_TOKEN * a_token
        return fitting(self.left(step) - around, each, _LEAST_PROMPTS, _MOST_PROMPTS)

    def evaluation(self, out: str, drafters: dict[str, str], prompts: int, **more: Any) -> dict[str, Any]:
        """The configuration of an evaluation on held-out prompts."""
        seeds = str(self.out / "corpus" / "seeds.heldout.jsonl")
        return {
            "target": self.target_section,
            "drafters": drafters,
            "tasks": [{"name": "held-out", "inputs": seeds, "limit": prompts}],
            "gammas": [GAMMA],
            "temperatures": list(TEMPERATURES),
            "max_new_tokens": NEW_TOKENS,
            "token_rate": {"prompts": 0},
            "out": str(self.out / out),
            **more,
        }

    def evaluate(self) -> None:
        """The drafter on held-out prompts."""
        predicting = 20.0
        drafters = {LOSS: str(self.out / "runs" / LOSS)}
        conditions = len(drafters) * len(TEMPERATURES)
        around = 30 + predicting
        prompts = self.size("prompts", lambda: self.prompts_that_fit("evaluate", around, conditions))
        more = {"drafting": ["sampled"], "prediction": {"batch_sizes": [1, 4], "seconds": predicting}}
        self.stage("evaluate", "evaluate", self.evaluation("evaluation", drafters, prompts, **more))

    def export(self) -> None:
        """For servers, with GGUF files where llama.cpp's converter is."""
        config: dict[str, Any] = {
            "drafter": str(self.out / "runs" / LOSS),
            "out": str(self.out / "drafter"),
            "target": self.target_section,
            "results": str(self.out / "evaluation"),
            "gguf": False,
        }
        self.stage("export", "export", config, processes=1)

    def serve(self) -> None:
        """The exported drafter in a real server, where one is installed."""
        engine = self.installed()
        if engine is None:
            print(
                "served: no server here. Install vLLM or llama.cpp, then see how much it gains: dist-train evaluate "
                f"{self.out}/configs/evaluate.yaml --serve vllm",
                flush=True,
            )
            return
        section = {"engine": engine, "concurrency": [1]}
        # Decoded here as the server drafts; then by the server, with drafts and without, on all cores.
        conditions = 2 * len(TEMPERATURES)
        prompts = self.size("served", lambda: self.prompts_that_fit("served", 30 + _SERVER_STARTS[engine], conditions))
        more = {"drafting": [engine], "serve": section, "prediction": {"seconds": 0.0}}
        drafters = {LOSS: str(self.out / "drafter")}
        config = self.evaluation("served", drafters, prompts, **more)
        self.stage("evaluate", "served", config, processes=1)

    def installed(self) -> Engine | None:
        """The first of the servers that can be started here: llama.cpp, which is there at once, or vLLM."""
        from dist_train.models.target_tokenizer import load_target_tokenizer
        from dist_train.serving.engines import find_engine

        section = self.unpacked_target()
        tokenizer = load_target_tokenizer(section, None, None)
        for engine in reversed(get_args(Engine)):
            try:
                find_engine(ServeSection(engine=engine), section, tokenizer, ())
            except UserError:
                continue
            return engine
        return None

    def report(self) -> None:
        """One page."""
        self.write_report([LOSS], is_real=True)
        spent = sum(self.seconds.values()) + time.monotonic() - self.began
        print(f"demo: {spent / 60:.1f} of {self.minutes:g} minutes: {self.times()}", flush=True)

    def times(self) -> str:
        """Of each step."""
        return ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in self.seconds.items())
