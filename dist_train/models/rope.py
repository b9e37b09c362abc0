"""Positions of a drafter: how many it has, and the rotary embedding (RoPE) that tells them apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_train.config import DrafterSection

_THETA = 10_000.0
# What transformers, vLLM, SGLang and llama.cpp's converter read alike. Others have a factor for each frequency, and so
# one head size, or change with a text's length.
_SCALINGS = {
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


def max_positions(config: Any) -> int | None:
    """How many positions a model has, if its configuration says so."""
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def rope_of(config: Any) -> dict[str, Any]:
    """transformers' `rope_parameters` of a model, as far as a Llama of another size can have them; else of a plain one.

    Of a model with several kinds of layers it is that of those which see everything.
    """
    found = getattr(config, "rope_parameters", None) or {}
    found = found.get("full_attention", found)
    rope = {"rope_type": "default", "rope_theta": found.get("rope_theta") or _THETA}
    kind = found.get("rope_type", "default")
    names = _SCALINGS.get(kind, ())
    if names and all(found.get(name) for name in names):
        return {**rope, "rope_type": kind, **{name: found[name] for name in names}}
    return rope


def rope_parameters(section: DrafterSection, given: dict[str, Any]) -> dict[str, Any]:
    """`given`, with what `section` names in its place."""
    rope = dict(given)
    if section.rope_scaling is not None:
        rope = {"rope_type": "default", "rope_theta": given.get("rope_theta", _THETA)}
        if section.rope_scaling.rope_type != "none":
            rope |= section.rope_scaling.model_dump(exclude_none=True)
    if section.rope_theta is not None:
        rope["rope_theta"] = section.rope_theta
    return rope
