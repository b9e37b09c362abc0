"""How a model of transformers is handed its key-value cache."""

from __future__ import annotations

import inspect
from typing import Any


def as_argument(cache: Any, model: Any) -> dict[str, Any]:
    """`cache` under the keyword that the model's forward pass has for it.

    transformers renamed `past_key_values` to `cache` in 5.24, and takes the old name until 5.40.
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}
