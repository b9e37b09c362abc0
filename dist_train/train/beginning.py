"""A drafter that begins as a projection of its target, rather than at random; and what it learns of it first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data_shards import TokenLoader
from dist_train.config import TrainConfig
from dist_train.losses import Head
from dist_train.models.projection import measure, project_embedding, project_head
from dist_train.models.target import Target
from dist_train.runtime.process_group import Runtime
from dist_train.runtime.progress import phase
from dist_train.train.batch import on_device, sources_of

_STATES_A_DIMENSION = 8  # of the target, that its second moment is taken from
_INITIAL_SIZE = 0.02  # root mean square of an embedding, as transformers draws them


@dataclass(frozen=True)
class Regression:
    """The first `steps` of a run, in which the drafter learns its target's projected hidden states.

    No product is as wide as the vocabulary: a token costs the drafter's own layers. `states` [d, E] projects, `weights`
    [d] say what the numbers count; the loss is a mean over the `positions` of a step, those of prompts and padding
    included, which cost nothing more.
    """

    states: Tensor
    weights: Tensor
    steps: int
    positions: int

    def loss(self, hidden: Tensor, head: Head, target_hidden: Tensor) -> Tensor:
        """This micro-batch's share of the mean, from `hidden` [B, T, d] and `target_hidden` [B, T, E]."""
        wanted = target_hidden.to(self.states.dtype) @ self.states.T
        error = ((hidden.float() - wanted).square() @ self.weights).sum() / (len(self.weights) * self.positions)
        # Whoever reduces gradients waits for one of every weight.
        return error + 0.0 * head.weight[0, 0]


@torch.no_grad()
def begin_projected(model: Any, config: TrainConfig, target: Target, runtime: Runtime) -> Regression:
    """Give `model` the target's embedding and head, projected on its width; the same on every rank. Collective.

    The directions are those that count in the target's distributions at trained positions of the run's first samples.
    """
    width = model.config.hidden_size
    with phase("projecting the target's head"):
        states = target_states(config, target, runtime, _STATES_A_DIMENSION * target.config.hidden_size)
        geometry = measure(target.head, states)
        projection = project_head(target.head, geometry, width)
        model.get_output_embeddings().weight.copy_(projection.head)
        if not model.config.tie_word_embeddings:
            embedding = project_embedding(target.embedding(), geometry.chances, width, _INITIAL_SIZE)
            model.get_input_embeddings().weight.copy_(embedding)
    steps = round(config.regression.share * config.train.steps)
    return Regression(
        projection.states, projection.weights(), steps, config.train.global_batch * config.data.sequence_length
    )


def target_states(config: TrainConfig, target: Target, runtime: Runtime, number: int) -> list[Tensor]:
    """The target's hidden states at trained positions of the run's first samples, [N, E] each, `number` at least.

    Fewer where the data have fewer in one epoch. Every rank takes the same ones.
    """
    sources = sources_of(config.data)
    steps = sum(len(source.corpus) for source in sources) // (config.train.micro_batch * config.data.sequence_length)
    loader = TokenLoader(
        sources,
        sequence_length=config.data.sequence_length,
        global_batch=config.train.micro_batch,
        micro_batch=config.train.micro_batch,
        seed=config.run.seed,
        separate_documents=config.data.separate_documents,
        prefetch=0,
    )
    found: list[Tensor] = []
    step = rows = 0
    while rows < number and step < max(1, steps):
        for host in runtime.everywhere(partial(loader.step, step)):
            batch = on_device(host, runtime.device)
            states = target(batch.input_ids, batch.positions, batch.documents)
            found.append(states[batch.mask])
            rows += batch.unmasked
        step += 1
    return found
