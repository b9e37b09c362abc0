"""What tests against real servers share: a pair of models that both serve, what they are asked, what must come out."""

from __future__ import annotations

import copy
import os
import re
import shlex
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

AT_ONCE = 8
# Nothing is compiled, and a prompt is never read in pieces: vLLM 0.32 ends on a CPU where a seeded request's is
# ("CPU Generator does not use offset").
EAGER = ["--enforce-eager", "--max-num-batched-tokens", "4096", "--max-num-seqs", str(AT_ONCE)]
GAMMA, NEW_TOKENS, POSITIONS, END = 3, 40, 256, 2
PROMPTS = [
    "the model reads",
    "a token and the drafter",
    "what comes next",
    "agrees or not before the target",
    "guesses",
    "reads a token, reads a token",
    "before the drafter",
    "not the model",
    "next next next next next",
    "and the target agrees or not and the drafter guesses what comes",
    "target",
    "or",
]


def named(variable: str) -> Path:
    """The path in an environment variable that .ci/servers gives; without it the test is skipped."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set: no such server here; .ci/servers sets it up")
    return Path(os.environ[variable])


@dataclass(frozen=True)
class Pair:
    """Exported folders in fp32, their models, prompts as ids, and the target's greedy answers by transformers."""

    target: Path
    drafter: Path
    target_model: Any
    drafter_model: Any
    prompts: list[list[int]]
    greedy: list[list[int]]

    def decode(self, answers, temperature=0.0, draft_greedily=True, seed=0):
        """What our decoder makes of each prompt with the first token of its answer: tokens, and blocks of them.

        A server's first token comes from the prefill, so that it drafts only from there on.
        """
        from dist_train.decoding.speculative import speculative_generate

        begun = [[*prompt, answer[0]] for prompt, answer in zip(self.prompts, answers, strict=True)]
        return speculative_generate(
            self.drafter_model,
            self.target_model,
            begun,
            GAMMA,
            temperature,
            max_new_tokens=NEW_TOKENS - 1,
            eos_ids=[END],
            seed=seed,
            draft_greedily=draft_greedily,
        )


def answered_by_vllm(url, prompts, temperature=0.0, new_tokens=NEW_TOKENS):
    """The ids of the answers to all prompts, each with a seed of its own."""
    from dist_train.serving.http import Client
    from dist_train.serving.vllm import UNBENT

    client = Client(f"{url}/v1", None, timeout=300, patience=0)
    model = client.ask("GET", "/models")["data"][0]["id"]

    def ask(i):
        body = {"model": model, "prompt": prompts[i], "max_tokens": new_tokens, "temperature": temperature, "seed": i}
        answer = client.ask("POST", "/completions", {**body, **UNBENT, "return_token_ids": True})["choices"][0]
        ids = answer["token_ids"]
        return ids if answer["finish_reason"] == "length" or ids[-1:] == [END] else [*ids, END]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [*pool.map(ask, range(len(prompts)))]


def counters(url):
    """What the server's counters of speculative decoding say now."""
    from dist_train.serving.vllm import parse_counters

    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/metrics", timeout=60) as said:
        return parse_counters(said.read().decode())


def assert_same_distribution(pair, answers, temperature):
    """The second tokens of `answers` to the first prompt, as often as the target's own probabilities say.

    Chi-square over the tokens that are expected at least five times, and the others together.
    """
    import torch
    from scipy.stats import chisquare

    prompt = pair.prompts[0]
    with torch.no_grad():
        first = pair.target_model(torch.tensor([prompt])).logits[0, -1].double().div(temperature).softmax(-1)
        vocabulary = torch.arange(len(first))[:, None]
        begun = torch.cat([torch.tensor([prompt]).expand(len(first), -1), vocabulary], 1)
        second = pair.target_model(begun).logits[:, -1].double().div(temperature).softmax(-1)
    first[END] = 0  # an answer that ends has no second token
    expected = first @ second / first.sum()
    drawn = torch.bincount(torch.tensor([answer[1] for answer in answers if len(answer) > 1]), minlength=len(first))
    expected = expected * drawn.sum()
    often = expected >= 5
    assert often.sum() >= 10
    found = [*drawn[often].tolist(), int(drawn[~often].sum())]
    assert chisquare(found, [*expected[often].tolist(), float(expected[~often].sum())]).pvalue > 1e-4


def assert_same_efficiency(drafts, accepted, blocks):
    """Tokens per call as counted, within four standard errors of those of our decoder, `blocks`, by prompt.

    Both are means over the same prompts' answers, with other random numbers: their difference has twice the variance.
    """
    import numpy as np

    sums, calls = np.array([sum(b) for b in blocks]), np.array([len(b) for b in blocks])
    ours = sums.sum() / calls.sum()
    error = np.sqrt(((sums - ours * calls) ** 2).sum()) / calls.sum()
    served = 1 + accepted / drafts
    assert abs(served - ours) < 4 * np.sqrt(2) * error, f"served {served:.3f}, offline {ours:.3f} +- {error:.3f}"
    assert 4 * np.sqrt(2) * error < 0.35  # it would tell


def random_target(vocab_size, **how):
    """A Llama with random weights, the same ones each time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**shape, **how})).eval()


def make_pair(tiny, root, *words, positions=POSITIONS, **how):
    """The pair in `root`: folders `target` and `drafter`, which is exported with `words`.

    `positions`: the drafter's; `how`: of both models' configurations.
    """
    import torch
    from transformers import LlamaForCausalLM

    from dist_train.cli import main
    from dist_train.tokenizer import load_tokenizer

    target = random_target(tiny.vocab_size, **how)
    tokenizer = load_tokenizer(tiny.tokenizer)
    target.save_pretrained(root / "target")
    tokenizer.save(root / "target")
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in PROMPTS]
    greedy = []
    for ids in prompts:
        given = torch.tensor([ids])
        mask = torch.ones_like(given)
        answer = target.generate(
            given, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=END, eos_token_id=END
        )
        greedy.append(answer[0, len(ids) :].tolist())
    assert all(answer[0] != END for answer in greedy)
    drafter = LlamaForCausalLM(copy.deepcopy(target.config)).eval()
    drafter.config.max_position_embeddings = positions
    with torch.no_grad():
        for mine, given in zip(drafter.parameters(), target.parameters(), strict=True):
            mine.copy_(given + 0.01 * torch.randn_like(given))
    drafter.save_pretrained(root / "trained")
    given = [f"drafter={root / 'trained'}", f"target.path={root / 'target'}", f"out={root / 'drafter'}", "dtype=fp32"]
    assert main(["export", *given, *words]) == 0
    return Pair(root / "target", root / "drafter", target, drafter, prompts, greedy)


def blocks_of(card, language):
    """The code blocks of a model card."""
    return re.findall(rf"```{language}\n(.*?)```", card.read_text(), re.DOTALL)


def card_command(folder, first_word, programs, *more):
    """The card's command that begins with `first_word`, run as it stands, where the drafter's `folder` lies.

    `programs`: a folder that comes first in PATH; `more`: options that it gets besides.
    """
    from dist_train.serving.launch import ServerCommand

    pattern = re.compile(rf"^{first_word} ", re.MULTILINE)
    (block,) = (block for block in blocks_of(folder / "README.md", "bash") if pattern.search(block))
    script = f'set -e; cd {shlex.quote(str(folder.parent))}; {block.strip()} "$@"'
    path = f"{programs}:{os.environ['PATH']}"
    return ServerCommand(first_word, ("bash", "-c", script, "card", *more), {"PATH": path})


def assert_served_as_offline(results, engine):
    """What `evaluate --serve` writes of the pair, in fp32: greedy, to the unit; sampled, within its own interval."""
    (served,) = results["served"]
    assert served["engine"] == engine and served["version"]
    rows = {(row["gamma"], row["temperature"], row["concurrency"]): row for row in served["rows"]}
    assert {*rows} == {(GAMMA, temperature, at_once) for temperature in (0.0, 0.7) for at_once in (1, 4)}
    for (_, temperature, _), row in rows.items():
        assert row["speed_up"] == pytest.approx(row["tokens_per_s"] / row["plain_tokens_per_s"])
        assert 1.2 < row["block_efficiency"]["value"] < GAMMA + 1
        if temperature == 0:
            assert row["block_efficiency"] == row["offline"]
            assert row["equal_to_plain"] == row["plain_equal_to_offline"] == row["prompts"] and not row["differing"]
        else:
            difference = row["difference"]
            wide = difference["high"] - difference["low"]
            assert abs(difference["value"]) < wide < 1, row  # four standard errors
    alike = [row for row in results["rows"] if row["drafting"] == engine]
    for row in alike:
        assert row["block_efficiency"] == rows[GAMMA, row["temperature"], 1]["offline"]
    assert {row["drafting"] for row in results["rows"]} == {"sampled", "greedy", engine} and len(alike) == 2


def evaluate_serving(pair, tiny, out, *more):
    """The words of an evaluation of the pair that serves it, too."""
    return [
        "evaluate",
        f"target.path={pair.target}",
        "target.precision=fp32",
        f"drafters={{near: {pair.drafter}}}",
        f"tasks=[{{name: chat, inputs: {tiny.chat_lines}, limit: 40}}]",
        f"out={out}",
        "temperatures=[0, 0.7]",
        f"gammas=[{GAMMA}]",
        f"max_new_tokens={NEW_TOKENS}",
        "token_rate.prompts=0",
        *more,
    ]
