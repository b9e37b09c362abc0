"""Configuration of `dist-train pretrain` and `dist-train distill`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from dist_train.config.base import Attention, Precision, Section, TargetSection, suggest

LOSS_NAMES = ("kld", "rkl", "jsd", "tvd", "tvdpp", "lk", "ce")


class RunSection(Section):
    """Where a run lives and how it begins."""

    dir: Path
    """run folder: checkpoints, TensorBoard, logs, resolved configuration"""
    seed: int = 0
    """of initial weights and of the order of samples"""
    resume: Literal["auto", "must"] = "auto"
    """auto: go on from the newest checkpoint if there is one; must: an error if there is none (--resume)"""
    hang_timeout: float = Field(default=900.0, gt=0)
    """seconds without a finished step after which a rank tells where it stands and ends"""
    check_memory: bool = True
    """do not start when the estimate is above what is free"""


class RopeScalingSection(Section):
    """How RoPE is stretched, as config.json names it; these types are read alike by vLLM, SGLang and llama.cpp."""

    rope_type: Literal["none", "linear", "yarn", "llama3"]
    """none: not at all, whatever the target does"""
    factor: float | None = Field(default=None, ge=1)
    original_max_position_embeddings: PositiveInt | None = None
    """yarn and llama3: positions before it is stretched"""
    low_freq_factor: float | None = Field(default=None, gt=0)
    """llama3, as the next"""
    high_freq_factor: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _what_its_type_takes(self) -> RopeScalingSection:
        wanted = {"none": 0, "linear": 1, "yarn": 2, "llama3": 4}[self.rope_type]
        names = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        for place, name in enumerate(names):
            if (getattr(self, name) is None) == (place < wanted):
                raise ValueError(f"rope_type {self.rope_type} takes {', '.join(names[:wanted]) or 'no numbers'}")
        return self


class ParallelSection(Section):
    """Drafting all tokens of a block in one pass, by mask tokens (PARD, arXiv 2504.18583)."""

    tokens: int = Field(ge=2)
    """most tokens that a pass drafts: the next one and so many less one behind it"""
    mask_id: NonNegativeInt | None = None
    """an id of the target's vocabulary that no text has; null: one that the tokenizer keeps in reserve"""
    keep: float = Field(default=0.7, gt=0, le=1)
    """share of the masks at each place of a block that the next place has, too: later tokens count for less, and cost
    less; 1: all of them"""

    @property
    def positions(self) -> float:
        """That the drafter goes through for each of a sequence, on average, and where everything is trained."""
        return sum(self.keep**offset for offset in range(self.tokens))


class DrafterSection(Section):
    """Shape of the drafter, or where its weights come from."""

    init_from: Path | None = None
    """warm start: a Hugging Face folder, a run folder or one checkpoint; its sizes are kept"""
    architecture: Literal["llama2-115m"] = "llama2-115m"
    """named sizes; llama2-115m: 1024 wide, 4 layers, 8 heads, MLP 2816, untied head, 4096 positions"""
    hidden_size: PositiveInt | None = None
    """this and the sizes below: null takes the architecture's"""
    layers: PositiveInt | None = None
    heads: PositiveInt | None = None
    kv_heads: PositiveInt | None = None
    """fewer than heads: grouped-query attention"""
    mlp_size: PositiveInt | None = None
    tie_embeddings: bool | None = None
    max_positions: PositiveInt | None = None
    """longest sequence it will serve; null: the target's, no fewer than a warm start has; without a target the
    architecture's. A server whose sequences may be longer stops drafting, or ends"""
    rope_theta: float | None = Field(default=None, gt=1)
    """base of RoPE; null: that of the warm start, or else the target's, or 10000"""
    rope_scaling: RopeScalingSection | None = None
    """null: as rope_theta, but for types of a target's that are not of these, such as longrope, which are left out"""
    attention: Attention = "auto"
    """as target.attention"""
    projected: bool = False
    """embedding and head begin as the target's, projected on hidden_size dimensions; false: at random"""
    parallel: ParallelSection | None = None
    """null: one token a pass"""


class SourceSection(Section):
    """One prepared corpus of the mixture."""

    path: Path
    """folder made by dist-train prepare"""
    weight: float | None = Field(default=None, gt=0)
    """share of the samples, relative to the other sources; null: 9 for conversations, 1 for text"""
    epochs: float | None = Field(default=None, gt=0)
    """instead of weight, for all sources or none: the share that goes through this one so often as the others theirs"""


class DataSection(Section):
    """What the drafter learns from."""

    sources: list[SourceSection] = Field(min_length=1)
    """prepared corpora and their weights"""
    sequence_length: PositiveInt = 2048
    """tokens per sequence"""
    separate_documents: bool = False
    """documents of plain text in one sequence do not attend to each other (those of conversations never do)"""

    @model_validator(mode="after")
    def _epochs_for_all_or_none(self) -> DataSection:
        if len({source.epochs is None for source in self.sources}) > 1:
            raise ValueError("give every source epochs, or none")
        return self


class LossSection(Section):
    """Options of the losses named in `objective`."""

    tvdpp_normalize: Literal["batch", "position"] = "position"
    """where TVD++ takes mean and deviation of its rewards"""
    tvdpp_clamp: float = Field(default=1e-6, gt=0)
    """least deviation; a guard against 0/0 only, a large one undoes the weighting"""
    jsd_beta: float = Field(default=0.5, gt=0, lt=1)
    """weight of the target in the generalised Jensen-Shannon mixture"""
    lk_decay: float | None = Field(default=None, gt=0)
    """null: -log(acceptance); a number: the hybrid w KL + (1-w)(1-acceptance), w = exp(-decay * acceptance)"""
    z_loss: float = Field(default=0.0, ge=0)
    """weight of logsumexp(logits)^2 of the drafter, added to the objective; 0: none"""
    drafter_temperature: float = Field(default=1.0, gt=0)
    target_temperature: float = Field(default=1.0, gt=0)
    chunk_size: PositiveInt | None = None
    """rows of logits alive at once; null: chosen from the vocabulary"""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile the loss; auto: where the run is long enough to pay for it, and eager where nothing compiles"""


class TrainSection(Section):
    """The optimizer and its batches."""

    steps: PositiveInt
    """optimizer steps of the whole run"""
    global_batch: PositiveInt = 256
    """sequences per optimizer step, over all ranks"""
    micro_batch: PositiveInt = 8
    """sequences per forward pass on one rank"""
    learning_rate: float = Field(default=3e-4, gt=0)
    """at its peak"""
    final_learning_rate: float = Field(default=0.1, ge=0, le=1)
    """at the end, as a share of the peak"""
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """after the warm-up; wsd: constant, then linear over the last fifth"""
    weight_decay: float = Field(default=0.1, ge=0)
    """of matrices; norms are not decayed"""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    gradient_clip: float = Field(default=1.0, ge=0)
    """largest gradient norm; 0: no clipping"""
    precision: Precision = "auto"
    """auto: bf16 where the device multiplies it, else fp32"""
    deepspeed: str = "zero1"
    """name in ds_configs or path of a DeepSpeed JSON"""
    gradient_checkpointing: bool = False
    compile: Literal["auto"] | bool = "auto"
    """torch.compile the drafter's blocks; auto: on a GPU, where the run is long enough for it, short of ZeRO-3"""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """keep an average of the weights, w += (1 - decay) (new - w) each step; in checkpoints beside them, as ema"""
    max_skipped: PositiveInt = 10
    """steps left out in a row, for a loss or gradient that is not finite or a spike (skip_spikes), that end the run"""
    skip_spikes: bool = False
    """leave steps out whose loss is 6 deviations above the last 128 (they are counted and told anyway)"""


class RegressionSection(Section):
    """What a projected drafter learns first: its target's hidden states, projected, without any logits."""

    share: float = Field(default=0.0, ge=0, lt=1)
    """of the steps; the objective follows. 0: none; above it needs drafter.projected"""


class OnPolicySection(Section):
    """Responses that the drafter itself writes, scored by the target (Agarwal et al., 2024, on-policy distillation)."""

    share: float = Field(default=0.0, ge=0, le=1)
    """of the sequences whose responses the drafter writes anew; 0: none"""
    every: PositiveInt = 1
    """steps between such steps"""
    temperature: float = Field(default=1.0, gt=0)


class HeldOutSection(Section):
    """Figures on a corpus that is not trained on."""

    path: Path
    """prepared corpus"""
    every: PositiveInt = 500
    """steps between looks"""
    sequences: PositiveInt = 64
    """the same ones each time"""
    gammas: list[PositiveInt] = Field(default=[3, 5], min_length=1)
    """drafted tokens per block, for the simulated block efficiency"""


class CheckpointSection(Section):
    """When to save and what to keep."""

    every: PositiveInt = 500
    """steps between checkpoints; the last step is always saved"""
    keep: PositiveInt = 2
    """newest checkpoints kept"""
    keep_every: PositiveInt | None = None
    """steps whose multiples are kept for good"""
    asynchronous: bool = True
    """write while training goes on; false: wait until it is written"""


class LogSection(Section):
    """What is reported while training."""

    every: PositiveInt = 10
    """steps between lines in the ranks' log files"""
    tensorboard: bool = True
    profile: PositiveInt | None = None
    """trace so many steps, after three, with torch's profiler: RUN/profile, to be opened in Perfetto or TensorBoard"""


class TrainConfig(Section):
    """What pretraining and distillation share."""

    run: RunSection
    tokenizer: str
    """the tokenizer of the corpora and of the target; checked against both"""
    drafter: DrafterSection = DrafterSection()
    target: TargetSection | None = None
    data: DataSection
    objective: dict[str, float]
    """loss name to weight, for example {ce: 0.5, kld: 0.5}; all but ce need the target"""
    loss: LossSection = LossSection()
    train: TrainSection
    regression: RegressionSection = RegressionSection()
    on_policy: OnPolicySection = OnPolicySection()
    held_out: HeldOutSection | None = None
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _windows_fit(self) -> TrainConfig:
        longest = max(self.held_out.gammas) if self.held_out else 0
        parallel = self.drafter.parallel
        if parallel is not None and longest > parallel.tokens:
            raise ValueError(f"held_out.gammas: {longest} is more than drafter.parallel.tokens {parallel.tokens}")
        if longest >= self.data.sequence_length:
            raise ValueError(
                f"held_out.gammas: {longest} is no window of data.sequence_length {self.data.sequence_length}"
            )
        return self

    @model_validator(mode="after")
    def _projected_from_something(self) -> TrainConfig:
        if self.drafter.projected and self.drafter.init_from is not None:
            raise ValueError("drafter.projected: a drafter that drafter.init_from names has its own head; keep one")
        if self.drafter.projected and (self.target is None or set(self.objective) == {"ce"}):
            raise ValueError("drafter.projected needs target.path, and a loss besides ce")
        if self.regression.share and not self.drafter.projected:
            raise ValueError("regression.share needs drafter.projected=true, whose head the projected states belong to")
        return self

    @field_validator("objective")
    @classmethod
    def _known_losses(cls, objective: dict[str, float]) -> dict[str, float]:
        for name, weight in objective.items():
            if name not in LOSS_NAMES:
                raise ValueError(f"no loss {name!r}{suggest(name, LOSS_NAMES)}")
            if not 0 < weight < math.inf:
                raise ValueError(f"the weight of {name} is {weight}, it must be a number above 0")
        if not objective:
            raise ValueError("no loss is named")
        return objective


class PretrainConfig(TrainConfig):
    """dist-train pretrain: next-token prediction on a text corpus, with the target in the loop if one is named."""

    objective: dict[str, float] = Field(default={"ce": 1.0})
    """loss name to weight, for example {ce: 0.5, kld: 0.5}; all but ce need the target"""


class DistillConfig(TrainConfig):
    """dist-train distill: fine-tune a drafter on the target's answers against the target's distributions."""

    target: TargetSection
    objective: dict[str, float] = Field(default={"tvdpp": 1.0})
    """loss name to weight, for example {tvdpp: 1.0} or {ce: 0.1, tvd: 0.9}"""
