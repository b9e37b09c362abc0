"""What a training will take: time, network, memory and storage."""

from __future__ import annotations

from typing import Any

from dist_train.config import TrainConfig, resolve_precision
from dist_train.errors import UserError
from dist_train.models.load import DTYPES
from dist_train.plan.machine import Assumptions, Machine
from dist_train.plan.report import Plan
from dist_train.plan.shapes import Size, drafter_shape, measure, target_size
from dist_train.train.engine import deepspeed_config
from dist_train.train.memory import checkpoint_bytes, kept_checkpoints, memory_estimate, replicated_note
from dist_train.train.timing import flops_per_token

_GIB = 2**30


def plan_training(config: TrainConfig, machine: Machine, assumed: Assumptions, vocab_size: int, name: str) -> Plan:
    """Figures of `dist-train pretrain` or `distill`; pure arithmetic, no GPU and no data needed.

    Raises UserError when batch or target and ranks do not fit, or the target's configuration is not at hand.
    """
    config = resolve_precision(config, machine.gpu.fast_precision)
    train, length = config.train, config.data.sequence_length
    drafter = measure(drafter_shape(config, vocab_size))
    section = config.target if set(config.objective) != {"ce"} else None
    target = target_size(section) if section is not None else None
    if section is not None and section.sharding == "tp" and machine.gpus % section.tp_size:
        raise UserError(f"target.tp_size {section.tp_size}: {machine.gpus} ranks are not groups of that many")
    tokens = train.steps * train.global_batch * length
    plan = Plan(
        f"{name} on {machine.gpus} x {machine.gpu.name}, {machine.nodes} node{'s' if machine.nodes > 1 else ''}: "
        f"drafter of {drafter.parameters / 1e6:.0f}M parameters"
        + (f", target of {target.parameters / 1e9:.3g}B in the loop" if target else ", no target in the loop")
        + f", {train.steps:,} steps of {train.global_batch} x {length} tokens"
    )
    _assume(plan, config, machine, assumed, has_target=target is not None)
    plan.add("work", "tokens", tokens, "count", f"{train.steps:,} steps x {train.global_batch} sequences x {length}")
    compute = _compute(plan, config, machine, assumed, drafter, target)
    network = _network(plan, config, machine, assumed, drafter, target)
    _time(plan, config, machine, compute, network, tokens)
    _memory(plan, config, machine, drafter.shape, assumed.links)
    _storage(plan, config, assumed, drafter, target, tokens, plan["wall time"])
    if config.on_policy.share:
        plan.notes.append("not counted: the responses that the drafter writes (on_policy)")
    return plan


def _assume(plan: Plan, config: TrainConfig, machine: Machine, assumed: Assumptions, *, has_target: bool) -> None:
    gpu, precision = machine.gpu, config.train.precision
    plan.add("assumed", "peak", gpu.peak_flops[precision], "flop/s", f"a GPU, dense {precision}, by its data sheet")
    plan.add("assumed", "drafter's share of it", assumed.mfu, "share", "forward and backward pass; --mfu")
    if has_target:
        plan.add("assumed", "target's share of it", assumed.target_mfu, "share", "forward pass; --target-mfu")
    how = f"NVLink, {gpu.nvlink / 1e9:.0f} GB/s a direction"
    if machine.nodes > 1:
        how = f"the least of that and {machine.per_node} adapters a node of {gpu.network / 1e9:.0f} GB/s; --network"
    plan.add("assumed", "links", machine.bus_bandwidth(machine.gpus), "bytes/s", f"each rank sends and receives: {how}")
    plan.add("assumed", "share of the links", assumed.links, "share", "reached by collectives; nothing overlaps")


def _compute(
    plan: Plan, config: TrainConfig, machine: Machine, assumed: Assumptions, drafter: Size, target: Size | None
) -> float:
    """Seconds of a step in which the GPUs calculate."""
    train, length = config.train, config.data.sequence_length
    passes = 4 if train.gradient_checkpointing else 3
    each = passes * flops_per_token(drafter.shape, drafter.matrix_parameters, length)
    counted = "forward, backward (2)" + (" and forward again" if passes == 4 else "")
    plan.add("work", "drafter, a token", each, "flop", f"{passes} x ({_forward(drafter, length)}): {counted}")
    a_rank = train.global_batch * length / machine.gpus
    seconds = a_rank * each / (machine.gpu.peak_flops[train.precision] * assumed.mfu)
    plan.add("time", "drafter, a step", seconds, "seconds", f"{a_rank:,.0f} tokens a GPU at its share of the peak")
    if target is None or config.target is None:
        return seconds
    each = flops_per_token(target.shape, target.matrix_parameters, length)
    plan.add("work", "target, a token", each, "flop", f"{_forward(target, length)}: forward")
    spent = a_rank * each / (machine.gpu.peak_flops[config.target.precision] * assumed.target_mfu)
    plan.add("time", "target, a step", spent, "seconds", f"{a_rank:,.0f} tokens a GPU at its share of the peak")
    return seconds + spent


def _forward(size: Size, length: int) -> str:
    shape = size.shape
    return (
        f"2 x {size.matrix_parameters / 1e6:,.1f}M parameters without the embedding + 2 x {shape.num_hidden_layers} "
        f"layers x {length} tokens x width of all heads (causal)"
    )


def _network(
    plan: Plan, config: TrainConfig, machine: Machine, assumed: Assumptions, drafter: Size, target: Size | None
) -> float:
    """Seconds of a step in which the links are busy."""
    train, ranks = config.train, machine.gpus
    deepspeed = deepspeed_config(train, ranks)
    stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
    accumulation = train.global_batch // (train.micro_batch * ranks)
    others = (ranks - 1) / ranks
    width = 2 if train.precision == "bf16" else 4
    sent_width = 4 if deepspeed.get("communication_data_type") == "fp32" and stage else width
    # What a rank sends, in turns of the whole model (Rajbhandari et al. 2020, section 7): of gradients, and of weights.
    gradients, weights, how = {
        0: (2, 0, "all-reduce of the gradients = 2 turns"),
        1: (1, 1, "reduce-scatter of the gradients and all-gather of the weights, a turn each"),
        2: (accumulation, 1, f"reduce-scatter in each of {accumulation} micro-batches, one all-gather of the weights"),
        3: (
            accumulation,
            2 * accumulation,
            f"two all-gathers and a reduce-scatter in each of {accumulation} micro-batches",
        ),
    }[stage]
    each = others * drafter.parameters
    how = f"ZeRO {stage}: {how}; gradients of {sent_width} bytes, weights of {width}"
    amount = each * (gradients * sent_width + weights * width)
    sent = plan.add("network", "drafter, a rank and step", amount, "bytes", how)
    seconds = sent / (machine.bus_bandwidth(ranks) * assumed.links)
    section = config.target
    if target is None or section is None or section.sharding == "replicate":
        return seconds
    width = DTYPES[section.precision].itemsize
    if section.sharding == "zero3":
        moved = accumulation * others * width * (target.parameters - target.head_parameters)
        how = f"zero3: all weights but the head's are gathered in each of {accumulation} micro-batches"
        reach = _target_reach(config, machine)
    else:
        reach, shape = _target_reach(config, machine), target.shape
        together = reach * train.micro_batch * config.data.sequence_length * shape.hidden_size
        turn = 2 * (reach - 1) / reach * width * together
        moved = accumulation * 2 * shape.num_hidden_layers * turn
        how = f"tp: 2 all-reduces a layer of the hidden states of {reach} ranks, {accumulation} micro-batches"
    plan.add("network", "target, a rank and step", moved, "bytes", how)
    return seconds + moved / (machine.bus_bandwidth(reach) * assumed.links)


def _time(plan: Plan, config: TrainConfig, machine: Machine, compute: float, network: float, tokens: int) -> None:
    step = plan.add("time", "step", compute + network, "seconds", "calculating, then waiting for the links")
    wall = plan.add("time", "wall time", step * config.train.steps, "seconds", f"{config.train.steps:,} steps")
    plan.add("time", "GPU-hours", wall / 3600 * machine.gpus, "GPU-hours", f"wall time x {machine.gpus} GPUs")
    plan.add("time", "tokens/s", tokens / wall, "count", "over all GPUs")
    plan.add("network", "share of a step", network / step, "share", "if nothing overlaps: an upper bound")


def _memory(plan: Plan, config: TrainConfig, machine: Machine, shape: Any, links: float) -> None:
    estimate = memory_estimate(config, shape, machine.gpus, on_gpu=True)
    for kind, amount in estimate.items():
        if amount >= 0.005:
            plan.add("memory a GPU", kind, amount, "GiB", "")
    needed = sum(estimate.values())
    free = machine.gpu.memory / _GIB
    plan.add("memory a GPU", "in all", needed, "GiB", f"of {free:.0f}: {'fits' if needed <= free else 'DOES NOT FIT'}")
    if needed > free:
        plan.notes.append("the run does not fit: target.sharding=zero3 or tp, a smaller train.micro_batch or more GPUs")
    elif note := replicated_note(config, shape, machine.gpus, free, on_gpu=True):
        spared = plan["target, a rank and step"] / (machine.bus_bandwidth(_target_reach(config, machine)) * links)
        plan.notes.append(f"{note}; the step would take {plan['step'] - spared:.3g} s, not {plan['step']:.3g} s")


def _target_reach(config: TrainConfig, machine: Machine) -> int:
    """Ranks that the target is cut over."""
    assert config.target is not None
    return config.target.tp_size if config.target.sharding == "tp" else machine.gpus


def _storage(
    plan: Plan, config: TrainConfig, assumed: Assumptions, drafter: Size, target: Size | None, tokens: int, wall: float
) -> None:
    width = 2 if drafter.shape.vocab_size < 2**16 else 4
    plan.add("storage", "shards", width * tokens, "bytes", f"{width} bytes a token, if none is read twice")
    text = assumed.text_bytes_a_token
    plan.add("storage", "text they are made of", text * tokens, "bytes", f"{text:g} bytes a token, not compressed")
    one = checkpoint_bytes(config, drafter.parameters)
    copies = 4 if config.train.ema_decay else 3
    plan.add(
        "storage", "a checkpoint", one, "bytes", f"{copies} fp32 numbers a parameter: weights, moments, EMA if any"
    )
    how = f"the newest {config.checkpoint.keep} and one on its way"
    if every := config.checkpoint.keep_every:
        how += f", and one each {every} steps"
    plan.add("storage", "checkpoints kept", kept_checkpoints(config) * one, "bytes", how)
    if target is not None and config.target is not None:
        size = DTYPES[config.target.precision].itemsize * target.parameters
        plan.add("storage", "target's weights", size, "bytes", "read once a node at the start")
    plan.add("storage", "read while training", width * tokens / wall, "bytes/s", "shards, over all nodes")
