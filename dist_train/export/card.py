"""The model card: what the drafter is for, how it was trained, what was measured, and how to serve it."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any

import yaml

from data_shards import DataError
from dist_train.errors import UserError, without_passwords
from dist_train.export.provenance import is_hub_id, public_name
from dist_train.models.chains import Parallel
from dist_train.models.drafter import find_model
from dist_train.models.gguf import gguf_name
from dist_train.reports.results import read_tables
from dist_train.reports.tables import escaped, only, results_markdown
from dist_train.runtime.version import __version__


@dataclass(frozen=True)
class Facts:
    """What the card tells."""

    name: str
    target: str | None
    parameters: int
    dtype: str
    positions: int
    longest: int | None
    """positions of the target, if it is known"""
    chats: bool
    """there is a chat template"""
    gamma: int | None
    """drafted tokens a block, as `best_gamma` has it"""
    provenance: list[dict[str, Any]]
    results: str | None
    """Markdown tables"""
    assisted: tuple[int, int] | None
    """prompts and tokens on which transformers' assisted generation gave the target's own greedy output"""
    gguf: str | None
    """type of the weights in drafter.gguf, if there is one"""
    parallel: Parallel | None = None
    """how it drafts a block in one pass, if it does"""


def model_card(facts: Facts) -> str:
    """README.md of the exported folder: YAML front matter and Markdown."""
    text = "\n".join(
        [
            f"---\n{yaml.safe_dump(_front_matter(facts), sort_keys=False)}---\n",
            f"# {escaped(facts.name)}\n",
            _introduction(facts),
            _training(facts),
            f"## Measured\n\n{facts.results or 'Nothing: `dist-train evaluate` was not run on it, or not named.'}\n",
            _serving(facts),
        ]
    )
    return without_passwords(text)


def measured(folder: Path, drafter: Path) -> str:
    """The tables of `dist-train evaluate` for this drafter and the one that it was compared with, as Markdown.

    Raises UserError when the results are of other drafters, DataError when there are none.
    """
    results, name = _results_of(folder, drafter)
    shown = {None, name, results["base"]}
    rows = {key: [row for row in results.get(key, []) if row["drafter"] in shown] for key in ("rows", "token_rate")}
    comparisons = [row for row in results["comparisons"] if {row["of"], row["over"]} <= shown]
    prediction = results.get("prediction") and only(results["prediction"], shown)
    tables = results_markdown({**results, **rows, "comparisons": comparisons, "prediction": prediction})
    settings = [
        f"{row['task']}: top-p {row['top_p']:g}, at most {row['max_new_tokens']} new tokens" for row in rows["rows"]
    ]
    target = escaped(public_name(results["target"]["path"]))
    return (
        f"By dist-train evaluate, target {target}; this drafter is *{escaped(name)}*; "
        f"{escaped('; '.join(dict.fromkeys(settings)))}; 95 % bootstrap intervals. "
        "Block efficiency: tokens per call of the target, at most gamma + 1. MBSU: memory-bound speed-up.\n\n"
        f"{tables}"
    )


def best_gamma(folder: Path, drafter: Path) -> int | None:
    """Drafted tokens a block at which one request at a time is predicted to be fastest, under most conditions.

    0: no number of them pays. None: `dist-train evaluate` predicted nothing. Raises as `measured`.
    """
    results, name = _results_of(folder, drafter)
    predicted = (results.get("prediction") or {}).get("speed_ups", [])
    best = [row["best_gamma"] for row in predicted if row["drafter"] == name and row["batch_size"] == 1]
    return mode(best) if best else None


def _results_of(folder: Path, drafter: Path) -> tuple[dict[str, Any], str]:
    """What `folder` holds, and what it calls this drafter."""
    results = read_tables(folder)
    wanted = find_model(drafter).resolve()
    named = {name: Path(entry["path"]) for name, entry in results["drafters"].items()}
    name = next((name for name, path in named.items() if _is(path, wanted)), None)
    if name is None:
        tried = ", ".join(f"{name} ({path})" for name, path in named.items())
        raise UserError(f"{folder}: results of {tried}, none of which is {drafter}; evaluate this one")
    return results, name


def _is(path: Path, wanted: Path) -> bool:
    try:
        return find_model(path).resolve() == wanted
    except (UserError, DataError):
        return False


def _front_matter(facts: Facts) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if facts.target and is_hub_id(facts.target):
        front["base_model"] = facts.target
    return {**front, "tags": ["speculative-decoding", "draft-model", "llama", "dist-train"]}


def _introduction(facts: Facts) -> str:
    target = f"**{escaped(public_name(facts.target))}**" if facts.target else "a chat model with the same tokenizer"
    return (
        f"A draft model for speculative decoding with {target}: it guesses the next tokens, the target checks them in "
        f"one pass, and the output stays the target's. Of no use on its own.\n\n"
        f"- {facts.parameters:,} parameters, `LlamaForCausalLM`, {facts.dtype}, {facts.positions:,} positions\n"
        f"{_one_pass(facts.parallel)}"
        f"- tokenizer, special ids and chat template are the target's\n"
        f"- exported by dist-train {__version__}\n"
    )


def _one_pass(parallel: Parallel | None) -> str:
    if parallel is None:
        return ""
    return (
        f"- drafts up to {parallel.tokens} tokens in one pass (PARD, arXiv 2504.18583), behind the text mask tokens of "
        f"id {parallel.mask_id}, where a server can; elsewhere it drafts one token a pass\n"
    )


def _training(facts: Facts) -> str:
    if not facts.provenance:
        return "## Training\n\nUnknown: it was not exported from a dist-train run.\n"
    lines = ["## Training\n"]
    for number, run in enumerate(facts.provenance, start=1):
        objective = " + ".join(f"{weight:g} {loss}" for loss, weight in run["objective"].items())
        data = ", ".join(_source(source) for source in run["data"])
        line = (
            f"{number}. objective {objective}; {run['steps']:,} steps of {run['global_batch']} x "
            f"{run['sequence_length']:,} tokens ({run['tokens']:,} tokens in all), learning rate "
            f"{run['learning_rate']:g}, {run['precision']}, {run['ranks']} rank{'s' if run['ranks'] > 1 else ''}; "
            f"data: {data}"
        )
        if target := run.get("target"):
            revision = f", revision {target['revision']}" if target.get("revision") else ""
            hashes = f"configuration {target['config'][:12]}, head {target['head'][:12]}"
            line += f"; target {escaped(target['path'])}{escaped(revision)} ({hashes})"
        lines.append(line)
    return "\n".join(lines) + "\n\nMethod: Goel et al. (2024), [arXiv 2403.00858](https://arxiv.org/abs/2403.00858).\n"


def _source(source: dict[str, Any]) -> str:
    share = next((f" ({key} {source[key]:g})" for key in ("weight", "epochs") if key in source), "")
    return f"{escaped(source['name'])}{share}"


_GAMMA = 3


def _serving(facts: Facts) -> str:
    """The commands, as dist-train's tests run them against real servers (tests/serving/test_card.py)."""
    gamma = _GAMMA if facts.gamma is None else max(1, facts.gamma)
    if facts.parallel is not None:
        gamma = min(gamma, facts.parallel.tokens)
    chosen = "the best for one request at a time, as `dist-train evaluate` predicts for the machine that it ran on"
    if facts.gamma is None:
        chosen = "a guess, `dist-train evaluate` predicts the best"
    elif facts.gamma == 0:
        chosen = "`dist-train evaluate` predicts that drafting does not pay on the machine that it ran on"
    short = facts.longest is not None and facts.positions < facts.longest
    limit = (
        f" The drafter has {facts.positions:,} positions, the target {facts.longest:,}: beyond its own a server stops "
        "drafting, for all requests, or ends, so the commands keep servers to them."
        if short
        else ""
    )
    sections = [_transformers(facts, gamma), _llama_cpp(facts, gamma, short), _vllm(facts, gamma, short)]
    sections += [_sglang(facts, gamma, short), *_tensorrt_llm(facts, gamma)]
    return "\n".join([f"## Serving\n\n{gamma} drafted tokens a block: {chosen}.{limit}\n", *sections])


def _transformers(facts: Facts, gamma: int) -> str:
    proven = "Not run at this export."
    if facts.assisted:
        prompts, tokens = facts.assisted
        proven = f"Proven at this export: the target's own greedy output on {prompts} prompts ({tokens:,} tokens)."
    target, question = _named_target(facts), '"What is a draft model?"'
    inputs = f'tokenizer({question}, return_tensors="pt")'
    if facts.chats:
        chat = f'[{{"role": "user", "content": {question}}}]'
        how = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        inputs = f"tokenizer.apply_chat_template(\n    {chat}, {how}\n)"
    return f"""transformers, assisted generation. {proven}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

target = AutoModelForCausalLM.from_pretrained({target!r}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({target!r})
drafter = AutoModelForCausalLM.from_pretrained({facts.name!r}, dtype="auto")
# Otherwise transformers drafts another number of tokens each time, and stops at an uncertain one.
drafter.generation_config.num_assistant_tokens = {gamma}
drafter.generation_config.num_assistant_tokens_schedule = "constant"
drafter.generation_config.assistant_confidence_threshold = 0.0
inputs = {inputs}
answer = target.generate(**inputs, assistant_model=drafter, max_new_tokens=64)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```
"""


def _llama_cpp(facts: Facts, gamma: int, short: bool) -> str:
    made = f"`drafter.gguf` here was made by llama.cpp's converter ({facts.gguf})."
    drafter, convert = f"{facts.name}/drafter.gguf", ""
    if facts.gguf is None:
        made, drafter = "Its converter makes the file.", "drafter.gguf"
        convert = f"python llama.cpp/convert_hf_to_gguf.py {_word(facts.name)} --outfile drafter.gguf\n"
    target = gguf_name(facts.target) if facts.target else None
    length = f" -c {facts.positions}" if short else ""
    return f"""llama.cpp. {made} It drafts the likeliest token, also where the target samples. `--spec-draft-p-min 0`
drafts all of a block; a higher one stops where the drafter is less sure.

```bash
{convert}llama-server -m {_word(target or "target.gguf")}{length} --model-draft {_word(drafter)} \\
    --spec-type draft-simple --spec-draft-n-max {gamma} --spec-draft-n-min 0 --spec-draft-p-min 0
```
"""


def _vllm(facts: Facts, gamma: int, short: bool) -> str:
    speculative: dict[str, Any] = {
        "method": "draft_model",
        "model": facts.name,
        "num_speculative_tokens": gamma,
        "draft_sample_method": "probabilistic",
    }
    if facts.parallel is not None:
        speculative["parallel_drafting"] = True
    length = f" --max-model-len {facts.positions}" if short else ""
    return f"""vLLM. Without `draft_sample_method` it takes the likeliest tokens for drafts, and accepts fewer of them
where the target samples.

```bash
vllm serve {_word(_named_target(facts))}{length} --speculative-config {_word(json.dumps(speculative))}
```
"""


def _sglang(facts: Facts, gamma: int, short: bool) -> str:
    length = f" --context-length {facts.positions}" if short else ""
    return f"""SGLang. Unproven: the command is that of its documentation.

```bash
python -m sglang.launch_server --model-path {_word(_named_target(facts))}{length} --speculative-algorithm STANDALONE \\
    --speculative-draft-model-path {_word(facts.name)} --speculative-num-steps {gamma} --speculative-eagle-topk 1 \\
    --speculative-num-draft-tokens {gamma + 1}
```
"""


def _tensorrt_llm(facts: Facts, gamma: int) -> list[str]:
    """PARDDecodingConfig of its LLM API, which a drafter that takes a pass for each token has no use for."""
    if facts.parallel is None:
        return []
    return [
        f"""TensorRT-LLM. Unproven: the names are those of its documentation.

```python
speculative_config = PARDDecodingConfig(
    max_draft_len={gamma}, speculative_model={facts.name!r}, mask_token_id={facts.parallel.mask_id}
)
```
"""
    ]


def _named_target(facts: Facts) -> str:
    """What loads the target from a folder or a hub; of one that is a GGUF file nobody but llama.cpp knows more."""
    if facts.target is None or gguf_name(facts.target):
        return "TARGET"
    return public_name(facts.target)


def _word(text: str) -> str:
    """One word for a shell, whatever it holds; what cannot be printed would end the block that it stands in."""
    return shlex.quote("".join(character if character.isprintable() else "?" for character in text))
