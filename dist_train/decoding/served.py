"""Decoding as inference servers do it: the first token of an answer comes from the prefill, drafts only after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_train.decoding.speculative import Generated, speculative_generate

PARALLEL = frozenset({"vllm"})
"""Servers that draft in one pass with a drafter that was trained for it."""


def generate_as_served(
    engine: str,
    drafter: Any,
    target: Any,
    input_ids: Sequence[Sequence[int]],
    gamma: int,
    temperature: float,
    top_p: float,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    seed: int,
    batch_size: int | None,
) -> Generated:
    """As `speculative_generate`, but as `engine` (vllm, llama.cpp) drafts and counts; `max_new_tokens` is 2 or more.

    `blocks` are those after the first token, with the drafter's confidences; an answer that ends with it has none.
    vLLM draws drafts under the temperature alone ("draft_sample_method": "probabilistic") and counts the last block in
    full. llama.cpp drafts likeliest tokens, one a pass whatever the drafter, and no more of them than the answer has
    room for, so that its last block ends with the text.
    """
    first = speculative_generate(
        None, target, input_ids, 0, temperature, top_p, max_new_tokens=1, seed=seed, batch_size=batch_size
    ).tokens
    going = [i for i, (token,) in enumerate(first) if token not in eos_ids]
    found = Generated(first, [[] for _ in first], [[] for _ in first])
    if not going:
        return found
    rest = speculative_generate(
        drafter,
        target,
        [[*input_ids[i], *first[i]] for i in going],
        gamma,
        temperature,
        top_p,
        max_new_tokens=max_new_tokens - 1,
        eos_ids=eos_ids,
        seed=seed + 1,  # a prompt's numbers are those of its place: the same ones must not be drawn twice
        draft_greedily=engine == "llama.cpp",
        draft_top_p=1.0,
        one_by_one=engine not in PARALLEL,
        record_confidences=True,
        batch_size=batch_size,
    )
    for i, tokens, blocks, confidences in zip(going, rest.tokens, rest.blocks, rest.confidences, strict=True):
        if engine == "llama.cpp":
            blocks[-1] -= sum(blocks) - len(tokens)
        found.tokens[i] = [*first[i], *tokens]
        found.blocks[i], found.confidences[i] = blocks, confidences
    return found
