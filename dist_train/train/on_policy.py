"""Responses that the drafter itself writes, for the target to score (Agarwal et al., 2024; Zhou et al., 2024).

A share of the sequences keep their prompts and the lengths of their responses; each response token is sampled from the
drafter as it is now, given what it wrote before. The loss then sees the states that drafting meets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dist_train.config import OnPolicySection
from dist_train.losses import Head
from dist_train.models.drafter import TrainableDrafter
from dist_train.models.kv_cache import as_argument
from dist_train.train.batch import DeviceBatch
from dist_train.work.units import unit_seed


class OnPolicy:
    """Rewrites the responses of some sequences of a micro-batch. Collective under ZeRO-3, where ranks step together."""

    def __init__(self, section: OnPolicySection, seed: int) -> None:
        self.section, self.seed = section, seed

    def due(self, step: int) -> bool:
        """Whether step `step`, counted from 0, is one of those."""
        return step % self.section.every == 0

    def rewrite(self, drafter: TrainableDrafter, batch: DeviceBatch, number: int) -> DeviceBatch:
        """The micro-batch with the responses of a share of its sequences sampled anew; `number` decides which and how.

        Tokens go through the drafter one position at a time, all sequences together, with what it remembers of the
        positions before; those of another document of the sequence are masked.
        """
        ids = batch.input_ids.clone()
        labels = batch.labels.clone()
        random = torch.Generator().manual_seed(unit_seed(self.seed, "on-policy", number))
        chosen = (torch.rand(len(ids), generator=random) < self.section.share).to(ids.device)
        documents = (batch.positions == 0).cumsum(1)
        decoder = drafter.model.get_decoder()
        memory = as_argument(DynamicCache(config=decoder.config), decoder)
        with drafter.evaluating():
            for t in range(ids.shape[1]):
                visible = (documents[:, : t + 1] == documents[:, t : t + 1])[:, None, None]  # [B, 1, 1, t + 1]
                states = decoder(
                    input_ids=ids[:, t : t + 1],
                    position_ids=batch.positions[:, t : t + 1],
                    attention_mask=visible,
                    use_cache=True,
                    **memory,
                )
                drawn = drafter.model.get_output_embeddings()(states.last_hidden_state[:, -1], self._sampler(random))
                written = torch.where(chosen & batch.mask[:, t], drawn, labels[:, t])
                labels[:, t] = written
                if t + 1 < ids.shape[1]:
                    goes_on = documents[:, t + 1] == documents[:, t]
                    ids[:, t + 1] = torch.where(goes_on, written, ids[:, t + 1])
        return batch._replace(input_ids=ids, labels=labels)

    def _sampler(self, random: torch.Generator) -> Any:
        def sample(hidden: Tensor, head: Head) -> Tensor:
            # Drawn on the host, so that a seed gives the same tokens on every device.
            probabilities = torch.softmax(head.logits(hidden) / self.section.temperature, -1).cpu()
            return torch.multinomial(probabilities, 1, generator=random)[:, 0].to(hidden.device)

        return sample
