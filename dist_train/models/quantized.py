"""Quantised targets, which transformers loads with a library for each method: whether that is here."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from data_shards.errors import first_line
from dist_train.errors import UserError

if TYPE_CHECKING:
    from dist_train.config import TargetSection

# Method to the packages that transformers imports for it. It names one at a time itself, and some not at all.
_PACKAGES = {
    "awq": ("gptqmodel",),
    "gptq": ("optimum", "gptqmodel"),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed-tensors",),
}


def quantization_of(config: Any) -> dict[str, Any] | None:
    """What a Hugging Face configuration says of packed weights; None where they are plain."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return dict(found) if isinstance(found, dict) else found.to_dict()


def refuse_unloadable(section: TargetSection, quantization: dict[str, Any]) -> None:
    """Raise UserError where transformers cannot load such weights here, naming the packages that it lacks.

    A GPU that is missing is not told: the machine that checks may not be the one that runs.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    method = str(quantization.get("quant_method") or "of an unnamed method")
    told = f"{section.path}: quantised, {method}"
    if missing := [name for name in _PACKAGES.get(method, ()) if find_spec(name.replace("-", "_")) is None]:
        raise UserError(f"{told}: transformers loads it with {' and '.join(missing)}; pip install {' '.join(missing)}")
    try:
        AutoHfQuantizer.from_config(copy.deepcopy(quantization), pre_quantized=True).validate_environment()
    except RuntimeError:
        pass  # no GPU
    except Exception as error:  # of a method that it does not know, or values that make no sense to it
        raise UserError(
            f"{told}: this transformers cannot load it: {first_line(error)}; pip install -U transformers"
        ) from error
    if section.sharding == "zero3":
        raise UserError(f"{told}: ZeRO-3 cannot cut packed weights; take target.sharding=replicate")
