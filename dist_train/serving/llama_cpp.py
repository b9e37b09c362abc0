"""llama.cpp's server: how it is started, how it is asked, and what it says of its drafts.

The names are those of llama.cpp's tools/server/README.md. What it counts differs from vLLM's counters at the end of a
text alone: it drafts no further than `n_predict` allows, where vLLM drafts gamma tokens whatever is left, and the last
token, if it is alone, comes without a draft, so that it is in no count.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from dist_train.errors import UserError
from dist_train.serving.http import Client
from dist_train.serving.launch import ServerCommand

SERVER = "llama-server"


class Completion(NamedTuple):
    """One answer: the ids of its tokens, with the end-of-sequence id if one was drawn.

    `drafted` and `accepted` are draft tokens, 0 without a drafter; `seconds` is from the first token to the last.
    """

    tokens: list[int]
    drafted: int
    accepted: int
    seconds: float

    def blocks(self, gamma: int, end_ids: Collection[int]) -> tuple[int, int]:
        """Tokens after the first one, which comes from the prefill, and the target's calls that gave them.

        A call gives its accepted drafts and a token of the target's own, save where the text ends with the last draft
        of a block: then that token comes to nothing, which shows in one block more having been drafted.
        """
        given = len(self.tokens) - 1
        calls = given - self.accepted
        if self.tokens[-1] in end_ids and self.drafted > gamma * calls:
            calls += 1
        return given, calls


def find_program(llama_cpp: Path, program: str) -> Path:
    """A program built in llama.cpp's source folder, in its own build/bin. Raises UserError where there is none."""
    found = llama_cpp / "build" / "bin" / program
    if not found.is_file():
        raise UserError(f"{found}: not there; build it: cmake --build {llama_cpp / 'build'} --target {program}")
    return found


def llama_cpp_command(
    program: Path,
    target: Path,
    *,
    drafter: Path | None = None,
    gamma: int = 0,
    slots: int = 1,
    positions: int = 2048,
    threads: int | None = None,
    more: Sequence[str] = (),
) -> ServerCommand:
    """`program`, a llama-server, with `target`, a GGUF file; for gamma above 0 `drafter` drafts so many tokens a block.

    `slots` requests are answered at a time, each in `positions` of its own. The drafter drafts its likeliest token and
    stops for no low confidence (`--spec-draft-p-min 0`). `more`: further options, which have the last word.
    """
    words = [str(program), "-m", str(target), "-np", str(slots), "-c", str(slots * positions)]
    words += ["--no-kv-unified", "--no-ui", "--metrics"]
    if threads is not None:
        words += ["-t", str(threads)]
    if drafter is not None and gamma:
        words += ["-md", str(drafter), "--spec-type", "draft-simple"]
        words += ["--spec-draft-n-max", str(gamma), "--spec-draft-n-min", "0", "--spec-draft-p-min", "0"]
    return ServerCommand("llama.cpp", (*words, *more))


def complete(
    client: Client,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Completion:
    """Answer one prompt, given as ids, with the target's own distribution. Raises UserError where that fails.

    llama.cpp's own order puts top-p before the temperature, and top-k, min-p and others beside them; here, as in vLLM
    and transformers, the temperature comes first and nothing else is on.
    """
    request = {
        "prompt": list(prompt_ids),
        "n_predict": max_new_tokens,
        "samplers": ["temperature", "top_p"],
        "temperature": temperature,
        "top_p": top_p if temperature > 0 else 1.0,
        "seed": seed,
        "cache_prompt": False,  # a prompt read in other batches may round otherwise
        "return_tokens": True,
    }
    answer = client.ask_for_object("POST", "/completion", request)
    try:
        return _read(answer)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{client.url}/completion: not llama.cpp's answer ({error!r}); is it a llama-server?"
        ) from error


def _read(answer: dict[str, object]) -> Completion:
    tokens, timings = answer["tokens"], answer["timings"]
    if not isinstance(tokens, list) or any(type(i) is not int for i in tokens) or not isinstance(timings, dict):
        raise TypeError("tokens are no ids, or timings no object")
    drafted, accepted = int(timings.get("draft_n", 0)), int(timings.get("draft_n_accepted", 0))
    return Completion(tokens, drafted, accepted, float(timings["predicted_ms"]) / 1000)
