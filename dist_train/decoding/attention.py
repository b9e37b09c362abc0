"""Attention over grouped keys and values as they lie in the cache, without a copy for each head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_NAME = "dist_train_grouped_sdpa"


@contextmanager
def grouped_attention(*models: Any) -> Iterator[None]:
    """For the length of a `with` block, models that attend through SDPA read each key and value once for its group."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend)
    configs = [model.config.get_text_config() for model in models]
    changed = [config for config in configs if config._attn_implementation == "sdpa"]
    for config in changed:
        config._attn_implementation = _NAME
    try:
        yield
    finally:
        for config in changed:
            config._attn_implementation = "sdpa"


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' SDPA; the query heads of one key head become its queries, which every kernel with a mask takes.

    `query` [B, H, n, D], `key` and `value` [B, H/g, w, D], `attention_mask` [B, 1, n, w]; returns [B, n, H, D]. With
    `enable_gqa` and a mask CUDA has but the kernel that multiplies out the scores, and transformers copies keys and
    values for each head instead where there are several queries.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    groups = query.shape[1] // key.shape[1]
    if (
        groups == 1
        or attention_mask is None
        or attention_mask.shape[1] != 1
        or options.get("position_bias") is not None
    ):
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    rows, heads, count, size = query.shape
    out = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(rows, key.shape[1], groups * count, size),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, groups, 1) if count > 1 else attention_mask,
        scale=options.get("scaling"),
    )
    return out.reshape(rows, heads, count, value.shape[-1]).transpose(1, 2).contiguous(), None
