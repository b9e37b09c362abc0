"""A block's work as one region that torch.compile fuses: C++ on a CPU, Triton on CUDA.

Eager operators write a dozen tensors of [rows, vocabulary] to memory and read them back; fused, the logits are read and
the gradient is written. A region is made for one `Block` and one set of shapes, and never again in a process; what the
compiler made is kept in TORCHINDUCTOR_CACHE_DIR, which slurm/env.sh puts on the node's own disk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from data_shards.errors import first_line
from dist_train.errors import UserError
from dist_train.losses.block import Block
from dist_train.runtime.world import tell_once

Compile = Literal["auto"] | bool
"""False: eager. True: compiled, an error where that is impossible. auto: compiled, eager where that is impossible."""

Region = Callable[..., list[Tensor]]
Arguments = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor]

_REGIONS: dict[object, Region] = {}


def compiled(block: Block, arguments: Arguments, wanted: Compile) -> list[Tensor]:
    """What `block(*arguments)` returns and does, by its region.

    Raises UserError where `wanted` is True and nothing can be compiled on this machine.
    """
    key = (block, *map(_kind, arguments))
    region = _REGIONS.get(key)
    if region is not None:
        return region(*arguments)
    region = _region(block, arguments)
    try:
        columns = region(*arguments)  # the first call compiles, before anything of the arguments is changed
    except _failures() as error:
        reason = first_line(error)
        if wanted is True:
            raise UserError(
                f"loss.compile=true: the loss cannot be compiled here ({reason}); install a C++ compiler and Python's "
                "headers, or set loss.compile=false"
            ) from error
        tell_once(f"loss: eager, because it cannot be compiled here ({reason})")
        region = block
        columns = region(*arguments)
    _REGIONS[key] = region
    return columns


def _region(block: Block, arguments: Arguments) -> Region:
    """The block's operators, recorded on tensors without storage, as a function that is compiled when first called.

    Recorded, because each region is then a function of its own: Dynamo counts what it compiles by function, and gives
    up after eight.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    recorded = make_fx(partial(block, traced=True), tracing_mode="fake")(*arguments)
    # On CUDA a block has more rows than the GPU has processors: each row is reduced by one kernel, not by two.
    options: dict[str, str | int | bool | Callable[..., Any]] = {"split_reductions": False}
    region: Region = torch.compile(recorded, fullgraph=True, dynamic=False, options=options)
    return region


def _failures() -> type[Exception]:
    """What compiling fails with: no compiler, no headers, or a form that Inductor cannot take."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def _kind(argument: Tensor | None) -> object:
    """What a region is made for."""
    return argument if argument is None else (argument.shape, argument.stride(), argument.dtype, argument.device)
