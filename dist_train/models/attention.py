"""Attention among the documents of a packed sequence, without a mask of [batch, 1, T, T].

transformers calls what is registered here under `PACKED` as it calls its own (`AttentionInterface`); since it makes no
masks for implementations that it does not know, none exist. On CUDA one variable-length flash kernel takes a whole
micro-batch (torch.nn.attention.varlen); elsewhere each document goes through scaled_dot_product_attention alone.
"""

from __future__ import annotations

import inspect
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_shards.errors import first_line
from dist_train.errors import UserError

PACKED = "packed"


class Documents:
    """Where the documents of a micro-batch [B, T] begin and end; no document goes on in the next row.

    `bounds`: int32 [n + 1] on the device, cumulative lengths over the flattened micro-batch; `longest`: tokens of the
    longest document, or a bound of it; `rows`: the lengths within each row, on the host.
    """

    def __init__(self, bounds: Tensor, longest: int, rows: list[list[int]] | None) -> None:
        self.bounds, self.longest, self._rows = bounds, longest, rows

    @classmethod
    def of_host(cls, positions: NDArray[np.int64], device: torch.device) -> Documents:
        """Of positions [B, T] that are still on the host: a document begins wherever they are 0."""
        starts = [np.flatnonzero(row == 0) for row in positions]
        rows = [np.diff(row, append=positions.shape[1]).tolist() for row in starts]
        lengths = [length for row in rows for length in row]
        bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        if device.type == "cuda":
            bounds = bounds.pin_memory()
        return cls(bounds.to(device, non_blocking=True), max(lengths), rows)

    @classmethod
    def of_device(cls, positions: Tensor) -> Documents:
        """Of positions [B, T] on the device, which the host does not read.

        `bounds` has B x T + 1 entries then, the last ones alike: documents without a token.
        """
        starts, tokens = positions.flatten() == 0, positions.numel()
        places = torch.arange(tokens, dtype=torch.int32, device=positions.device)
        bounds = torch.full((tokens + 1,), tokens, dtype=torch.int32, device=positions.device)
        bounds.scatter_reduce_(0, starts.cumsum(0) - 1, places, "amin")
        return cls(bounds, positions.shape[1], None)

    def rows(self, length: int) -> list[list[int]]:
        """The lengths within each row of `length` tokens."""
        if self._rows is None:
            lengths = [length for length in self.bounds.diff().tolist() if length]
            self._rows = [[]]
            for document in lengths:
                if sum(self._rows[-1]) == length:
                    self._rows.append([])
                self._rows[-1].append(document)
        return self._rows

    def arguments(self, model: Any) -> dict[str, Any]:
        """What the forward pass of `model` is to be called with: nothing where transformers asks the positions."""
        implementation = model.config._attn_implementation
        if implementation == PACKED:
            return {"documents": self}
        if not implementation.startswith("flash_attention"):
            return {}
        bounds, longest = self.bounds, self.longest
        return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document; without `documents` each row is one.

    `query` [B, H, T, D], `key` and `value` [B, G, T, D], G a divisor of H; returns [B, T, H, D]. A mask that the caller
    made itself, as for decoding with a cache, is used as it is. Raises NotImplementedError for a soft cap.
    """
    if softcap is not None:
        raise NotImplementedError("attention with a soft cap")
    if attention_mask is not None:
        found = F.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return found.transpose(1, 2), None
    if documents is not None and not dropout and _has_varlen(query, value):
        return _varlen(query, key, value, documents, scaling, sliding_window), None
    rows = documents.rows(query.shape[2]) if documents is not None else [[query.shape[2]]] * len(query)
    return _one_by_one(query, key, value, rows, scaling, dropout, sliding_window), None


def use_attention(model: Any, wanted: str, path: str) -> None:
    """Have the model attend as `wanted`, a name of transformers' or "auto": packed, where that gives the same.

    A family whose masks are more than causal, or that does not hand the documents down to its attention, keeps what
    transformers chose for it; a pass over two short documents tells. Collective where the model is partitioned. Raises
    UserError where `wanted` is not to be had.
    """
    from transformers import AttentionInterface

    if wanted != "auto":
        try:
            model.set_attn_implementation(wanted)
        except (ImportError, ValueError) as error:
            raise UserError(f"{path}: attention {wanted}: {first_line(error)}") from error
        return
    config, before = model.config.get_text_config(), model.config.get_text_config()._attn_implementation
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "attention_chunk_size", None):
        return
    expected = _two_documents(model)
    # Left to itself, so that compiled blocks are not compiled again for each arrangement of documents.
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))
    model.set_attn_implementation(PACKED)
    found = _two_documents(model)
    tolerance = 1e-4 if found.dtype == torch.float32 else 0.1
    if not (found - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1):
        model.set_attn_implementation(before)


def compile_blocks(decoder: Any) -> None:
    """torch.compile each block of a decoder, in place, so that parameters keep their names.

    Between them attention among packed documents stays eager, see `use_attention`.
    """
    for block in decoder.layers:
        block.compile()


@torch.no_grad()
def _two_documents(model: Any) -> Tensor:
    """Hidden states of two documents in one row, [1, 16, D]."""
    device = model.get_input_embeddings().weight.device
    positions = torch.tensor([[*range(10), *range(6)]], device=device)
    ids = torch.arange(16, device=device)[None] % model.config.get_text_config().vocab_size
    decoder, training = model.get_decoder(), model.training
    model.eval()  # a pass in training mode without gradients corrupts ZeRO-3's trace
    documents = Documents.of_device(positions).arguments(decoder)
    states = decoder(input_ids=ids, position_ids=positions, use_cache=False, **documents).last_hidden_state
    model.train(training)
    return states


@cache
def _varlen_attn() -> Any:
    """torch's variable-length attention, or None: with scale and window, as it is needed here, from torch 2.11 on."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        return None
    # Newer versions have grouped heads asked for; the kernel of torch 2.11 takes them unasked.
    return partial(varlen_attn, enable_gqa=True) if "enable_gqa" in known else varlen_attn


def _has_varlen(query: Tensor, value: Tensor) -> bool:
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    fits = query.shape[-1] == value.shape[-1] <= 256
    return query.is_cuda and is_half and fits and _varlen_attn() is not None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float | None, window: int | None
) -> Tensor:
    """All documents of the micro-batch in one kernel."""
    batch, heads, length, _ = query.shape
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]  # [B T, heads, D]
    found = _varlen_attn()(
        *flat,
        documents.bounds,
        documents.bounds,
        documents.longest,
        documents.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
    )
    return found.view(batch, length, heads, -1)


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: list[list[int]],
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Document by document; all rows at once where each is one document. [B, T, H, D], contiguous."""
    if all(len(row) == 1 for row in rows):
        return _document(query, key, value, scaling, dropout, window)
    found = []
    for row, lengths in enumerate(rows):
        parts = zip(*(tensor[row : row + 1].split(lengths, 2) for tensor in (query, key, value)), strict=True)
        found.append(torch.cat([_document(q, k, v, scaling, dropout, window) for q, k, v in parts], 1))
    return torch.cat(found)


def _document(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    length, mask = query.shape[2], None
    if window is not None and length > window:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    grouped = query.shape[1] != key.shape[1]
    found = F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )
    return found.transpose(1, 2).contiguous()
