"""The drafter: a Llama small enough that drafting costs next to nothing, in a form that every server loads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from data_shards.errors import first_line
from data_shards.files import inside
from dist_train.errors import UserError
from dist_train.losses import Head
from dist_train.models.attention import Documents, compile_blocks, use_attention
from dist_train.models.load import SPECIAL, from_pretrained_whole, read_config
from dist_train.models.rope import max_positions, rope_of, rope_parameters
from dist_train.models.weights import refuse_unreadable_weights
from dist_train.runtime.run_folder import CHECKPOINTS, LATEST, MANIFEST, MODEL, committed, verify

if TYPE_CHECKING:
    from transformers import GenerationConfig, LlamaConfig, PreTrainedModel

    from dist_train.config import DrafterSection

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # Goel et al. (2024): 115M parameters, 1.64 % of Llama 2 Chat 7B.
    "llama2-115m": {
        "hidden_size": 1024,
        "layers": 4,
        "heads": 8,
        "mlp_size": 2816,
        "max_positions": 4096,
        "tie_embeddings": False,
    },
}

Result = TypeVar("Result")


def drafter_config(
    section: DrafterSection, vocab_size: int, bos_id: int | None, eos_id: int, target: Any = None
) -> LlamaConfig:
    """The Hugging Face configuration of a drafter made from scratch, with the positions of the `target`'s, if any.

    `vocab_size` is exactly the target's: servers compare it without tolerance. Raises UserError when the sizes do not
    fit together.
    """
    from transformers import LlamaConfig

    given = {
        name: value for name, value in section if name in ARCHITECTURES[section.architecture] and value is not None
    }
    sizes = {**ARCHITECTURES[section.architecture], **given}
    if sizes["hidden_size"] % (2 * sizes["heads"]):
        raise UserError(
            f"drafter.hidden_size {sizes['hidden_size']} does not give {sizes['heads']} heads of even size; "
            "change drafter.heads"
        )
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["mlp_size"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=section.kv_heads or sizes["heads"],
        max_position_embeddings=section.max_positions or max_positions(target) or sizes["max_positions"],
        rope_parameters=rope_parameters(section, rope_of(target)),
        tie_word_embeddings=sizes["tie_embeddings"],
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        architectures=["LlamaForCausalLM"],
    )


def new_drafter(config: LlamaConfig, seed: int) -> PreTrainedModel:
    """A drafter with random weights, in fp32; the same seed gives the same weights on every rank."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def warm_config(section: DrafterSection, target: Any = None) -> Any:
    """The configuration of the drafter at `section.init_from`, with the positions that `section` and target ask for.

    RoPE has no weights: what was learned stays, and means the same unless the section names another RoPE. Raises
    UserError when there is no drafter.
    """
    assert section.init_from is not None
    config = read_drafter_config(section.init_from)
    own = config.max_position_embeddings
    config.max_position_embeddings = section.max_positions or max(own, max_positions(target) or own)
    if section.rope_theta or section.rope_scaling:
        config.rope_parameters = rope_parameters(section, config.rope_parameters)
    return config


def load_drafter(path: Path, dtype: torch.dtype = torch.float32, config: Any = None) -> PreTrainedModel:
    """The drafter in a run folder, a checkpoint or a Hugging Face folder; `config`: in place of its own.

    Raises UserError when there is none, and when weights are missing or a checkpoint's are damaged.
    """
    from safetensors import SafetensorError

    folder = find_model(path)
    if damaged := damaged_weights(folder):
        raise UserError(f"{folder.parent}: is damaged: {'; '.join(damaged)}; restore it or name another checkpoint")
    refuse_unreadable_weights(folder)
    try:
        return from_pretrained_whole(
            folder, dtype=dtype, local_files_only=True, **({"config": config} if config else {})
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # RuntimeError: shapes that do not fit
        raise UserError(f"{folder}: no drafter can be loaded: {first_line(error)}") from error


def read_drafter_config(path: Path) -> Any:
    """The Hugging Face configuration of a drafter that is there. Raises UserError when it cannot be read."""
    return read_config(find_model(path), "drafter", local_files_only=True)


def answers_end(model: PreTrainedModel) -> GenerationConfig:
    """The special ids of a drafter's generation configuration, for a folder of its weights.

    Nothing else of it matters to a drafter, and transformers saves none whose settings contradict each other, though it
    loads them.
    """
    from transformers import GenerationConfig

    ids = {name: getattr(model.generation_config, name) for name in SPECIAL}
    return GenerationConfig(**{name: i for name, i in ids.items() if isinstance(i, list) or (i is not None and i >= 0)})


def damaged_weights(folder: Path) -> list[str]:
    """What is wrong with the weights in the Hugging Face folder of a checkpoint, one line each; elsewhere nothing."""
    return verify(folder.parent, f"{folder.name}/") if (folder.parent / MANIFEST).exists() else []


def find_model(path: Path) -> Path:
    """The Hugging Face folder that a run folder (its newest checkpoint), a checkpoint or such a folder stands for.

    Raises UserError when it is none of them.
    """
    latest = path / CHECKPOINTS / LATEST
    name = latest.read_text(errors="replace").strip() if latest.exists() else ""
    named = inside(path / CHECKPOINTS, name)
    if re.fullmatch(r"step-\d+", name) and named.is_dir():  # of a torn one nothing may be left
        path = named
    elif folders := committed(path / CHECKPOINTS):  # a lost `latest` loses nothing
        path = folders[-1]
    if (path / MODEL / "config.json").exists():
        path = path / MODEL
    if not (path / "config.json").exists():
        raise UserError(f"{path}: no run, checkpoint or Hugging Face model here")
    return path


class FusedHead(nn.Linear):
    """A language model's head that hands its weight to a loss where one is given, and else makes logits.

    The loss runs inside this module's forward, where ZeRO-3's hooks have gathered the weight.
    """

    def forward(self, hidden: Tensor, loss: Callable[[Tensor, Head], Result] | None = None) -> Tensor | Result:
        """Logits [..., V] of `hidden` [..., D], or what `loss(hidden, head)` returns."""
        if loss is None:
            return super().forward(hidden)
        return loss(hidden, Head(self.weight, self.bias))


class TrainableDrafter(nn.Module):
    """A drafter whose forward pass ends in a loss rather than in logits; what the training engine holds."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        use_attention(model, attention, "the drafter")
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear or getattr(model.config, "final_logit_softcapping", None):
            raise UserError(f"{model.config.model_type}: a drafter has a plain linear head; warm-start from another")
        head.__class__ = FusedHead  # the same parameters under the same names, tied ones included
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if compiled:
            compile_blocks(model.get_decoder())
        self.model, self.compiled = model, compiled

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        loss: Callable[[Tensor, Head], Result],
        documents: Documents | None = None,
        seen: Tensor | None = None,
    ) -> Result:
        """What `loss(hidden [B, T, D], head)` returns; positions that begin anew keep documents apart.

        `documents`: where those begin, if the host knows. `seen`, bool [B, 1, T, T]: what each position sees, instead.
        """
        decoder = self.model.get_decoder()
        if seen is None:
            known = (documents or Documents.of_device(positions)).arguments(decoder)
        else:
            known = {"attention_mask": seen}
        states = decoder(input_ids=input_ids, position_ids=positions, use_cache=False, **known)
        return self.model.get_output_embeddings()(states.last_hidden_state, loss)

    def shape(self) -> dict[str, Any]:
        """The configuration of the drafter, without what depends on where it is stored."""
        stored = {"dtype", "torch_dtype", "architectures", "transformers_version", "_name_or_path"}
        shape = {key: value for key, value in self.model.config.to_dict().items() if key not in stored}
        found: dict[str, Any] = json.loads(json.dumps(shape, default=str))
        return found

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode and no gradients for the length of a `with` block.

        Always both: a forward pass in training mode without gradients corrupts ZeRO-3's trace (DeepSpeed issue 4922).
        """
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train()
