"""Special tokens in a rendered conversation: those that the template wrote, and those that a message spells out.

A server reads the rendered text with every special token in it as an id. Here a message's own stay text: where one
spells any, the conversation is rendered once more with a stand-in character in the place of each, and what then is
still a special token was written by the template.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

_PLANES = (0xF0000, 0x100000)  # private use; the marks are of one whose characters are not in the text


class Marks(NamedTuple):
    """Stand-ins: `table` gives back, through str.translate, the text that they stand for."""

    edge: str
    """around a message, so that no special token lies partly in it; stands for nothing"""
    of: dict[str, str]
    """special token to the character in its place"""

    @property
    def table(self) -> dict[int, str]:
        """For str.translate: a text as it was without marks."""
        return {ord(self.edge): "", **{ord(mark): token for token, mark in self.of.items()}}


class SpecialTokens:
    """The special tokens of a vocabulary: where they are in a text, and whether a message could hide some.

    `strips_left`, `strips_right`: those that take white space before or after them along.
    """

    def __init__(
        self, ids: Mapping[str, int], strips_left: Collection[str] = (), strips_right: Collection[str] = ()
    ) -> None:
        self.ids = {token: i for token, i in ids.items() if token}
        # The longest wins where several begin.
        self._tokens = sorted(self.ids, key=len, reverse=True)
        self._found = re.compile("|".join(map(re.escape, self._tokens)) or "(?!)")
        self._strips_left, self._strips_right = frozenset(strips_left), frozenset(strips_right)
        self._joined = "\0".join(self._tokens)
        self._longest = max(map(len, self._tokens), default=0)
        self._heads = {token[:i] for token in self._tokens for i in range(1, len(token))}
        self._tails = {token[i:] for token in self._tokens for i in range(1, len(token))}

    def cut(self, text: str) -> list[str | int]:
        """A text as the ids of the special tokens in it, and the texts between them."""
        parts: list[str | int] = []
        end, before = 0, ""
        for match in self._found.finditer(text):
            between, token = text[end : match.start()], match[0]
            between = between.lstrip() if before in self._strips_right else between
            between = between.rstrip() if token in self._strips_left else between
            parts += [between, self.ids[token]] if between else [self.ids[token]]
            end, before = match.end(), token
        rest = text[end:].lstrip() if before in self._strips_right else text[end:]
        return [*parts, rest] if rest else parts

    def may_hide_in(self, text: str) -> bool:
        """Whether a message has a special token in it, or could be a part of one that reaches out of it."""
        core = text.strip()
        if not core:
            return False
        return (
            self._found.search(text) is not None
            or any(core[:size] in self._tails or core[-size:] in self._heads for size in range(1, self._longest))
            or (len(core) < self._longest and core in self._joined)
        )

    def marks(self, messages: Sequence[str], rendered: str) -> Marks | None:
        """Stand-ins for what `messages` spell out that are not in `rendered`; None where it has too many characters."""
        spelled = dict.fromkeys(token for text in messages for token in self._found.findall(text))
        for plane in _PLANES:
            if not any(plane <= ord(character) <= plane + len(spelled) for character in rendered):
                return Marks(chr(plane), {token: chr(plane + i) for i, token in enumerate(spelled, start=1)})
        return None

    def marked(self, text: str, marks: Marks, *, edges: bool) -> str:
        """A message with marks for its special tokens, and at its edges, within the white space that templates trim."""
        marked = self._found.sub(lambda match: marks.of[match[0]], text)
        core = marked.strip()
        if not core or not edges:
            return marked
        before, after = marked.split(core, maxsplit=1)
        return f"{before}{marks.edge}{core}{marks.edge}{after}"
