"""How recipe.py measures: the chance that each draft is accepted, and the calls of the target that follow from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from recipe_material import Material
from torch import Tensor

from dist_train.losses import Head
from dist_train.models.chains import lay_out, parallel_of
from dist_train.train.batch import DeviceBatch

GAMMAS = (3, 5)


@torch.inference_mode()
def chances(model: Any, material: Material) -> Iterator[tuple[str, float, list[Tensor]]]:
    """(task, temperature, of each answer the chances [N, gamma] that the drafts after each of its tokens are accepted,
    the largest gamma; those beyond its end are 1).
    """
    head, parallel = Head(model.lm_head.weight), parallel_of(model.config)
    for (task, temperature), (rows, log_q) in material.held_out.items():
        found = []
        for (prompt, answer), logs in zip(rows, log_q, strict=True):
            ids, place = torch.tensor([[*prompt, *answer]]), torch.arange(len(prompt) + len(answer))[None]
            trained = (place >= len(prompt) - 1) & (place < place.shape[1] - 1)
            batch: Any = DeviceBatch(ids, ids.roll(-1, 1), trained, place, None, len(answer))  # type: ignore[arg-type]
            if parallel:
                chains = lay_out(ids.numpy(), place.numpy(), trained.numpy(), parallel, 1.0, (0,))
                batch = batch._replace(chains=chains)
            whole, _ = batch.unrolled(None)
            read = {"position_ids": whole.positions, "attention_mask": whole.seen, "use_cache": False}
            hidden = model.model(input_ids=whole.input_ids, **read).last_hidden_state[whole.mask]
            labels = whole.labels[whole.mask]
            logits = head.logits(hidden)
            if temperature == 0:
                accepted = (logits.argmax(-1) == labels).double()
            else:
                log_p = (logits / temperature).log_softmax(-1).gather(1, labels[:, None])[:, 0]
                q = torch.zeros(place.shape[1], dtype=logs.dtype)
                q[len(prompt) - 1 : -1] = logs
                theirs = q[batch.chains.places(place.shape[1])[whole.mask]] if parallel else logs
                accepted = (log_p - theirs).clamp(max=0).exp().double()
            table = torch.ones(len(answer), max(GAMMAS), dtype=torch.float64)
            if parallel:
                laid = torch.zeros(whole.mask.shape, dtype=torch.float64)
                laid[whole.mask] = accepted
                by_place = batch.chains.by_place(laid, trained, parallel.tokens)[0, len(prompt) - 1 : -1]
                table[:, : parallel.tokens] = by_place.nan_to_num(1.0)
            else:
                padded = torch.cat([accepted, torch.ones(max(GAMMAS), dtype=torch.float64)])
                table = padded.unfold(0, max(GAMMAS), 1)[: len(answer)]
            found.append(table)
        yield task, temperature, found


def calls(accepted: list[list[float]], gamma: int) -> float:
    """The expected number of the target's calls that a text takes, `accepted` as `chances` has them."""
    needed = [0.0] * (len(accepted) + gamma + 2)
    for start in reversed(range(len(accepted))):
        alive, total = 1.0, 1.0
        for k in range(gamma):
            total += alive * (1 - accepted[start][k]) * needed[start + k + 1]
            alive *= accepted[start][k]
        needed[start] = total + alive * needed[start + gamma + 1]
    return needed[0]
