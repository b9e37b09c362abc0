"""`dist-train pretrain` and `dist-train distill`: from a configuration to a trained drafter."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_shards import ShardedTokens, TokenLoader
from dist_train.config import DistillConfig, TrainConfig, save_config
from dist_train.errors import LostPeerError, UserError
from dist_train.losses import needs_target
from dist_train.models.chains import Parallel, find_mask_id, parallel_of
from dist_train.models.drafter import TrainableDrafter, drafter_config, load_drafter, new_drafter, warm_config
from dist_train.models.load import check_target, read_target_config
from dist_train.models.pairing import check_drafter
from dist_train.models.sizes import num_parameters, parameters
from dist_train.models.target import Target
from dist_train.models.target_tokenizer import load_target_tokenizer, named_tokenizer
from dist_train.runtime.faults import fault_kind
from dist_train.runtime.process_group import Runtime, set_seed, started
from dist_train.runtime.run_folder import CONFIG, LOGS, list_checkpoints, read_metrics
from dist_train.tokenizer import Tokenizer
from dist_train.train.batch import sources_of
from dist_train.train.beginning import begin_projected
from dist_train.train.checkpoint import Checkpoints
from dist_train.train.compiling import compiles_blocks, compiles_loss
from dist_train.train.engine import build_engine, deepspeed_config, own_clipping, zero_stage
from dist_train.train.held_out import HeldOut
from dist_train.train.lease import Lease
from dist_train.train.left_out import LossGuard, StepControl
from dist_train.train.loop import Training
from dist_train.train.metrics import Metrics, rank_log_file
from dist_train.train.objective import Objective
from dist_train.train.on_policy import OnPolicy
from dist_train.train.state import DrafterState
from dist_train.train.timing import Phases, throughput


def check(config: TrainConfig) -> None:
    """Everything that can be known to be wrong before a process group starts. Raises UserError or DataError."""
    tokenizer = load_target_tokenizer(config.target, config.tokenizer, strict=False)
    for source in config.data.sources:
        check_corpus(source.path, tokenizer, config)
    if config.target is None and needs_target(config.objective):
        raise UserError(f"objective {config.objective} compares with a target; set target.path, or use {{ce: 1.0}}")
    if config.target is not None:
        check_target(config.target)
    vocab_size = _vocab_size(config, tokenizer)
    if config.drafter.init_from is not None:
        check_drafter(config.drafter.init_from, "drafter.init_from", vocab_size, tokenizer)
        _warm(config, tokenizer)
    else:
        _check_projected(config, _shape(config, tokenizer))
    if config.held_out is not None:
        check_corpus(config.held_out.path, tokenizer, config)
        if config.held_out.path.resolve() in {source.path.resolve() for source in config.data.sources}:
            raise UserError(f"held_out.path {config.held_out.path} is trained on; hold another corpus out")
        if config.held_out.sequences % config.train.micro_batch:
            raise UserError(
                f"held_out.sequences {config.held_out.sequences} is not a multiple of train.micro_batch "
                f"{config.train.micro_batch}; change one of them"
            )
    if config.on_policy.share and not needs_target(config.objective):
        raise UserError("on_policy.share asks the target to score what the drafter writes; name a loss besides ce")
    deepspeed_config(config.train, world_size=1)
    _loader(config, rank=0, world_size=1)
    if config.run.resume == "must" and not list_checkpoints(config.run.dir):
        raise UserError(f"{config.run.dir}: nothing to resume: no checkpoint there")
    _check_writable(config.run.dir)


def run(config: TrainConfig) -> None:
    """Train; on every rank. Ends with a checkpoint of the last step, or of the step at which it was told to stop."""
    check(config)
    with started() as runtime, writing_to(config.run.dir), rank_log_file(config.run.dir, runtime.rank):
        try:
            _train(config, runtime)
        except RuntimeError as error:
            if fault_kind(str(error)) != "lost peer":
                raise
            raise LostPeerError(
                f"rank {runtime.rank}: another rank is gone (killed, out of memory, or a lost node; see "
                f"{config.run.dir / LOGS}); the same command goes on from the newest checkpoint"
            ) from error


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """A full disk, wherever in the run folder it shows, ends a run with one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
            raise
        raise UserError(
            f"{folder}: cannot be written: {error.strerror}; free space, the same command goes on from the newest "
            "checkpoint"
        ) from error


def _train(config: TrainConfig, runtime: Runtime) -> None:
    config = runtime.first(config)  # precision is what rank 0's device is fast at
    set_seed(config.run.seed)
    _tell_memory(config, runtime)
    training = _build(config, runtime)
    resumed = training.resume()
    if runtime.is_first:
        save_config(config, config.run.dir / CONFIG)
        _introduce(training, resumed)
    with training.metrics.going_on_from(training.step):
        finished = training.fit()
    if runtime.is_first:
        _conclude(training, finished)


def memory_report(config: TrainConfig, world_size: int) -> str:
    """What each of `world_size` ranks will need, as YAML comments; or why that cannot be told here."""
    try:
        estimate = estimate_memory(config, world_size)
    except UserError as error:
        return f"# memory: not estimated: {error}"
    lines = [f"#   {kind}: {amount:.2f}" for kind, amount in estimate.items() if amount]
    return "\n".join([f"# memory, estimated: {sum(estimate.values()):.2f} GiB a rank", *lines])


def estimate_memory(config: TrainConfig, world_size: int) -> dict[str, float]:
    """GiB a rank of each kind. Raises UserError where the drafter's or the target's sizes cannot be told here."""
    from dist_train.train.memory import memory_estimate

    return memory_estimate(config, _planned_shape(config), world_size)


def checkpoints_bytes(config: TrainConfig) -> float:
    """What the checkpoints that are kept will take on disk, and the one that is being written."""
    from dist_train.train.memory import checkpoint_bytes, kept_checkpoints

    return kept_checkpoints(config) * checkpoint_bytes(config, parameters(_planned_shape(config)))


def _planned_shape(config: TrainConfig) -> Any:
    tokenizer = named_tokenizer(config.target, config.tokenizer)
    return _shape(config, tokenizer) if config.drafter.init_from is None else _warm(config, tokenizer)


def _tell_memory(config: TrainConfig, runtime: Runtime) -> None:
    """Print what a rank will need before anything is loaded. Raises UserError where that is not free."""
    from dist_train.train.memory import available_gib, check_fit, replicated_note

    estimate, available = estimate_memory(config, runtime.world_size), min(runtime.gather(available_gib(runtime)))
    if runtime.is_first:
        shown = ", ".join(f"{kind} {amount:.2f}" for kind, amount in estimate.items() if amount >= 0.005)
        print(
            f"{_name(config)}: about {sum(estimate.values()):.2f} GiB a rank of {available:.1f} free ({shown})",
            flush=True,
        )
        if note := replicated_note(config, _planned_shape(config), runtime.world_size, available):
            print(f"{_name(config)}: {note}", flush=True)
    if config.run.check_memory:
        check_fit(estimate, available)


def _build(config: TrainConfig, runtime: Runtime) -> Training:
    """The parts of a run, each from its section of the configuration."""
    lease = Lease(config.run.dir)
    runtime.agree(lease.take)
    tokenizer = named_tokenizer(config.target, config.tokenizer)
    # Cross-entropy alone takes nothing of the target but the size of its vocabulary.
    target = Target(config.target, runtime) if config.target and needs_target(config.objective) else None
    if config.drafter.init_from is not None:
        model = load_drafter(config.drafter.init_from, config=_warm(config, tokenizer))
    else:
        model = new_drafter(_shape(config, tokenizer), config.run.seed)
    regression = begin_projected(model, config, target, runtime) if config.drafter.projected and target else None
    drafter = TrainableDrafter(
        model,
        gradient_checkpointing=config.train.gradient_checkpointing,
        compiled=compiles_blocks(config, model.config.vocab_size, runtime),
        attention=config.drafter.attention,
    )
    engine = build_engine(drafter, config.train, runtime)
    objective = Objective(
        config.objective,
        config.loss,
        target,
        compiles_loss(config, model.config.vocab_size, runtime),
        regression if config.regression.share else None,
    )
    work = throughput(config, model, target, runtime)
    return Training(
        config=config,
        runtime=runtime,
        engine=engine,
        drafter=DrafterState(engine, model, has_ema=config.train.ema_decay is not None),
        control=StepControl(
            engine, own_clipping(config.train, zero_stage(engine)), config.train.ema_decay, runtime.device
        ),
        loader=_loader(config, runtime.rank, runtime.world_size),
        objective=objective,
        tokenizer=tokenizer.sha256,
        on_policy=OnPolicy(config.on_policy, config.run.seed, runtime.gather) if config.on_policy.share else None,
        held_out=HeldOut(config, runtime, objective) if config.held_out else None,
        guard=LossGuard(config.train.max_skipped, skip_spikes=config.train.skip_spikes, device=runtime.device),
        checkpoints=Checkpoints(config.run.dir, config.checkpoint, runtime, lease),
        metrics=Metrics(config.run.dir, _name(config), config.train.steps, config.log, runtime, work),
        phases=Phases(runtime.device),
    )


def _loader(config: TrainConfig, rank: int, world_size: int) -> TokenLoader:
    return TokenLoader(
        sources_of(config.data),
        sequence_length=config.data.sequence_length,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        seed=config.run.seed,
        rank=rank,
        world_size=world_size,
        separate_documents=config.data.separate_documents,
    )


def _shape(config: TrainConfig, tokenizer: Tokenizer) -> Any:
    """The Hugging Face configuration of a drafter made from scratch."""
    target = read_target_config(config.target) if config.target else None
    vocab_size = _vocab_size(config, tokenizer)
    shape = drafter_config(config.drafter, vocab_size, tokenizer.bos_id, tokenizer.eos_id, target)
    return _in_one_pass(config, shape, tokenizer)


def _in_one_pass(config: TrainConfig, shape: Any, tokenizer: Tokenizer) -> Any:
    """`shape` with what the configuration says of drafting a block in one pass.

    Raises UserError where it cannot be trained to, or would forget how.
    """
    section, before = config.drafter.parallel, parallel_of(shape)
    if section is None:
        if before is not None:
            raise UserError(
                f"drafter.init_from {config.drafter.init_from}: drafts {before.tokens} tokens in one pass; go on so, "
                f"drafter.parallel.tokens={before.tokens}"
            )
        return shape
    if "sliding_attention" in (getattr(shape, "layer_types", None) or ()) or getattr(shape, "sliding_window", None):
        raise UserError(f"drafter.parallel: {shape.model_type} attends in a sliding window; warm-start from another")
    if config.drafter.attention not in ("auto", "sdpa"):
        raise UserError(f"drafter.attention {config.drafter.attention}: takes no mask of chains; leave it auto")
    wanted = section.mask_id if before is None or section.mask_id is not None else before.mask_id
    Parallel(section.tokens, find_mask_id(tokenizer, shape.vocab_size, wanted)).configure(shape)
    return shape


def _check_projected(config: TrainConfig, shape: Any) -> None:
    """Raise UserError where a projected drafter would have more dimensions than its target."""
    if not config.drafter.projected or config.target is None:
        return
    wide = read_target_config(config.target).hidden_size
    if shape.hidden_size > wide:
        raise UserError(
            f"drafter.projected: the drafter is {shape.hidden_size} wide and its target {wide}, of which it would be a "
            "projection; choose a smaller drafter.hidden_size"
        )


def _warm(config: TrainConfig, tokenizer: Tokenizer) -> Any:
    """That of a drafter which is there, with the positions that this run gives it."""
    shape = warm_config(config.drafter, read_target_config(config.target) if config.target else None)
    return _in_one_pass(config, shape, tokenizer)


def _name(config: TrainConfig) -> str:
    return "distill" if isinstance(config, DistillConfig) else "pretrain"


def _vocab_size(config: TrainConfig, tokenizer: Tokenizer) -> int:
    """The target's, which may be padded beyond the tokenizer's; without a target the tokenizer's."""
    if config.target is None:
        return tokenizer.vocab_size
    return int(read_target_config(config.target).vocab_size)


def check_corpus(path: Path, tokenizer: Tokenizer, config: TrainConfig) -> None:
    """Raise UserError where a corpus was made with another tokenizer, DataError where there is none."""
    if ShardedTokens(path).encoding.tokenizer != tokenizer.sha256:
        raise UserError(f"{path}: not made with the tokenizer {config.tokenizer}; prepare it again")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}; choose another run.dir") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: cannot be written; choose another run.dir")


def _introduce(training: Training, resumed: bool) -> None:
    config, runtime = training.config, training.runtime
    model = training.module.model
    print(
        f"{_name(config)}: drafter of {num_parameters(model) / 1e6:.2f}M parameters, "
        f"objective {', '.join(f'{weight:g} {loss}' for loss, weight in config.objective.items())}, "
        f"{runtime.world_size} rank{'s' if runtime.world_size > 1 else ''} on {runtime.device.type}, "
        f"{config.train.deepspeed}, {config.train.precision}, "
        f"loss {'compiled' if training.objective.compile else 'eager'}"
        f"{', blocks compiled' if training.module.compiled else ''}; "
        + (f"resuming at step {training.step}" if resumed else f"{config.train.steps} steps")
        + f" of {config.train.global_batch} x {config.data.sequence_length} tokens",
        flush=True,
    )


def _conclude(training: Training, finished: bool) -> None:
    config = training.config
    figures = read_metrics(config.run.dir)
    last = figures[-1] if figures else {}
    shown = "".join(
        f", {label} {last[tag]:.4f}"
        for label, tag in (("loss", "train/loss"), ("acceptance", "train/acceptance"))
        if tag in last
    )
    epochs = ", ".join(
        f"{count:.2f} epochs of {source.path.name}"
        for count, source in zip(training.loader.epochs(), config.data.sources, strict=True)
    )
    how = "finished" if finished else "stopped on request, the same command goes on"
    print(
        f"{_name(config)}: {how} at step {training.step}{shown}; "
        f"{training.tokens:,} tokens, {epochs}; {config.run.dir}",
        flush=True,
    )
