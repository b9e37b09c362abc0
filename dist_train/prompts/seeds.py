"""Seed instructions and evaluation prompts: read, cleaned of duplicates, divided, rendered as chats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from data_shards.errors import first_line, listed
from data_shards.faults import Faults
from dist_train.config import SeedsSection, TaskSection
from dist_train.errors import UserError
from dist_train.prompts.formats import Conversation, Placed, conversations, placed_records
from dist_train.runtime.world import tell_once
from dist_train.tokenizer import EncodedChat, Message, RefusedChatError, Tokenizer

_FAULTS_SHOWN = 20
_SPLIT_KEY = b"dist-train held-out prompts"  # fixed for ever: another key would move prompts across


class Seed(NamedTuple):
    """A conversation up to where the answer begins, and its token ids; None where no tokenizer was given.

    `later`: what the user says after the answer, and after each of the following ones (turns=regenerate).
    """

    messages: list[Message]
    encoded: EncodedChat | None
    later: list[list[Message]]


class EncodedSeeds(NamedTuple):
    """Conversations, the token ids of each, and what is said after each of the answers to it."""

    messages: list[list[Message]]
    ids: list[list[int]]
    later: list[list[list[Message]]]


def read_seeds(
    section: SeedsSection, tokenizer: Tokenizer | None = None, *, but: set[str] | None = None, key: str = "seeds"
) -> list[list[Message]]:
    """The conversations of a source in file order, each up to where the answer begins; repeated ones once.

    Two that differ only in white space are the same. `tokenizer`: needed where the section limits tokens; a
    conversation that its chat template refuses is a malformed record. `but`: what other sources had, which is left out
    here; this source's are added. `key`: where the section stands in the configuration, "" where it has no place there.
    Records that its `faults` skip are told. Raises UserError when nothing is left, DataError for a record that is not
    skipped.
    """
    return [seed.messages for seed in read_with_ids(section, tokenizer, but, key=key)]


def read_all_seeds(sections: Sequence[SeedsSection], tokenizer: Tokenizer | None) -> list[list[Message]]:
    """The conversations of several sources, `seeds` and `more_seeds`, one source after another.

    `tokenizer` as for `read_seeds`. Raises UserError when nothing is left.
    """
    return [seed.messages for seed in _read_all(sections, tokenizer)]


def read_encoded_seeds(sections: Sequence[SeedsSection], tokenizer: Tokenizer) -> EncodedSeeds:
    """As `read_all_seeds`, with token ids up to where the answer begins."""
    return encoded(_read_all(sections, tokenizer), tokenizer.source)


def encoded(seeds: Sequence[Seed], source: str) -> EncodedSeeds:
    """The two sides of encoded seeds; says how many spell out special tokens of the tokenizer `source`."""
    found = [(seed.messages, seed.encoded, seed.later) for seed in seeds if seed.encoded is not None]
    if by_parts := sum(chat.by_parts for _, chat, _ in found):
        tell_once(f"{source}: {by_parts:,} of {len(found):,} prompts spell out its special tokens, which stay text")
    return EncodedSeeds(
        [messages for messages, _, _ in found], [chat.ids for _, chat, _ in found], [later for _, _, later in found]
    )


def encode_at(messages: Conversation, where: Callable[[], str], tokenizer: Tokenizer) -> EncodedChat:
    """A conversation's token ids. Raises RefusedChatError with its place where the chat template refuses it."""
    try:
        return tokenizer.encode_chat(messages)
    except RefusedChatError as error:
        raise RefusedChatError(f"{where()}: {error}") from None


def refuse_long(
    prompts: Sequence[Sequence[int]], more: int, source: str, model: Any, key: str, where: str = ""
) -> None:
    """Raise UserError where a prompt and `more` tokens do not fit the positions of a model, given by its configuration.

    `key`: what limits the prompts' tokens, and `where` it is to be set.
    """
    room, longest = getattr(model, "max_position_embeddings", None), max(map(len, prompts))
    if room is not None and longest + more > room:
        mend = f"max_new_tokens below {room}, less what prompts take"
        if room > more:
            mend = f"{key}={room - more}{where}, or a smaller max_new_tokens"
        raise UserError(
            f"{source} has {room} positions; a prompt of {longest} tokens and {more} more after it do not fit; "
            f"set {mend}"
        )


def is_held_out(text: str, share: float) -> bool:
    """Whether a prompt, by its conversation's first user message, is among the held-out `share` of all.

    Decided by a keyed hash of the text without regard to white space, and by nothing else: no order, no source and no
    other prompt changes it.
    """
    digest = hashlib.blake2b(_normalised(text).encode(errors="replace"), key=_SPLIT_KEY, digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def is_on_side(messages: Conversation, section: SeedsSection | TaskSection) -> bool:
    """Whether a conversation is on the side of the division that the section wants."""
    if section.split == "all":
        return True
    first = next((message["content"] for message in messages if message["role"] == "user"), messages[0]["content"])
    return is_held_out(first, section.held_out) == (section.split == "held_out")


def because(section: SeedsSection | TaskSection) -> str:
    """What left prompts out, for the end of a message."""
    kept = {name: getattr(section, name, None) for name in ("where", "split", "min_tokens", "max_tokens")}
    told = [f"{name}={value}" for name, value in kept.items() if value not in ({}, "all", 0, None)]
    return f" with {', '.join(told)}" if told else ""


def _read_all(sections: Sequence[SeedsSection], tokenizer: Tokenizer | None) -> list[Seed]:
    seen: set[str] = set()
    keys = ["seeds", *(f"more_seeds[{i}]" for i in range(len(sections) - 1))]
    found = [
        seed
        for section, key in zip(sections, keys, strict=True)
        for seed in read_with_ids(section, tokenizer, seen, key=key)
    ]
    if not found:
        raise UserError(f"{sections[0].source}: no prompts in it{because(sections[0])}")
    return found


def read_with_ids(
    section: SeedsSection, tokenizer: Tokenizer | None, but: set[str] | None = None, *, key: str = "seeds"
) -> list[Seed]:
    """As `read_seeds`, with the token ids where there is a tokenizer."""
    policy = {**(section.faults.model_dump(exclude={"max_bytes"}) if key else {}), "empty": "skip"}
    faults = Faults(policy, section.faults.max_bytes, f"{key}.faults")
    found = list(islice(_wanted(section, tokenizer, set() if but is None else but, faults), section.limit))
    _tell(faults, section)
    if not found and but is None:
        raise UserError(f"{section.source}: no prompts in it{because(section)}")
    return found


def _tell(faults: Faults, section: SeedsSection) -> None:
    for fault in faults.named[:_FAULTS_SHOWN]:
        tell_once(f"seeds: left out ({fault.kind}): {fault.where}: {fault.reason}")
    if faults.counts:
        counts = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in sorted(faults.counts.items()))
        tell_once(f"seeds: {section.source}: {counts} left out")


def _wanted(section: SeedsSection, tokenizer: Tokenizer | None, seen: set[str], faults: Faults) -> Iterator[Seed]:
    if (section.min_tokens > 0 or section.max_tokens is not None) and tokenizer is None:
        raise UserError(f"{section.source}: min_tokens and max_tokens have no effect here; leave them out")
    for messages, where, later in conversations(_records(section, faults), section, faults):
        key = "\n".join(map(_key, [messages, *later]))
        if not messages or key in seen or not is_on_side(messages, section):
            continue
        seen.add(key)
        if tokenizer is None:
            yield Seed(messages, None, later)
            continue
        try:
            chat = tokenizer.encode_chat(messages)
        except RefusedChatError as error:
            faults.note("malformed", where, str(error))
            continue
        if section.min_tokens <= len(chat.ids) <= (section.max_tokens or len(chat.ids)):
            yield Seed(messages, chat, later)


def _key(messages: Conversation) -> str:
    return json.dumps([(message["role"], _normalised(message["content"])) for message in messages])


def _normalised(text: str) -> str:
    return " ".join(text.split())


def _records(section: SeedsSection, faults: Faults) -> Iterator[Placed]:
    placed: Iterable[Placed]
    if section.dataset:
        rows = enumerate(_load_dataset(section), 1)
        placed = (Placed(record, partial("{}:{}".format, section.source, row)) for row, record in rows)
    else:
        placed = placed_records(section.inputs, faults)
    for record, where in placed:
        for field in section.where:
            if field not in record:
                raise UserError(f"{where()}: where: a record has no {field!r}; it has {listed(record)}")
        if all(record[field] == value for field, value in section.where.items()):
            yield Placed(record, where)


def _load_dataset(section: SeedsSection) -> Any:
    """Through the cache of `datasets`: fetched once, by whoever is first, and there for nodes without network."""
    import datasets

    assert section.dataset is not None
    wanted = section.dataset
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(wanted.path, wanted.name, split=wanted.split, revision=wanted.revision)
    except Exception as error:  # datasets raises what its many sources raise
        raise UserError(f"dataset {wanted.path}: {first_line(error)}") from error
