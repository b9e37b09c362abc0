"""Decoding many answers at once with transformers."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from data_shards.errors import first_line
from dist_train.errors import UserError
from dist_train.generate.asks import Answer, Ask, Sampling
from dist_train.models.target import weights_digest
from dist_train.work.units import unit_seed


class _LocalEngine(ABC):
    """A model of this process, which one call at a time uses."""

    def __init__(self, model: Any, eos_ids: Sequence[int]) -> None:
        self._model, self._eos_ids = model, list(eos_ids)

    def ready(self, ask: Ask, sampling: Sampling) -> str | None:
        """It is, being loaded, if it can give one token; the digest of its weights."""
        self.answer([ask], sampling._replace(max_new_tokens=1))
        return weights_digest(self._model)

    @abstractmethod
    def answer(self, asks: Sequence[Ask], sampling: Sampling) -> list[Answer]:
        """One answer to each ask."""

    def units_at_once(self, unit_size: int) -> int:
        """One."""
        return 1


class StaticBatches(_LocalEngine):
    """Batches through `generate`, left-padded, each as long as its longest answer."""

    @torch.no_grad()
    def answer(self, asks: Sequence[Ask], sampling: Sampling) -> list[Answer]:
        """One answer to each ask. Same asks and settings, same answers: their seeds together seed the batch."""
        device = self._model.device
        width = max(len(ask.ids) for ask in asks)
        padding = self._eos_ids[0]
        ids = torch.tensor([[padding] * (width - len(ask.ids)) + ask.ids for ask in asks], device=device)
        mask = torch.tensor([[0] * (width - len(ask.ids)) + [1] * len(ask.ids) for ask in asks], device=device)
        torch.manual_seed(_joint_seed(asks))
        output = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            eos_token_id=self._eos_ids,
            pad_token_id=padding,
            **_options(sampling),
        )
        return [_cut(row, self._eos_ids) for row in output[:, width:].tolist()]


class ContinuousBatches(_LocalEngine):
    """transformers' continuous batching: a row that ends makes room for the next, over a paged cache."""

    @torch.no_grad()
    def answer(self, asks: Sequence[Ask], sampling: Sampling) -> list[Answer]:
        """One answer to each ask. All are queued before decoding begins, so that each step's batch is the same always.

        Raises UserError where the model's family has no paged attention, or decoding fails.
        """
        from transformers import ContinuousBatchingConfig, GenerationConfig

        sampled = GenerationConfig(eos_token_id=self._eos_ids, pad_token_id=self._eos_ids[0], **_options(sampling))
        # It seeds torch with this when its loop begins, in a thread of its own.
        seeded = ContinuousBatchingConfig(seed=_joint_seed(asks) % 2**32)
        if self._model.device.type == "cpu":
            # Room for all; left to itself it takes most of the machine's memory, and half a minute to touch it.
            pages = [-(-(len(ask.ids) + sampling.max_new_tokens) // seeded.page_size) for ask in asks]
            seeded.num_blocks = sum(pages) + 1
        answers: dict[str, list[int]] = {}
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # it tells a traceback; we, the reason
        try:
            manager = self._model.init_continuous_batching(sampled, seeded)
            order = manager.add_requests([ask.ids for ask in asks], max_new_tokens=sampling.max_new_tokens)
            manager.start()
            try:
                while len(answers) < len(order) and (
                    manager.is_running() or manager.output_router.output_queue.qsize()
                ):
                    output = manager.get_result(timeout=1)
                    if output is not None and output.error is not None:
                        raise RuntimeError(output.error)
                    if output is not None and output.is_finished():
                        answers[output.request_id] = list(output.generated_tokens)
            finally:
                manager.stop(block=True)
                manager.destroy()
        except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
            reason = first_line(error)
            raise UserError(f"continuous batching fails: {reason}; take engine.batching=static") from error
        if len(answers) < len(order):
            raise UserError("continuous batching ended before its answers; take engine.batching=static")
        return [_cut(answers[name], self._eos_ids) for name in order]


def _options(sampling: Sampling) -> dict[str, Any]:
    """As `generate` takes them. top_k: transformers cuts at the 50 likeliest unless told not to."""
    if sampling.temperature == 0:
        return {"max_new_tokens": sampling.max_new_tokens, "do_sample": False}
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return {"max_new_tokens": sampling.max_new_tokens, **drawn}


def _joint_seed(asks: Sequence[Ask]) -> int:
    return unit_seed(0, [ask.seed for ask in asks])


def _cut(row: list[int], eos_ids: Sequence[int]) -> Answer:
    """What follows the first end-of-sequence id is padding."""
    ends = [i for i, token in enumerate(row) if token in eos_ids]
    return Answer(row[: ends[0] + 1], "stop") if ends else Answer(row, "length")
