"""`dist-train checkpoint convert`: a checkpoint in DeepSpeed's own form, for programs that are not dist-train.

Our own need no converting: they know neither ranks nor ZeRO stages. DeepSpeed's know both.
"""

from __future__ import annotations

from pathlib import Path

from dist_train.config import PretrainConfig, TrainSection, load_config
from dist_train.errors import UserError
from dist_train.models.drafter import load_drafter
from dist_train.runtime.process_group import started
from dist_train.runtime.run_folder import CONFIG, list_checkpoints
from dist_train.train.checkpoint import Checkpoints
from dist_train.train.engine import build_engine, deepspeed_config
from dist_train.train.lease import Lease
from dist_train.train.state import DrafterState


def check(run: Path, out: Path, deepspeed: str) -> PretrainConfig:
    """The run's configuration. Raises UserError when there is nothing to convert, or `out` is there already."""
    if not list_checkpoints(run):
        raise UserError(f"{run}: no checkpoint here")
    if out.exists():
        raise UserError(f"{out}: is there already; choose another folder")
    config = load_config(PretrainConfig, run / CONFIG)  # a distillation's keys are the same
    deepspeed_config(_as_trained(config, deepspeed, world_size=1), world_size=1)
    return config


def convert(config: PretrainConfig, run: Path, out: Path, deepspeed: str) -> None:
    """Write the newest whole checkpoint of `run` to `out` as DeepSpeed saves it, for this world; on every rank.

    `deepspeed`: the ZeRO configuration of the program that will load it. Parameters have the names of the Hugging Face
    model, without what wraps it here.
    """
    with started() as runtime:
        checkpoints = Checkpoints(run, config.checkpoint, runtime, Lease(run))  # never taken: the run is only read
        found = checkpoints.newest_whole()
        assert found is not None
        folder, manifest = found
        model = load_drafter(folder)
        engine = build_engine(model, _as_trained(config, deepspeed, runtime.world_size), runtime)
        checkpoints.restore(folder, manifest, DrafterState(engine, model))
        step = engine.global_steps = manifest["step"]
        # Without its entry DeepSpeed's own converter to the universal form refuses what ZeRO 1 and 2 have saved.
        state = {"step": step, "universal_checkpoint_info": {}}
        unfinished = out.with_name(f"{out.name}.tmp")
        engine.save_checkpoint(str(unfinished), tag=f"step-{step:08d}", client_state=state)
        runtime.barrier()
        if runtime.is_first:
            model.config.save_pretrained(unfinished)
            unfinished.rename(out)
            print(f"checkpoint: step {step}, for {runtime.world_size} rank(s) under {deepspeed}; {out}", flush=True)


def _as_trained(config: PretrainConfig, deepspeed: str, world_size: int) -> TrainSection:
    """The run's optimizer and precision under another DeepSpeed configuration."""
    batch = config.train.micro_batch * world_size
    return config.train.model_copy(update={"deepspeed": deepspeed, "global_batch": batch})
