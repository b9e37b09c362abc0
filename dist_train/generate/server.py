"""Answers from a server that speaks OpenAI's protocol: vLLM, SGLang, `transformers serve`, llama.cpp, others.

Servers differ in what they take and tell. The best that one takes is found before the first answer: the prompt's token
ids, so that it sees exactly what was templated here, and the ids of the answer back, so that training sees exactly what
was sampled; or else the conversation, which the server templates, and a text, which is encoded again and counted so.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from dist_train.errors import UserError
from dist_train.generate.asks import Answer, Ask, Sampling
from dist_train.serving.http import Client, RefusedError
from dist_train.serving.vllm import UNBENT
from dist_train.tokenizer import Tokenizer

_OTHER_TOKENIZER_SHARE = 0.5  # of answers whose text is not what their ids spell, above which it is another tokenizer
_FEWEST_COMPARED = 8
_LONGER_AGAIN = 4  # a sampled half of a character is told as one of three bytes, each a token when it is encoded again


class Dialect(NamedTuple):
    """How to ask: with the prompt's ids or with messages, and what beyond OpenAI's own fields.

    `exact`: those fields switch off what would cut or bend the distribution besides temperature and top-p: servers
    otherwise take top_k and penalties from the model's generation configuration.
    """

    takes_ids: bool
    extra: dict[str, Any]
    exact: bool


_TRANSFORMERS = {"generation_config": "filled in by _body"}
DIALECTS = (
    Dialect(True, {**UNBENT, "return_token_ids": True}, True),
    Dialect(True, UNBENT, True),
    Dialect(False, {**UNBENT, "return_token_ids": True}, True),
    Dialect(False, _TRANSFORMERS, True),
    Dialect(True, {}, False),
    Dialect(False, {}, False),
)
"""In order of preference. A server that ignores what it does not know is at home in the first."""


class ServerEngine:
    """Requests under way at the same time, of several units, so that no unit waits for the slowest of another.

    Each ask's seed goes to the server; whether it keeps to it is its own affair. What is promised is one answer to
    each ask, however often it had to be asked. `vocab_size`: ids from there on cannot be the target's.
    """

    def __init__(
        self,
        client: Client,
        model: str,
        tokenizer: Tokenizer,
        eos_ids: Sequence[int],
        vocab_size: int,
        concurrency: int,
    ) -> None:
        self._client, self._model, self._tokenizer = client, model, tokenizer
        self._eos_ids, self._vocab_size = set(eos_ids), vocab_size
        self._pool = ThreadPoolExecutor(concurrency)
        self._concurrency = concurrency
        self._dialect: Dialect | None = None
        self._lock = threading.Lock()
        self._compared = self._different = 0
        # A sentencepiece model puts the space of the first word before any text.
        first = tokenizer.piece(tokenizer.encode("a")[0])
        self._adds_space = first.startswith("▁")

    def ready(self, ask: Ask, sampling: Sampling) -> str | None:
        """Find how the server is best asked; it does not tell its weights. Raises UserError as `answer` does."""
        self._dialect = self._find_dialect(ask, sampling)
        return None

    def units_at_once(self, unit_size: int) -> int:
        """Enough that all places are taken while a unit's last answers are waited for."""
        return 1 + math.ceil(self._concurrency / unit_size)

    def answer(self, asks: Sequence[Ask], sampling: Sampling) -> list[Answer]:
        """One answer to each ask. Raises UserError when the server is gone, refuses, or has another tokenizer."""
        return list(self._pool.map(lambda ask: self._answer(ask, sampling), asks))

    def _answer(self, ask: Ask, sampling: Sampling) -> Answer:
        try:
            return self._ask(ask, sampling)
        except UserError as error:
            self._client.give_up(str(error))  # the run ends with it
            raise

    def _ask(self, ask: Ask, sampling: Sampling) -> Answer:
        assert self._dialect is not None  # ready() comes first
        try:
            reply = self._post(self._dialect, ask, sampling)
        except RefusedError as refusal:
            raise UserError(self._complaint(refusal)) from refusal
        return self._read(self._dialect, ask, reply, sampling.max_new_tokens)

    def _find_dialect(self, ask: Ask, sampling: Sampling) -> Dialect:
        """The first in which one token is not refused, and can be read."""
        for dialect in DIALECTS:
            try:
                reply = self._post(dialect, ask, sampling._replace(max_new_tokens=1))
            except RefusedError as refused:
                refusal = refused
                continue
            self._read(dialect, ask, reply, sampling.max_new_tokens)  # whether it keeps to one is not asked
            if not dialect.exact:
                print(
                    f"generate: {self._client.url} takes no top_k and no penalties; its own defaults, if it has any, "
                    "bend what it samples",
                    flush=True,
                )
            return dialect
        raise UserError(self._complaint(refusal)) from refusal

    def _post(self, dialect: Dialect, ask: Ask, sampling: Sampling) -> dict[str, Any]:
        path = "/completions" if dialect.takes_ids else "/chat/completions"
        return self._client.ask("POST", path, self._body(dialect, ask, sampling))

    def _body(self, dialect: Dialect, ask: Ask, sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p if sampling.temperature > 0 else 1.0,
            "seed": ask.seed,
            **dialect.extra,
        }
        if "generation_config" in dialect.extra:
            config = {"do_sample": sampling.temperature > 0, "top_k": 0, "eos_token_id": sorted(self._eos_ids)}
            body["generation_config"] = json.dumps({**config, "max_new_tokens": sampling.max_new_tokens})
        return {**body, **({"prompt": ask.ids} if dialect.takes_ids else {"messages": ask.messages})}

    def _read(self, dialect: Dialect, ask: Ask, reply: dict[str, Any], longest: int) -> Answer:
        try:
            choice = reply["choices"][0]
            text = choice["text"] if dialect.takes_ids else choice["message"]["content"] or ""
            reason = str(choice["finish_reason"])
            ids = choice.get("token_ids")
            told = [] if ids is None else ids
            if not isinstance(told, list) or any(type(i) is not int for i in told):
                raise TypeError("token_ids are no integers")
            text.encode()
        except (KeyError, IndexError, TypeError, AttributeError, UnicodeEncodeError) as error:
            raise UserError(f"{self._client.url}: not an answer of OpenAI's protocol: {str(reply)[:200]}") from error
        if ids is None:
            answer = self._encoded(text, reason)
            count, most = len(answer.ids), _LONGER_AGAIN * longest + 1  # the end of the sequence
        else:
            sent = choice.get("prompt_token_ids") or reply.get("prompt_token_ids")
            if sent is not None and dialect.takes_ids and sent != ask.ids:
                raise UserError(f"{self._client.url}: the server answered another prompt than it was given")
            self._check_vocabulary(ids, text if dialect.takes_ids else "")  # a chat may be told without its reasoning
            answer, count, most = Answer(self._ended(ids, reason), reason), len(ids), longest
        if count > most:
            raise UserError(
                f"{self._client.url}: asked for at most {longest} tokens, the server answered {count}: {text[:100]!r}"
            )
        return answer

    def _encoded(self, text: str, reason: str) -> Answer:
        text = text.removeprefix(" ") if self._adds_space else text
        return Answer(self._ended(self._tokenizer.encode(text), reason), reason, reencoded=True)

    def _ended(self, ids: Sequence[int], reason: str) -> list[int]:
        """With the end-of-sequence id, which some servers leave out."""
        ids = list(ids)
        is_ended = reason != "stop" or (ids and ids[-1] in self._eos_ids)
        return ids if is_ended else [*ids, self._tokenizer.eos_id]

    def _check_vocabulary(self, ids: Sequence[int], text: str) -> None:
        """Raise UserError when ids are not the target's, or spell other texts here than there."""
        if strange := [i for i in ids if not 0 <= i < self._vocab_size]:
            raise UserError(
                f"{self._client.url}: token id {strange[0]} is not in the target's vocabulary of {self._vocab_size}; "
                f"does it serve {self._model}?"
            )
        if text.strip():
            with self._lock:
                self._compared += 1
                self._different += _letters(self._tokenizer.decode(ids)) != _letters(text)
        if self._compared >= _FEWEST_COMPARED and self._different > _OTHER_TOKENIZER_SHARE * self._compared:
            raise UserError(
                f"{self._client.url}: its token ids spell other texts in {self._tokenizer.source} than there; "
                "the server has another tokenizer"
            )

    def _complaint(self, refusal: RefusedError) -> str:
        if refusal.status in (401, 403):
            mend = "name the variable that holds it, engine.key_variable=OPENAI_API_KEY"
            return f"{self._client.url}: the server wants a key ({refusal}); {mend}"
        return f"{self._client.url}: refused for model {self._model!r} with {refusal}{self._known_models()}"

    def _known_models(self) -> str:
        try:
            listed = [str(entry["id"]) for entry in self._client.ask("GET", "/models")["data"]]
        except (RefusedError, UserError, KeyError, TypeError):
            return ""
        return "" if self._model in listed or not listed else f"; it has {', '.join(listed[:5])} (engine.model)"


def _letters(text: str) -> str:
    """What two decoders agree on: the ends of a text may hold half a character, or a space more or less."""
    return "".join(text.replace("\ufffd", "").split())
