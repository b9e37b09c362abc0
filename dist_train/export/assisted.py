"""The proof in transformers: with this drafter the target's greedy output is its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_train.config import TargetSection
from dist_train.errors import UserError
from dist_train.models.drafter import load_drafter
from dist_train.models.load import load_causal_lm
from dist_train.models.quantized import quantization_of


def check_assisted_generation(
    folder: Path, target: TargetSection, prompts: list[list[int]], eos_ids: list[int], max_new_tokens: int
) -> int:
    """Generate greedily with transformers' assisted generation and without; the number of tokens compared.

    In fp64, where rounding cannot turn an argmax between the two ways to the same logits, unless the target's weights
    are packed. Raises UserError naming the
    first prompt on which they differ.
    """
    import torch

    model: Any = load_causal_lm(target)
    if quantization_of(model.config) is None:
        model = model.double()
    assistant: Any = load_drafter(folder).double().eval()
    compared = 0
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        greedy = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "eos_token_id": eos_ids,
            "pad_token_id": eos_ids[0],
        }
        plain = model.generate(ids, **greedy)[0].tolist()
        assisted = model.generate(ids, assistant_model=assistant, **greedy)[0].tolist()
        if plain != assisted:
            raise UserError(f"{folder}: with this drafter prompt {number} gets another greedy answer than without")
        compared += len(plain) - len(prompt)
    return compared
