"""Loading a target: whole on every rank, or partitioned by ZeRO-3 or tensor-parallel, so that no rank holds it whole.

Weights are read from safetensors files that are mapped into memory: the ranks of a node share what the kernel keeps of
them, so each file is read from disk once a node.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from data_shards.errors import first_line
from dist_train.errors import UserError
from dist_train.models.quantized import quantization_of, refuse_unloadable
from dist_train.models.sizes import layer_parameters, parameters
from dist_train.models.weights import refuse_unreadable_weights, weight_files
from dist_train.runtime.process_group import quiet_libraries

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dist_train.config import TargetSection
    from dist_train.runtime.process_group import Runtime

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
ZERO3_AHEAD = 2
"""Layers of a ZeRO-3 target that are gathered ahead of the one that calculates."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def read_config(path: str | Path, what: str, *, trust_remote_code: bool = False, **where: Any) -> PretrainedConfig:
    """The Hugging Face configuration at `path`; code that it brings runs only if trusted, and nobody is asked.

    `what` names in messages whose it is, `where` goes to transformers. Raises UserError where it cannot be used.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    _refuse_adapter(path)
    quiet_libraries()
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **where)
    except StrictDataclassError as error:
        reason = first_line(error.__cause__ or error)
        raise UserError(f"{path}: config.json: {reason}; correct it, transformers does not load it so") from error
    except Exception as error:  # of a value that makes no sense transformers raises anything
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise UserError(_needs_code(path, what)) from error
        why = (
            "" if isinstance(error, (OSError, ValueError)) else f"config.json makes no sense: {type(error).__name__}: "
        )
        raise UserError(f"{path}: no {what}: {why}{first_line(error)}") from error


def _needs_code(path: str | Path, what: str) -> str:
    mend = "read it, then set target.trust_remote_code=true" if what == "target model" else "take another"
    return f"{path}: the {what} needs code that comes with it; {mend}"


def _refuse_adapter(path: str | Path) -> None:
    adapter = Path(path) / "adapter_config.json"
    if not adapter.is_file() or (Path(path) / "config.json").exists():
        return
    try:
        base = json.loads(adapter.read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        base = None
    raise UserError(
        f"{path}: an adapter of {base or 'another model'}, not a model; merge the two (merge_and_unload of peft), save "
        "what comes out, and name that folder"
    )


def _read_whole_config(section: TargetSection) -> PretrainedConfig:
    return read_config(
        section.path, "target model", revision=section.revision, trust_remote_code=section.trust_remote_code
    )


def read_target_config(section: TargetSection) -> PretrainedConfig:
    """The target's configuration alone: cheap, for checks before anything starts. Raises UserError."""
    return _read_whole_config(section).get_text_config()


def check_target(section: TargetSection) -> None:
    """Raise UserError where the target's weights will not load here, as far as can be told without loading them."""
    config = _read_whole_config(section)
    if quantization := quantization_of(config):
        refuse_unloadable(section, quantization)
    refuse_unreadable_weights(Path(section.path))


def read_generation_config(section: TargetSection) -> Any:
    """What its answers end at and are bent by, if it has such a file; else None. Raises UserError when it is torn."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(section.path, revision=section.revision or "main")
    except (OSError, ValueError, TypeError) as error:
        # transformers says OSError of what is not there, and of what cannot be read.
        is_torn = not isinstance(error, OSError) or isinstance(error.__context__, ValueError)
        if not is_torn and not (Path(section.path) / "generation_config.json").exists():
            return None
        raise UserError(f"{section.path}: generation_config.json cannot be read: {error}; fetch it again") from error
    for name in SPECIAL:
        ids = getattr(found, name)
        if not all(type(one) is int for one in (ids if isinstance(ids, list) else [ids] if ids is not None else [])):
            raise UserError(f"{section.path}: generation_config.json: {name} is {ids!r}, no token id; correct it")
    return found


def target_bytes(section: TargetSection) -> int:
    """What the whole target's weights take: as they are stored where they are packed, else in its precision."""
    folder = Path(section.path)
    if quantization_of(_read_whole_config(section)) and folder.is_dir():
        return sum((folder / name).stat().st_size for name in weight_files(folder) if (folder / name).exists())
    count = parameters(read_target_config(section), trust_remote_code=section.trust_remote_code)
    return DTYPES[section.precision].itemsize * count


def target_identity(section: TargetSection) -> dict[str, str | None]:
    """What tells a target from another at the same path, without its weights."""
    generation, folder = read_generation_config(section), Path(section.path)
    return {
        "path": str(folder.resolve()) if folder.is_dir() else section.path,  # however it is spelled
        "revision": section.revision,
        "config": config_digest(read_target_config(section)),
        "generation": generation and config_digest(generation),
    }


def config_digest(config: Any) -> str:
    """Of a Hugging Face configuration, whatever version of transformers reads it."""
    # Without defaults: a newer version may have more of them.
    content = {name: value for name, value in config.to_diff_dict().items() if name != "transformers_version"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def check_vocabulary(section: TargetSection, vocab_size: int, of_what: str) -> None:
    """Raise UserError when the target's vocabulary is not exactly `vocab_size`, that of `of_what`."""
    found = read_target_config(section).vocab_size
    if found != vocab_size:
        raise UserError(
            f"{section.path}: the target's vocabulary has {found} entries, {of_what} has {vocab_size}; "
            "a drafter needs exactly the target's"
        )


def load_causal_lm(section: TargetSection, device: torch.device | None = None, **how: Any) -> Any:
    """The whole model, frozen, on `device` or the CPU; `how` goes to from_pretrained.

    Raises UserError when it cannot be loaded.
    """
    from safetensors import SafetensorError

    check_target(section)
    quantized = quantization_of(_read_whole_config(section)) is not None
    if device is not None and (quantized or device.type != "cpu"):
        # Straight from the files, without a copy on the host; packed weights are made for a device, and stay there.
        how["device_map"] = {"": device}
    try:
        model = from_pretrained_whole(
            section.path,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            dtype=DTYPES[section.precision],
            **how,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"{section.path}: the target cannot be loaded: {first_line(error)}") from error
    except RuntimeError as error:
        # Of shapes, or of kernels for packed weights that this machine lacks; else of a collective, or of memory.
        if "mismatch" in str(error):
            raise UserError(f"{section.path}: its weights are not those that its config.json describes") from error
        if quantized and not isinstance(error, torch.OutOfMemoryError):
            raise UserError(f"{section.path}: the target cannot be loaded: {first_line(error)}") from error
        raise
    return model.eval().requires_grad_(False)


def from_pretrained_whole(path: str | Path, *, trust_remote_code: bool = False, **how: Any) -> Any:
    """As transformers loads it, but a weight that its files lack is a UserError, where it takes random numbers.

    From safetensors alone: nothing is unpickled.
    """
    from transformers import AutoModelForCausalLM

    how |= {"trust_remote_code": trust_remote_code, "use_safetensors": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **how)
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{path}: its files have no weight {missing[0]}{more}; fetch the model again")
    return model


def load_zero3(section: TargetSection, runtime: Runtime) -> Any:
    """The target partitioned over all ranks by DeepSpeed ZeRO-3, gathered layer by layer in the forward pass.

    HfDeepSpeedConfig makes `from_pretrained` build partitioned parameters and is global to the process, so it lives
    only while the target is loaded: the drafter's engine must not see it.
    """
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    zero = zero3_configuration(section)
    if section.offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": runtime.device.type == "cuda"}
    configuration = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": section.precision == "bf16"},
        "zero_optimization": zero,
    }
    guard = HfDeepSpeedConfig(configuration)
    try:
        model = load_causal_lm(section)
    finally:
        unset_hf_deepspeed_config()
        del guard
    engine, *_ = deepspeed.initialize(model=model, config=configuration, dist_init_required=False)
    return engine.module.eval()


def zero3_configuration(section: TargetSection) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization` of a frozen target: while a layer calculates, the next two are on their way."""
    layer = layer_parameters(read_target_config(section), trust_remote_code=section.trust_remote_code)
    return {
        "stage": 3,
        # A layer is used once in a step: keeping it gathered until the next, as DeepSpeed does below a billion
        # parameters, would undo the partitioning.
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": ZERO3_AHEAD * layer,
        # DeepSpeed's own bound, or it would hold less than the bucket gathered of a target of large layers.
        "stage3_max_live_parameters": max(1_000_000_000, (ZERO3_AHEAD + 2) * layer),
    }


@contextmanager
def large_blocks_returned() -> Iterator[None]:
    """glibc gives freed blocks of more than 1 MiB back at once, as elsewhere only those above 32 MiB.

    Whole parameters come and go between partitions that stay; in one heap they would leave holes as large as the model.
    """
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        yield
        return
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(mmap_threshold, 1 << 20)
    try:
        yield
    finally:
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 64 << 20)


def load_tensor_parallel(section: TargetSection, runtime: Runtime) -> tuple[Any, Any]:
    """The target by transformers' own plan (`base_model_tp_plan`) over groups of `tp_size` neighbouring ranks.

    Returns the model and this rank's process group. Raises UserError where the family has no plan, or the ranks or
    heads do not allow it.
    """
    from transformers.distributed.configuration_utils import DistributedConfig

    size = section.tp_size
    if runtime.world_size % size:
        raise UserError(f"target.tp_size {size}: {runtime.world_size} ranks are not groups of that many")
    try:
        with _mesh_of_neighbours(size, runtime) as group:
            model = load_causal_lm(section, distributed_config=DistributedConfig(tp_size=size))
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{section.path}: cannot be cut into {size}: {error}; take target.sharding=zero3") from error
    return model, group


@contextmanager
def _mesh_of_neighbours(size: int, runtime: Runtime) -> Iterator[Any]:
    """While a model is loaded: transformers' mesh is this rank's group alone, where it would take the whole world.

    It asks that tensor-parallel ranks times replicas be the world, and makes replicas with FSDP; a frozen target needs
    none of that: the groups have nothing to do with each other.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from transformers.distributed import mixin
    from transformers.distributed.utils import TransformersDeviceMesh

    ranks = list(range(runtime.world_size))
    groups = [dist.new_group(ranks[first : first + size]) for first in range(0, len(ranks), size)]
    alone = [dist.new_group([rank]) for rank in ranks]
    group, me = groups[runtime.rank // size], alone[runtime.rank]
    first = runtime.rank // size * size

    def mesh(*names: str) -> DeviceMesh:
        return DeviceMesh.from_group(
            [me, me, me, group],
            runtime.device.type,
            mesh=torch.arange(first, first + size).view(1, 1, 1, size),
            mesh_dim_names=names,
        )

    made = TransformersDeviceMesh(mesh("pp", "dp_replicate", "fsdp", "tp"), mesh("pp", "dp_replicate", "efsdp", "ep"))
    with mock.patch.object(mixin, "initialize_distributed_mesh", lambda config: (runtime.device, made)):
        yield group
