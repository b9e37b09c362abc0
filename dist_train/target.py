"""The target: a Hugging Face causal language model that gives final hidden states, never logits.

Logits of target and drafter exist only for one chunk of rows, inside the loss; so the target returns what its head
would be multiplied with, and the head itself.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_train.errors import UserError
from dist_train.losses import Head

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from dist_train.config import TargetSection
    from dist_train.runtime import Runtime

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def read_target_config(section: TargetSection) -> PretrainedConfig:
    """The target's configuration alone: cheap, for checks before anything starts. Raises UserError."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            section.path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{section.path}: no target model: {str(error).strip().splitlines()[0]}") from error
    return config.get_text_config()


def check_vocabulary(section: TargetSection, vocab_size: int, of_what: str) -> None:
    """Raise UserError when the target's vocabulary is not exactly `vocab_size`, that of `of_what`."""
    found = read_target_config(section).vocab_size
    if found != vocab_size:
        raise UserError(
            f"{section.path}: the target's vocabulary has {found} entries, {of_what} has {vocab_size}; "
            "a drafter needs exactly the target's"
        )


def load_causal_lm(section: TargetSection) -> Any:
    """The whole model, frozen, on the CPU. Raises UserError when it cannot be loaded."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            section.path,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            dtype=DTYPES[section.precision],
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{section.path}: the target cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    return model.eval().requires_grad_(False)


class Target:
    """The frozen target beside the drafter: `target(input_ids, positions)` gives hidden states [B, T, D].

    `head` turns them into logits; `identity` says which model this is, for checkpoints. Collective: every rank makes
    one and calls it in step, whatever the sharding.
    """

    def __init__(self, section: TargetSection, runtime: Runtime) -> None:
        model: Any = _load_zero3(section) if section.sharding == "zero3" else load_causal_lm(section).to(runtime.device)
        self._decoder = model.get_decoder()
        self.head = _read_head(model)
        self.identity = {
            "path": section.path,
            "revision": section.revision,
            "config": hashlib.sha256(
                json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode()
            ).hexdigest(),
            "head": _digest(self.head.weight),
        }
        self._check_head(model, section)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Final hidden states, after the last norm; positions that begin anew keep documents apart."""
        return self._decoder(input_ids=input_ids, position_ids=positions, use_cache=False).last_hidden_state

    def _check_head(self, model: PreTrainedModel, section: TargetSection) -> None:
        """A family may do more to its logits than `Head` knows; then every divergence would be wrong."""
        device = self.head.weight.device
        probe = torch.arange(16, device=device)[None] % self.head.weight.shape[0]
        with torch.no_grad():
            expected = model(input_ids=probe, use_cache=False).logits.float()
        found = self.head.logits(self(probe, torch.arange(16, device=device)[None]))
        tolerance = 1e-3 if section.precision == "fp32" else 0.1
        if (found - expected).abs().max() > tolerance * expected.abs().max().clamp_min(1):
            raise UserError(f"{section.path}: logits of {model.config.model_type} are more than a head; not supported")


def _read_head(model: PreTrainedModel) -> Head:
    """The output head, whole on every rank."""
    from deepspeed.runtime.zero import GatheredParameters

    output, config = model.get_output_embeddings(), model.config.get_text_config()
    with GatheredParameters([p for p in output.parameters() if hasattr(p, "ds_id")]):
        weight = output.weight.detach().clone() if hasattr(output.weight, "ds_id") else output.weight.detach()
        bias = None if getattr(output, "bias", None) is None else output.bias.detach().clone()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return Head(weight, bias, float(scale), getattr(config, "final_logit_softcapping", None))


def _digest(weight: Tensor) -> str:
    """A hash of the head: two targets with one configuration differ in it."""
    return hashlib.sha256(weight.detach().float().cpu().numpy().tobytes()).hexdigest()


def _load_zero3(section: TargetSection) -> Any:
    """The target partitioned over all ranks by DeepSpeed ZeRO-3, gathered layer by layer in the forward pass.

    HfDeepSpeedConfig makes `from_pretrained` build partitioned parameters and is global to the process, so it lives
    only while the target is loaded: the drafter's engine must not see it.
    """
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    configuration = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": section.precision == "bf16"},
        "zero_optimization": {"stage": 3},
    }
    guard = HfDeepSpeedConfig(configuration)
    try:
        model = load_causal_lm(section)
    finally:
        unset_hf_deepspeed_config()
        del guard
    engine, *_ = deepspeed.initialize(model=model, config=configuration, dist_init_required=False)
    return engine.module.eval()
