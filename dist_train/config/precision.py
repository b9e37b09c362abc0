"""`precision: auto` becomes what the device is fast at, before it is used; recorded is what it became."""

from __future__ import annotations

from typing import Any

from dist_train.config.base import ConfigType, Section
from dist_train.runtime.device import fast_precision
from dist_train.runtime.world import tell_once


def resolve_precision(config: ConfigType, fast: str | None = None, prefix: str = "") -> ConfigType:
    """A copy in which each `precision: auto`, of any section, is `fast`; None: what this process's device is fast at.

    A line warns where bf16 was set by hand for a device that has to emulate it. `prefix`: of the section's keys.
    """
    changed: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Section):
            changed[name] = resolve_precision(value, fast, f"{prefix}{name}.")
        elif name == "precision" and value == "auto":
            changed[name] = fast or fast_precision()
        elif name == "precision" and value == "bf16" and fast is None and fast_precision() != "bf16":
            tell_once(
                f"note: {prefix}precision=bf16: this device emulates bf16, and is about four times faster in fp32; "
                "leave it out, or set it to auto"
            )
    return config.model_copy(update=changed)
