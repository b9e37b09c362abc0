"""What the target's answers will take."""

from __future__ import annotations

from dist_train.config import GenerateConfig, resolve_precision
from dist_train.generate.asks import conditions
from dist_train.models.load import DTYPES
from dist_train.plan.machine import Assumptions, Machine
from dist_train.plan.report import Plan
from dist_train.plan.shapes import target_size
from dist_train.train.timing import flops_per_token

_GIB = 2**30
_ANSWER_BYTES = 6.0  # a token in Parquet: an id of 4 bytes and a piece of text, prompt included, compressed by half


def plan_generation(
    config: GenerateConfig, machine: Machine, assumed: Assumptions, seeds: int, answer_tokens: float
) -> Plan:
    """Figures of `dist-train generate` for so many seeds, answered with `answer_tokens` tokens on average.

    Every GPU holds the whole target and decodes batches of its own; prompts are left out. Raises UserError when the
    target's configuration is not at hand.
    """
    config = resolve_precision(config, machine.gpu.fast_precision)
    target = target_size(config.target)
    shape, width = target.shape, DTYPES[config.target.precision].itemsize
    each_seed = len(conditions(config))
    answers = seeds * each_seed
    rows = min(config.engine.rows, config.batch_size)
    plan = Plan(
        f"generate on {machine.gpus} x {machine.gpu.name}, {machine.nodes} node{'s' if machine.nodes > 1 else ''}: "
        f"target of {target.parameters / 1e9:.3g}B parameters, {answers:,} answers, {rows} at a time"
    )
    peak = plan.add(
        "assumed",
        "peak",
        machine.gpu.peak_flops[config.target.precision],
        "flop/s",
        f"a GPU, dense {config.target.precision}, by its data sheet",
    )
    plan.add("assumed", "target's share of it", assumed.target_mfu, "share", "--target-mfu")
    plan.add("assumed", "memory bandwidth", machine.gpu.memory_bandwidth, "bytes/s", "a GPU, by its data sheet")
    plan.add("assumed", "share of that", assumed.memory_bandwidth, "share", "while decoding")
    plan.add("assumed", "a layer, at least", assumed.seconds_a_layer, "seconds", "its kernels launched from Python")
    plan.add("assumed", "tokens an answer", answer_tokens, "", "--answer-tokens; half of max_new_tokens if not given")
    how = f"{seeds:,} seeds x {each_seed} conditions (temperature, top-p, sample) x tokens an answer"
    tokens = plan.add("work", "tokens", answers * answer_tokens, "count", how)
    head_width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    keys = 2 * shape.num_hidden_layers * (getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads)
    cached = rows * config.max_new_tokens * keys * head_width * width
    weights = width * target.parameters
    read = (weights + cached / 2) / (machine.gpu.memory_bandwidth * assumed.memory_bandwidth)
    each = flops_per_token(shape, target.matrix_parameters, config.max_new_tokens)
    calculated = rows * each / (peak * assumed.target_mfu)
    launched = shape.num_hidden_layers * assumed.seconds_a_layer
    plan.add("time", "reading, a token each", read, "seconds", "weights and a half-full cache of keys and values")
    plan.add("time", "calculating", calculated, "seconds", f"{rows} tokens x {each / 1e9:.3g} GFLOP")
    plan.add("time", "launching", launched, "seconds", f"{shape.num_hidden_layers} layers")
    step = plan.add("time", "a token each", max(read, calculated, launched), "seconds", "the longest of the three")
    rate = plan.add("time", "tokens/s a GPU", rows / step, "count", "rows kept full, until a unit's last answers")
    wall = plan.add("time", "wall time", tokens / (rate * machine.gpus), "seconds", f"tokens on {machine.gpus} GPUs")
    plan.add("time", "GPU-hours", wall / 3600 * machine.gpus, "GPU-hours", f"wall time x {machine.gpus} GPUs")
    plan.add("memory a GPU", "target weights", weights / _GIB, "GiB", f"{width} bytes a parameter, whole on each GPU")
    plan.add("memory a GPU", "keys and values", cached / _GIB, "GiB", "of a full batch, at its longest")
    needed, free = (weights + cached) / _GIB, machine.gpu.memory / _GIB
    plan.add("memory a GPU", "in all", needed, "GiB", f"of {free:.0f}: {'fits' if needed <= free else 'DOES NOT FIT'}")
    if needed > free:
        plan.notes.append("the target does not fit: generate holds it whole on each GPU; fewer engine.rows at best")
    plan.add("storage", "answers", _ANSWER_BYTES * tokens, "bytes", f"{_ANSWER_BYTES:g} bytes a token, as Parquet")
    size = 2 if shape.vocab_size < 2**16 else 4
    plan.add("storage", "shards made of them", (size + 1) * tokens, "bytes", f"{size} bytes a token, 1 of its mask")
    return plan
