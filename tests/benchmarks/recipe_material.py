"""What the recipes of recipe.py have in common: prompts, the target's answers and its hidden states, made once.

    material = make(target, data, out, seeds=1024, held_out=96)

Open-ended and summarisation seeds, none of the translation-like ones (see alignment.py); the target answers them at
temperatures 0, 0.7 and 1 in turn. Held-out prompts of all three kinds are answered at 0 and at 0.7. Everything is kept
in `out`, part by part, so that what was interrupted goes on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alignment import TASKS, distinct, kind, read, without_passages_of
from torch import Tensor

from dist_train.config import TargetSection
from dist_train.decoding.speculative import generate
from dist_train.losses import Head
from dist_train.models.chains import find_mask_id
from dist_train.models.gguf import unpacked_gguf
from dist_train.models.load import read_generation_config
from dist_train.models.target import load_decoder
from dist_train.models.target_tokenizer import named_tokenizer

LENGTH, NEW_TOKENS = 192, 64
TEMPERATURES, SERVED = (0.0, 0.7, 1.0), (0.0, 0.7)
TEXT_ROWS = 512
PIECE = 128  # prompts answered, or rows gone through, between two savings

Rows = list[tuple[list[int], list[int]]]  # (prompt, answer) as token ids


@dataclass
class Material:
    """Rows padded to LENGTH: `ids` [N, LENGTH] and `mask` (answers) of conversations, `states` [N, LENGTH, E] bf16.

    `text` [M, LENGTH] and its `text_states` likewise. `held_out[task, temperature]`: rows, and the target's log q of
    each answer's tokens at that temperature (at 0: unused). `mask_id` is in no text.
    """

    config: Any
    head: Head
    embedding: Tensor
    ids: Tensor
    mask: Tensor
    states: Tensor
    text: Tensor
    text_states: Tensor
    held_out: dict[tuple[str, float], tuple[Rows, list[Tensor]]]
    mask_id: int


def make(target: str, data: Path, out: Path, seeds: int, held_out: int) -> Material:
    """All of it, from `out` where it is there already."""
    out.mkdir(parents=True, exist_ok=True)
    place = str(unpacked_gguf(Path(target))) if target.endswith(".gguf") else target
    section = TargetSection(path=place, precision="fp32")
    tokenizer = named_tokenizer(section, None)
    model: Any = load_decoder(section, torch.device("cpu"))
    found = read_generation_config(section).eos_token_id
    eos_ids = found if isinstance(found, list) else [found]

    def encoded(records: Sequence[dict[str, str]], number: int) -> list[list[int]]:
        prompts: list[list[int]] = []
        for record in records:
            ids = tokenizer.encode_prompt([{"role": "user", "content": record["prompt"]}])
            if len(ids) <= LENGTH - NEW_TOKENS:
                prompts.append(ids)
            if len(prompts) == number:
                break
        return prompts

    def prompts_and_text() -> dict[str, Any]:
        shuffled = random.Random(0)
        train, others = (read(data / f"instructions.{part}.jsonl.gz", shuffled) for part in ("train", "eval"))
        kept = {task: distinct(r for r in others if kind(r) == task and len(r["prompt"]) <= 600) for task in TASKS}
        apart = without_passages_of([r for records in kept.values() for r in records[: 3 * held_out]], train)
        wanted = distinct(r for r in apart if kind(r) in TASKS[:2] and len(r["prompt"]) <= 600)
        of_tasks, read_as_text = [r for r in apart if kind(r) in TASKS], list[dict[str, str]]()
        flat: list[int] = []
        while len(flat) < TEXT_ROWS * LENGTH:
            some, of_tasks = of_tasks[:PIECE], of_tasks[PIECE:]
            read_as_text += some
            texts = [f"{r['prompt'].strip()} {r['response']}" for r in some]
            flat += [token for ids in tokenizer.encode_batch(texts) for token in [*ids, tokenizer.eos_id]]
        # The evaluation's own records of the last task are too few.
        unseen = distinct(r for r in of_tasks if kind(r) == TASKS[2] and len(r["prompt"]) <= 600)
        kept[TASKS[2]] += without_passages_of(read_as_text, unseen[: 8 * held_out])
        return {
            "seeds": encoded(wanted, seeds),
            "text": [flat[i * LENGTH : (i + 1) * LENGTH] for i in range(TEXT_ROWS)],
            **{task: encoded(records, held_out) for task, records in kept.items()},
        }

    prompts = _kept(out / "prompts.json", prompts_and_text)

    def answers(wanted: list[list[int]], temperatures: Sequence[float], name: str) -> Rows:
        rows: Rows = []
        for temperature in temperatures:
            mine = wanted[temperatures.index(temperature) :: len(temperatures)]
            for first in range(0, len(mine), PIECE):
                some = mine[first : first + PIECE]
                path = out / f"answers-{name}-{temperature}-{first}.json"
                answer = partial(generate, model, some, temperature, 1.0, limits=[NEW_TOKENS] * len(some))
                own = range(first, first + len(some))
                made = _kept(path, partial(answer, eos_ids=eos_ids, seeds=own, batch_size=32))
                rows += zip(some, made, strict=True)
        return [(list(prompt), list(answer)) for prompt, answer in rows]

    conversations = answers(prompts["seeds"], TEMPERATURES, "seeds")
    head = Head(model.get_output_embeddings().weight.detach())
    ids, mask = _padded(conversations)
    text = torch.tensor(prompts["text"])
    states = _states(model, ids, out / "states.npy")
    text_states = _states(model, text, out / "text_states.npy")
    random.Random(0).shuffle(order := list(range(len(ids))))
    checked = {}
    for task in TASKS:
        for temperature in SERVED:
            rows = answers(prompts[task], [temperature], task)
            path = out / f"log_q-{task}-{temperature}.json"
            log_q = _kept(path, partial(_log_q, model, head, rows, temperature))
            checked[task, temperature] = (rows, [torch.tensor(one) for one in log_q])
    embedding = model.get_input_embeddings().weight.detach()
    own = (ids[order], mask[order], states[order])
    mask_id = find_mask_id(tokenizer, model.config.vocab_size, None)
    return Material(model.config, head, embedding, *own, text, text_states, checked, mask_id)


def _kept(path: Path, make: Callable[[], Any]) -> Any:
    """What the file holds, or what `make` gives, then."""
    if not path.exists():
        path.with_suffix(".part").write_text(json.dumps(make()))
        path.with_suffix(".part").rename(path)
        print(f"{path.name}: made", flush=True)
    return json.loads(path.read_text())


def _padded(rows: Rows) -> tuple[Tensor, Tensor]:
    """Ids and where the answers' tokens stand, [N, LENGTH]."""
    ids = torch.zeros(len(rows), LENGTH, dtype=torch.long)
    mask = torch.zeros(len(rows), LENGTH, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        mask[i, len(prompt) : len(prompt) + len(answer)] = True
    return ids, mask


@torch.inference_mode()
def _states(model: Any, ids: Tensor, path: Path) -> Tensor:
    """Final hidden states [N, LENGTH, E] in bf16, kept as 16-bit integers."""
    if not path.exists():
        parts = [model.get_decoder()(input_ids=some, use_cache=False).last_hidden_state for some in ids.split(16)]
        np.save(path, torch.cat(parts).bfloat16().view(torch.int16).numpy())
        print(f"{path.name}: made", flush=True)
    return torch.from_numpy(np.load(path)).view(torch.bfloat16)


@torch.inference_mode()
def _log_q(model: Any, head: Head, rows: Rows, temperature: float) -> list[list[float]]:
    """The target's log-probability of each token of each answer; at temperature 0 nothing is asked."""
    if temperature == 0:
        return [[0.0] * len(answer) for _, answer in rows]
    found = []
    for prompt, answer in rows:
        ids = torch.tensor([[*prompt, *answer]])
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        logs = (head.logits(hidden) / temperature).log_softmax(-1)
        found.append(logs.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist())
    return found
