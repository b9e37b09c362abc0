"""How large a model is, by its configuration or as it is loaded: whole, whatever shards or packs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from data_shards.errors import first_line
from dist_train.errors import UserError
from dist_train.models.quantized import quantization_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GIB = 2**30
_MOST_LAYERS = 10_000


def render(estimate: Mapping[str, int]) -> str:
    """Bytes a rank of each kind, as YAML comments."""
    lines = [f"# {kind:<18} {size / _GIB:8.2f} GiB" for kind, size in estimate.items()]
    total = sum(estimate.values()) / _GIB
    return "\n".join([f"# memory a rank: {total:.2f} GiB and activations", *lines])


def skeleton(config: Any, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model of this configuration, without storage. Raises UserError where none can be made of it."""
    import torch
    from transformers import AutoModelForCausalLM

    refuse_endless(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # of sizes that do not fit together torch and transformers raise anything
        name = config.name_or_path or config.model_type
        raise UserError(f"{name}: config.json describes no model that can be made: {first_line(error)}") from error


def refuse_endless(config: Any) -> None:
    """Raise UserError where a configuration has more layers than could be made in a lifetime."""
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        name = config.name_or_path or config.model_type
        raise UserError(f"{name}: config.json: num_hidden_layers {layers}: more than any model has; correct it")


def parameters(config: Any, *, trust_remote_code: bool = False) -> int:
    """Of a causal language model of this configuration."""
    return num_parameters(skeleton(config, trust_remote_code=trust_remote_code))


def layer_parameters(config: Any, *, trust_remote_code: bool = False) -> int:
    """Of the largest decoder layer of a model of this configuration."""
    model = skeleton(config, trust_remote_code=trust_remote_code)
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:  # a family that names them otherwise: as much of the whole as there are layers
        return -(-num_parameters(model) // config.num_hidden_layers)
    return max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)


def num_parameters(model: PreTrainedModel) -> int:
    """Of a model, over all ranks; tied ones once."""
    return sum(_sizes(_plain(model)).values())


def matrix_parameters(model: PreTrainedModel) -> int:
    """Parameters that a token is multiplied with, over all ranks: the head, tied or not, and no embedding table."""
    model = _plain(model)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    sizes = _sizes(model)
    return sum(sizes.values()) - (sizes[id(embedding)] if head is not embedding else 0)


def bytes_read(model: PreTrainedModel) -> int:
    """Bytes of weights that a pass over one token reads: all as they are stored but the tables that it is looked up in.

    A head that is tied to such a table is read, once. Of a mixture of experts all experts count.
    """
    import torch

    head = model.get_output_embeddings().weight
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)} - {id(head)}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in tables)


def cached(config: Any) -> int:
    """Numbers that a token leaves in the caches of all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size


def _sizes(model: PreTrainedModel) -> dict[int, int]:
    """Elements of each parameter, of which ZeRO-3 leaves a rank a part."""
    return {id(p): int(getattr(p, "ds_numel", p.numel())) for p in model.parameters()}


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or one of the same shape without storage where its weights are packed."""
    import torch

    if quantization_of(model.config) is None:
        return model
    with torch.device("meta"):
        return type(model)(model.config)
