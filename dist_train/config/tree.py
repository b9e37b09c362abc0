"""The typed tree of every stage: the docstring under a field is its help text."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, field_validator, model_validator

Precision = Literal["bf16", "fp32"]
LOSS_NAMES = ("kld", "rkl", "jsd", "tvd", "tvdpp", "lk", "ce")


def suggest(word: str, known: Sequence[str], prefix: str = "") -> str:
    """The end of an error line about an unknown word: the nearest known one, or all of them."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    return f"; known are {', '.join(known)}" if known else ""


class Section(BaseModel):
    """Base of every node of the tree: unknown keys are errors, docstrings under fields are their descriptions."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


# -- sections ---------------------------------------------------------------------------------------------------


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


class DrafterSection(Section):
    """Shape of the drafter, or where its weights come from."""

    init_from: Path | None = None
    """warm start: a Hugging Face folder, a run folder or one checkpoint; the sizes below are then not used"""
    architecture: Literal["llama2-115m"] = "llama2-115m"
    """named sizes; llama2-115m: 1024 wide, 4 layers, 8 heads, MLP 2816, untied head, 4096 positions"""
    hidden_size: PositiveInt | None = None
    """this and the following: null takes the architecture's"""
    layers: PositiveInt | None = None
    heads: PositiveInt | None = None
    kv_heads: PositiveInt | None = None
    """fewer than heads: grouped-query attention"""
    mlp_size: PositiveInt | None = None
    max_positions: PositiveInt | None = None
    """longest sequence it will serve"""
    tie_embeddings: bool | None = None


class TargetSection(Section):
    """The chat LLM that the drafter is aligned with."""

    path: str
    """Hugging Face folder or hub id"""
    revision: str | None = None
    precision: Precision = "bf16"
    sharding: Literal["replicate", "zero3", "tp"] = "replicate"
    """replicate: every rank holds it whole; zero3: DeepSpeed partitions it over all ranks; tp: groups of tp_size ranks
    hold it tensor-parallel"""
    tp_size: PositiveInt = 2
    """ranks of a tensor-parallel group; keep it within a node"""
    offload: bool = False
    """zero3: keep the partitions in the host's memory"""
    trust_remote_code: bool = False
    """run model code that comes with the weights"""


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
    precision: Precision = "bf16"
    deepspeed: str = "zero1"
    """name in ds_configs or path of a DeepSpeed JSON"""
    gradient_checkpointing: bool = False
    compile: bool = False
    """torch.compile the drafter's blocks: pays on a GPU after a minute or two of compiling"""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """keep an average of the weights, w += (1 - decay) (new - w) each step; in checkpoints beside them, as ema"""
    max_skipped: PositiveInt = 10
    """steps of non-finite loss or gradient, left out one after the other, that end the run"""
    skip_spikes: bool = False
    """leave steps out whose loss is 6 deviations above the last 128 (they are counted and told anyway)"""


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


class SeedsSection(Section):
    """Instructions that the target answers, or prompts of an evaluation."""

    inputs: str | list[str]
    """files, folders or globs: JSONL (.gz, .zst) or Parquet"""
    prompt_field: str = "prompt"
    """field with the instruction, or with chat messages"""
    limit: PositiveInt | None = None
    """use the first so many"""


class TaskSection(SeedsSection):
    """A set of evaluation prompts."""

    name: str


class TokenRateSection(Section):
    """Wall-clock measurement, apart from the statistics."""

    prompts: NonNegativeInt = 8
    """prompts timed; 0: none"""
    batch_size: PositiveInt = 1
    repeats: PositiveInt = 3
    """the median of so many passes counts"""


class DatasetSection(Section):
    """A dataset as `datasets.load_dataset` names it: its files are read as they are."""

    path: str
    """hub id, or a folder"""
    name: str | None = None
    """configuration, where there are several"""
    split: str = "train"
    revision: str | None = None


class FaultsSection(Section):
    """Records that cannot be used: stop with an error that names file and line, or skip them, counted and named."""

    malformed: Literal["stop", "skip"] = "stop"
    """a line that is not a JSON object"""
    encoding: Literal["stop", "skip"] = "stop"
    """text that is not UTF-8"""
    too_long: Literal["stop", "skip"] = "stop"
    """a line longer than max_bytes"""
    empty: Literal["stop", "skip"] = "skip"
    """no text, or no response"""
    max_bytes: PositiveInt = 50_000_000


# -- stages -----------------------------------------------------------------------------------------------------


class PrepareConfig(Section):
    """dist-train prepare: text or conversations to token shards."""

    inputs: str | list[str] = []
    """files, folders, globs or URLs (hf://datasets/...): JSONL (.gz, .zst), Parquet, text (one document a line)"""
    dataset: DatasetSection | None = None
    """instead of inputs: a dataset of the hub, read as a stream"""
    tokenizer: str = ""
    """sentencepiece .model file, Hugging Face folder or hub id"""
    verify: bool = False
    """--verify: read every byte of the corpus `out` and compare checksums, and the tokenizer if one is named"""
    out: Path
    """folder of the corpus"""
    format: Literal["text", "chat"] = "text"
    """chat: prompt and response pairs, packed, trained on responses only"""
    text_field: str = "text"
    prompt_field: str = "prompt"
    response_field: str = "response"
    """prompt_ids and response_ids, where a record has them (what generate writes), go before the texts"""
    bos: bool = True
    """begin each text document with BOS"""
    eos: bool = True
    """end each text document with EOS"""
    sequence_length: PositiveInt = 2048
    """tokens per sequence into which conversations are packed"""
    shard_bytes: PositiveInt = 64 << 20
    """input bytes per shard; a compressed file is one shard"""
    faults: FaultsSection = FaultsSection()

    @model_validator(mode="after")
    def _something_to_make_it_of(self) -> PrepareConfig:
        if not self.verify and bool(self.inputs) == bool(self.dataset):
            raise ValueError("inputs is required, or dataset, and not both")
        if not self.verify and not self.tokenizer:
            raise ValueError("tokenizer is required")
        return self


class TrainConfig(Section):
    """What pretraining and distillation share."""

    run: RunSection
    tokenizer: str
    """the tokenizer of the corpora; checked against them"""
    drafter: DrafterSection = DrafterSection()
    target: TargetSection | None = None
    data: DataSection
    objective: dict[str, float]
    """loss name to weight, for example {ce: 0.5, kld: 0.5}; all but ce need the target"""
    loss: LossSection = LossSection()
    train: TrainSection
    on_policy: OnPolicySection = OnPolicySection()
    held_out: HeldOutSection | None = None
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    @field_validator("objective")
    @classmethod
    def _known_losses(cls, objective: dict[str, float]) -> dict[str, float]:
        for name, weight in objective.items():
            if name not in LOSS_NAMES:
                raise ValueError(f"no loss {name!r}{suggest(name, LOSS_NAMES)}")
            if weight <= 0:
                raise ValueError(f"the weight of {name} is {weight}, it must be above 0")
        if not objective:
            raise ValueError("no loss is named")
        return objective


class PretrainConfig(TrainConfig):
    """dist-train pretrain: next-token prediction on a text corpus, with the target in the loop if one is named."""

    objective: dict[str, float] = {"ce": 1.0}
    """loss name to weight, for example {ce: 0.5, kld: 0.5}; all but ce need the target"""


class DistillConfig(TrainConfig):
    """dist-train distill: fine-tune a drafter on the target's answers against the target's distributions."""

    target: TargetSection
    objective: dict[str, float] = {"tvdpp": 1.0}
    """loss name to weight, for example {tvdpp: 1.0} or {ce: 0.1, tvd: 0.9}"""


class GenerateConfig(Section):
    """dist-train generate: the target answers seed instructions."""

    target: TargetSection
    tokenizer: str | None = None
    """null: the target's own"""
    seeds: SeedsSection
    out: Path
    """folder of the answers, Parquet"""
    temperatures: list[float] = Field(default=[0.0, 0.3, 0.7, 1.0], min_length=1)
    """each seed is answered once at each"""
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_new_tokens: PositiveInt = 512
    batch_size: PositiveInt = 32
    """answers decoded together; part of what fixes the random numbers"""
    seed: int = 0


class EvaluateConfig(Section):
    """dist-train evaluate: block efficiency, MBSU and token rate of drafters with a target."""

    target: TargetSection
    drafters: dict[str, Path] = Field(min_length=1)
    """name to Hugging Face folder, run folder or checkpoint; the first is the one that the others are compared with"""
    tokenizer: str | None = None
    """null: the target's own"""
    tasks: list[TaskSection] = Field(min_length=1)
    out: Path
    """folder of the results"""
    gammas: list[PositiveInt] = Field(default=[3, 5], min_length=1)
    """tokens drafted per block"""
    temperatures: list[float] = Field(default=[0.0, 0.6], min_length=1)
    top_p: float = Field(default=0.9, gt=0, le=1)
    max_new_tokens: PositiveInt = 128
    batch_size: PositiveInt = 32
    token_rate: TokenRateSection = TokenRateSection()
    seed: int = 0


class ExportConfig(Section):
    """dist-train export: a drafter as a Hugging Face folder that servers load."""

    drafter: Path
    """run folder, checkpoint or Hugging Face folder"""
    tokenizer: str
    out: Path
    target: TargetSection | None = None
    """checked: same vocabulary; and assisted generation gives the target's own greedy output"""
    prompts: SeedsSection | None = None
    """on these prompts"""
    max_new_tokens: PositiveInt = 64
