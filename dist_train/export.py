"""`dist-train export`: a drafter as a Hugging Face folder, refused where a server would refuse it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from dist_train.config import ExportConfig, TargetSection
from dist_train.drafter import find_model, load_drafter
from dist_train.errors import UserError
from dist_train.prompts import encode_seeds, read_seeds
from dist_train.runtime import quiet_libraries
from dist_train.target import check_vocabulary, load_causal_lm
from dist_train.tokenizer import Tokenizer, load_tokenizer


def check(config: ExportConfig) -> None:
    """Raise UserError or DataError for what is wrong."""
    folder = find_model(config.drafter)
    tokenizer = load_tokenizer(config.tokenizer)
    drafter = json.loads((folder / "config.json").read_text())
    if config.target is not None:
        check_vocabulary(config.target, drafter["vocab_size"], str(folder))
    if drafter["vocab_size"] < tokenizer.vocab_size:
        raise UserError(f"{folder}: {drafter['vocab_size']} entries, fewer than the tokenizer's {tokenizer.vocab_size}")
    for name in ("bos", "eos"):
        found, wanted = drafter.get(f"{name}_token_id"), getattr(tokenizer, f"{name}_id")
        if found != wanted:
            raise UserError(f"{folder}: {name}_token_id {found}, the tokenizer's is {wanted}; servers compare them")


def run(config: ExportConfig) -> None:
    """Write the folder, load it back, and with a target and prompts compare assisted with plain generation."""
    check(config)
    quiet_libraries()
    tokenizer = load_tokenizer(config.tokenizer)
    try:
        shutil.copytree(find_model(config.drafter), config.out, dirs_exist_ok=True)
        tokenizer.save(config.out)
    except OSError as error:
        raise UserError(f"{config.out}: cannot be written: {error}") from error
    drafter = load_drafter(config.out)
    print(f"export: {drafter.num_parameters():,} parameters, LlamaForCausalLM; {config.out}", flush=True)
    if config.target is not None and config.prompts is not None:
        prompts = encode_seeds(read_seeds(config.prompts), tokenizer)
        tokens = check_assisted_generation(config.out, config.target, prompts, tokenizer, config.max_new_tokens)
        print(
            f"export: assisted generation gives the target's own greedy output on {len(prompts)} prompts "
            f"({tokens:,} tokens)",
            flush=True,
        )


def check_assisted_generation(
    folder: Path, target: TargetSection, prompts: list[list[int]], tokenizer: Tokenizer, max_new_tokens: int
) -> int:
    """Generate greedily with transformers' assisted generation and without; the number of tokens compared.

    In fp64, where rounding cannot turn an argmax between the two ways to the same logits. Raises UserError naming the
    first prompt on which they differ.
    """
    import torch

    model: Any = load_causal_lm(target).double()
    assistant: Any = load_drafter(folder).double().eval()
    compared = 0
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        greedy = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.eos_id,
        }
        plain = model.generate(ids, **greedy)[0].tolist()
        assisted = model.generate(ids, assistant_model=assistant, **greedy)[0].tolist()
        if plain != assisted:
            raise UserError(f"{folder}: with this drafter prompt {number} gets another greedy answer than without")
        compared += len(plain) - len(prompt)
    return compared
