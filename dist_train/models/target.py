"""The target: a Hugging Face causal language model that gives final hidden states, never logits.

Logits of target and drafter exist only for one chunk of rows, inside the loss; so the target returns what its head
would be multiplied with, and the head itself.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from dist_train.errors import UserError
from dist_train.losses import Head
from dist_train.models.attention import Documents, compile_blocks, use_attention
from dist_train.models.load import (
    config_digest,
    large_blocks_returned,
    load_causal_lm,
    load_tensor_parallel,
    load_zero3,
)
from dist_train.models.sizes import matrix_parameters
from dist_train.runtime.progress import phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dist_train.config import TargetSection
    from dist_train.runtime.process_group import Runtime


_PROBED = 64  # logits by which a target is known again


class Target:
    """The frozen target beside the drafter: `target(input_ids, positions)` gives hidden states [B, T, D].

    `head` turns them into logits; `identity` says which model this is, for checkpoints. Collective: every rank makes
    one and calls it in step, whatever the sharding.
    """

    def __init__(self, section: TargetSection, runtime: Runtime) -> None:
        with phase(f"loading {section.path}"), large_blocks_returned():
            self._load(section, runtime)

    def _load(self, section: TargetSection, runtime: Runtime) -> None:
        self._group: Any = None
        self._device = runtime.device
        if section.sharding == "zero3":
            model: Any = load_zero3(section, runtime)
        elif section.sharding == "tp":
            model, self._group = load_tensor_parallel(section, runtime)
        else:
            model = load_causal_lm(section, runtime.device)
        use_attention(model, section.attention, section.path)
        self._decoder = model.get_decoder()
        self.config = model.config.get_text_config()
        self.matrix_parameters = matrix_parameters(model)
        # Before the head is kept: a partitioned model gathers its own for this, and both would be there at once.
        expected = probe(model, section, runtime.device)
        self.head = _read_head(model)
        self.identity = {
            "path": section.path,
            "revision": section.revision,
            "config": config_digest(model.config),
            "head": _digest(self.head.weight),
            "probe": expected[0, -1, :: -(-self.config.vocab_size // _PROBED)].tolist(),
        }
        self._tolerance = 1e-3 if section.precision == "fp32" else 0.1
        self._check_head(expected, section)
        if section.compile:  # last, so that nothing is compiled for the short sequences of the checks
            compile_blocks(self._decoder)

    def embedding(self) -> Tensor:
        """That of the input, [V, E], whole on every rank. Collective."""
        from deepspeed.runtime.zero import GatheredParameters

        weight = self._decoder.get_input_embeddings().weight
        with GatheredParameters([weight] if hasattr(weight, "ds_id") else []):
            whole = _whole(weight)
        assert whole is not None
        return whole

    def is_same(self, identity: dict[str, Any]) -> bool:
        """Whether a stored `identity` is of this target: all equal, and its logits of the probe, which every weight has
        a part in, as near as another sharding would leave them.
        """
        mine = {key: value for key, value in self.identity.items() if key != "probe"}
        stored = {key: value for key, value in identity.items() if key != "probe"}
        return mine == stored and self._are_near(torch.tensor(self.identity["probe"]), torch.tensor(identity["probe"]))

    def _are_near(self, found: Tensor, expected: Tensor) -> bool:
        return bool((found - expected).abs().max() <= self._tolerance * expected.abs().max().clamp_min(1))

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, positions: Tensor, documents: Documents | None = None) -> Tensor:
        """Final hidden states, after the last norm; positions that begin anew keep documents apart.

        `documents`: where those begin, if the host knows.

        The ranks of a tensor-parallel group go through all their sequences together, and each takes its own.
        """
        if self._group is None:
            return self._decode(input_ids, positions, documents or Documents.of_device(positions))
        import torch.distributed as dist

        ranks = dist.get_world_size(self._group)
        both = torch.stack([input_ids, positions])  # [2, B, T]
        gathered = [torch.empty_like(both) for _ in range(ranks)]
        dist.all_gather(gathered, both.contiguous(), group=self._group)
        input_ids, positions = torch.cat(gathered, 1)
        states = self._decode(input_ids, positions, Documents.of_device(positions))
        return states.chunk(ranks)[dist.get_rank(self._group)]

    def _decode(self, input_ids: Tensor, positions: Tensor, documents: Documents) -> Tensor:
        return self._decoder(
            input_ids=input_ids, position_ids=positions, use_cache=False, **documents.arguments(self._decoder)
        ).last_hidden_state

    def _check_head(self, expected: Tensor, section: TargetSection) -> None:
        """A family may do more to its logits than `Head` knows; then every divergence would be wrong."""
        positions = torch.arange(16, device=self._device)[None]
        found = self.head.logits(self(_probed_ids(self._device, self.config.vocab_size), positions))
        if not self._are_near(found, expected):
            raise UserError(f"{section.path}: logits of {self.config.model_type} are more than a head; not supported")


def load_decoder(section: TargetSection, device: torch.device) -> Any:
    """The whole model on one device, to decode with. Raises UserError where it cannot be loaded or makes no sense."""
    with phase(f"loading {section.path}"):
        model = load_causal_lm(section, device)
        probe(model, section, device)
    return model


@torch.no_grad()
def probe(model: PreTrainedModel, section: TargetSection, device: torch.device) -> Tensor:
    """The logits that a model itself makes of a few tokens, [1, 16, V]. Raises UserError where they are not finite."""
    ids = _probed_ids(device, model.config.get_text_config().vocab_size)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    if not logits.amax().isfinite():  # -inf is a token that never comes
        raise UserError(f"{section.path}: the target's logits are not finite: its weights are damaged; fetch it again")
    return logits


def _probed_ids(device: torch.device, vocab_size: int) -> Tensor:
    return torch.arange(16, device=device)[None] % vocab_size


def _read_head(model: PreTrainedModel) -> Head:
    """The output head, whole on every rank."""
    from deepspeed.runtime.zero import GatheredParameters

    output, config = model.get_output_embeddings(), model.config.get_text_config()
    with GatheredParameters([p for p in output.parameters() if hasattr(p, "ds_id")]):
        weight, bias = (_whole(getattr(output, name, None)) for name in ("weight", "bias"))
    if weight is None or not weight.is_floating_point():
        raise UserError(f"{config.model_type}: a target whose output head is quantised too is not supported")
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return Head(weight, bias, float(scale), getattr(config, "final_logit_softcapping", None))


def _whole(parameter: Any) -> Tensor | None:
    """A parameter as a plain tensor, from whatever shards it. What ZeRO-3 gathered it lets go of, and stays here."""
    if parameter is None:
        return None
    if hasattr(parameter, "full_tensor"):
        return parameter.detach().full_tensor()
    return parameter.detach()


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_digest(model: PreTrainedModel) -> str:
    """What tells models apart wherever they lie: a hash of 64 sums over all numbers of every weight, as integers.

    Sums are made where the weights are, at the speed of their memory, and are the same on every device.
    """
    digest = xxhash.xxh64()
    stored = model.state_dict(keep_vars=True)  # packed weights may be buffers
    weights = {id(weight): weight for weight in stored.values() if isinstance(weight, Tensor)}
    for weight in weights.values():
        numbers = weight.detach().contiguous().view(_INTEGERS[weight.element_size()]).flatten()
        sums = torch.stack([part.sum(dtype=torch.int64) for part in numbers.tensor_split(64)])
        digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


def _digest(weight: Tensor) -> str:
    """A hash of the head: two targets with one configuration differ in it. Rows by rows, so that nothing is copied."""
    digest = hashlib.sha256()
    for rows in weight.detach().split(1024):
        digest.update(rows.contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
