"""The target: a Hugging Face causal language model beside the drafter, whole or sharded."""

from dist_train.target.load import (
    DTYPES,
    check_vocabulary,
    config_digest,
    from_pretrained_whole,
    load_causal_lm,
    read_generation_config,
    read_target_config,
    target_identity,
)
from dist_train.target.model import Target, load_decoder, matrix_parameters, weights_digest
from dist_train.target.tokenizer import compare_with_target, end_ids, load_target_tokenizer, named_tokenizer

__all__ = [
    "DTYPES",
    "Target",
    "check_vocabulary",
    "compare_with_target",
    "config_digest",
    "end_ids",
    "from_pretrained_whole",
    "load_causal_lm",
    "load_decoder",
    "load_target_tokenizer",
    "matrix_parameters",
    "named_tokenizer",
    "read_generation_config",
    "read_target_config",
    "target_identity",
    "weights_digest",
]
