"""Evaluation: speculative decoding, block efficiency, memory-bound speed-up, token rate."""

from typing import TYPE_CHECKING, Any

from dist_train.runtime.callable_package import make_callable

if TYPE_CHECKING:
    from dist_train.decoding.speculative import Generated, speculative_generate

__all__ = ["Generated", "speculative_generate"]


def __getattr__(name: str) -> Any:
    """Import PyTorch only where decoding is asked for: `--compare` does without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dist_train.decoding import speculative

    return getattr(speculative, name)


make_callable(__name__)
