"""The model card: what the drafter is for, how it was trained, what was measured, and how to serve it."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_shards import DataError
from dist_train.errors import UserError, without_passwords
from dist_train.export.provenance import is_hub_id, public_name
from dist_train.models.drafter import find_model
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
    provenance: list[dict[str, Any]]
    results: str | None
    """Markdown tables"""
    assisted: tuple[int, int] | None
    """prompts and tokens on which transformers' assisted generation gave the target's own greedy output"""
    gguf: bool


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
    results = read_tables(folder)
    wanted = find_model(drafter).resolve()
    named = {name: Path(entry["path"]) for name, entry in results["drafters"].items()}
    name = next((name for name, path in named.items() if _is(path, wanted)), None)
    if name is None:
        tried = ", ".join(f"{name} ({path})" for name, path in named.items())
        raise UserError(f"{folder}: results of {tried}, none of which is {drafter}; evaluate this one")
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
        f"- tokenizer, special ids and chat template are the target's\n"
        f"- exported by dist-train {__version__}\n"
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


def _serving(facts: Facts) -> str:
    target = _word(public_name(facts.target) if facts.target else "TARGET")
    speculative = {"model": facts.name, "method": "draft_model", "num_speculative_tokens": 5}
    proven = "Not run at this export."
    if facts.assisted:
        prompts, tokens = facts.assisted
        proven = (
            f"Proven at this export, in fp64: the target's own greedy output on {prompts} prompts ({tokens:,} tokens)."
        )
    made, convert = "`drafter.gguf` here was made by llama.cpp's converter.", ""
    if not facts.gguf:
        made, convert = "", f"python convert_hf_to_gguf.py {_word(facts.name)} --outfile drafter.gguf\n"
    return f"""## Serving

transformers, assisted generation. {proven}

```python
target.generate(**inputs, assistant_model=AutoModelForCausalLM.from_pretrained({facts.name!r}))
```

llama.cpp. {made}{" " * bool(made)}Unproven for this drafter; dist-train's tests draft in it on a CPU, with tiny models.

```bash
{convert}llama-server -m target.gguf --model-draft drafter.gguf --spec-type draft-simple --spec-draft-n-max 5
```

vLLM. Unproven: the commands are those of its documentation.

```bash
vllm serve {target} --speculative-config {_word(json.dumps(speculative))}
```

SGLang. Unproven, likewise.

```bash
python -m sglang.launch_server --model-path {target} --speculative-algorithm STANDALONE \\
    --speculative-draft-model-path {_word(facts.name)} --speculative-num-steps 4 --speculative-eagle-topk 1 \\
    --speculative-num-draft-tokens 5
```
"""


def _word(text: str) -> str:
    """One word for a shell, whatever it holds; what cannot be printed would end the block that it stands in."""
    return shlex.quote("".join(character if character.isprintable() else "?" for character in text))
