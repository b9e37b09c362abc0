"""A key-value cache whose rows advance on their own: what speculative decoding of a batch needs.

Slot s of a row belongs to the token at position s of that row's sequence, and a query at position t sees the slots up
to t. A rejected token needs no removal: its slot is beyond what anyone sees until the token that takes its place is
read, which overwrites it. So rows of any lengths share one rectangle, nothing is ever compacted, and padding at the end
of a prompt does no harm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dist_train.errors import UserError
from dist_train.models.kv_cache import as_argument


class RowReader:
    """A causal language model that reads tokens into `rows` rows of `slots` slots.

    Families with sliding windows are masked by position, in all layers (Mistral) or where the configuration's
    `layer_types` say so (Gemma, Qwen).
    """

    def __init__(self, model: Any, rows: int, slots: int) -> None:
        self.model = model
        config = model.config.get_text_config()
        self._window = getattr(config, "sliding_window", None)
        self._by_layer = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        self._place = _Place(rows, slots)
        self._layers = [_RowLayer(self._place) for _ in range(config.num_hidden_layers)]
        self._cache = as_argument(Cache(layers=list(self._layers)), model)
        self._slots = torch.arange(slots, device=model.device)
        self._seen = torch.zeros((), dtype=model.dtype, device=model.device)
        self._unseen = torch.full_like(self._seen, torch.finfo(model.dtype).min)
        self._largest = self._unseen

    def prefill(self, rows: Tensor, tokens: Tensor) -> None:
        """Read `tokens` [k, n] from position 0 of `rows` [k] on, padded at the end with anything."""
        if not tokens.shape[1]:
            return
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        self._place.go(rows, positions, tokens.shape[1], fresh=True)
        # Without a window the mask is but causal, which kernels know without one.
        mask = None if self._window is None else self._mask(positions, tokens.shape[1])
        self._forward(tokens, positions, mask, keep=1)

    def read(self, tokens: Tensor, positions: Tensor, width: int, keep: int = 0) -> Tensor:
        """Logits [B, keep, V] after the last `keep` of `tokens` [B, n] (0: all), of the first B rows.

        `positions` [B, n] are below `width`; a token at a negative one is not there.
        """
        rows = torch.arange(len(tokens), device=tokens.device)
        self._place.go(rows, positions, width, fresh=False)
        logits = self._forward(tokens, positions.clamp_min(0), self._mask(positions, width), keep)
        self._largest = torch.maximum(self._largest, logits.amax())  # NaN is above all
        return logits

    @property
    def nan(self) -> Tensor:
        """Whether any logits that were read held NaN, a tensor []: to ask would make a GPU wait."""
        return self._largest.isnan()

    def nan_error(self) -> UserError:
        """What is to be said then."""
        return UserError(
            f"{self.model.name_or_path}: gives NaN; its weights are damaged or too large for their precision"
        )

    def move(self, sources: Tensor, targets: Tensor, width: int) -> None:
        """Copy the first `width` slots of the rows `sources` [k] to the rows `targets` [k]."""
        for layer in self._layers:
            for room in (layer.keys, layer.values):
                if room is not None:
                    room[targets, :width] = room[sources, :width]

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | dict[str, Tensor] | None, keep: int) -> Tensor:
        return self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=keep,
            **self._cache,
        ).logits

    def _mask(self, positions: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """What each query sees, additive, [B, 1, n, width]."""
        behind = positions[:, None, :, None] - self._slots[:width]
        full = self._additive(behind >= 0)
        if self._window is None:
            return full
        sliding = self._additive((behind >= 0) & (behind < self._window))
        return {"full_attention": full, "sliding_attention": sliding} if self._by_layer else sliding

    def _additive(self, seen: Tensor) -> Tensor:
        return torch.where(seen, self._seen, self._unseen)


class _Place:
    """Where the layers of a cache write what is being read now, and what of it they show."""

    def __init__(self, rows: int, slots: int) -> None:
        self.rows, self.slots = rows, slots + 1  # the last one takes what is not there

    def go(self, rows: Tensor, positions: Tensor, width: int, *, fresh: bool) -> None:
        """`fresh`: the rows hold nothing else, the new keys are all there is to see."""
        slots = torch.where(positions < 0, self.slots - 1, positions)
        self.index = (rows[:, None] * self.slots + slots).flatten()
        self.count, self.width, self.fresh = len(rows), width, fresh


class _RowLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, slots, heads, head size]: a token's are contiguous."""

    def __init__(self, place: _Place) -> None:
        super().__init__()
        self._place = place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room, in the shape of the first states that come."""
        self.keys, self.values = self._room(key_states), self._room(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store states [B, heads, n, size]; return those of the slots in sight, [B, heads, width, size]."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self._store(self.keys, key_states)
        self._store(self.values, value_states)
        if self._place.fresh:
            return key_states, value_states
        shown = slice(self._place.count), slice(self._place.width)
        return self.keys[shown].transpose(1, 2), self.values[shown].transpose(1, 2)

    def get_seq_length(self) -> int:
        """Of no meaning where rows differ; positions and masks are always given."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots in sight and the first of them."""
        return self._place.width, 0

    def get_max_length(self) -> int:
        """Slots of a row."""
        return self._place.slots - 1

    def _room(self, states: Tensor) -> Tensor:
        return states.new_zeros(self._place.rows, self._place.slots, states.shape[1], states.shape[3])

    def _store(self, room: Tensor, states: Tensor) -> None:
        room.flatten(0, 1).index_copy_(0, self._place.index, states.transpose(1, 2).flatten(0, 1))
