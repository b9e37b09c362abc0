"""The proof in transformers: with this drafter the target's greedy output is its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from dist_train.config import TargetSection
from dist_train.errors import UserError
from dist_train.models.drafter import load_drafter
from dist_train.models.load import DTYPES, load_causal_lm
from dist_train.runtime.progress import Progress, phase

_ROUNDING = 8
"""Units in the last place of the largest logit by which two passes over one text may differ: a pass over several tokens
sums in another order than one over a single token."""


class Proof(NamedTuple):
    """Tokens compared, and prompts whose answers part where rounding alone decides between two tokens."""

    tokens: int
    ties: int


def check_assisted_generation(
    folder: Path, target: TargetSection, prompts: list[list[int]], eos_ids: list[int], max_new_tokens: int
) -> Proof:
    """Generate greedily with transformers' assisted generation and without, in the target's precision.

    There rounding can turn an argmax between the two ways to the same logits: a prompt is compared up to where its
    answers part, if the target's logits of the two tokens differ by no more than that. Raises UserError naming the
    first prompt on which they part otherwise.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with phase(f"loading {target.path}"):
        model: Any = load_causal_lm(target, device)
        assistant: Any = load_drafter(folder, DTYPES[target.precision])
        assistant = assistant.to(device).eval()
    compared = ties = 0
    with Progress("export", len(prompts), "prompt") as bar:
        for number, prompt in enumerate(prompts):
            ids = torch.tensor([prompt], device=device)
            greedy = {
                "attention_mask": torch.ones_like(ids),
                "max_new_tokens": max_new_tokens,
                "do_sample": False,
                "eos_token_id": eos_ids,
                "pad_token_id": eos_ids[0],
            }
            plain = model.generate(ids, **greedy)[0].tolist()
            assisted = model.generate(ids, assistant_model=assistant, **greedy)[0].tolist()
            same = _common(plain, assisted)
            if plain != assisted:
                if not _is_tie(model, plain, assisted, same):
                    raise UserError(
                        f"{folder}: with this drafter prompt {number} gets another greedy answer than without"
                    )
                ties += 1
            compared += same - len(prompt)
            bar.update(number + 1)
    return Proof(compared, ties)


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two texts share from their beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@torch.no_grad()
def _is_tie(model: Any, one: list[int], other: list[int], at: int) -> bool:
    """Whether the two tokens at `at` are as likely to the target, but for rounding."""
    if at >= min(len(one), len(other)):
        return False  # one text goes on where the other has ended
    logits = model(input_ids=torch.tensor([one[:at]], device=model.device), use_cache=False).logits[0, -1]
    rounding = _ROUNDING * torch.finfo(logits.dtype).eps * float(logits.abs().max())
    return abs(float(logits[one[at]]) - float(logits[other[at]])) <= rounding
