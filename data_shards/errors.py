"""The one exception of this package, and how foreign text stands in a message."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

_LONGEST, _FIELDS = 60, 20


class DataError(Exception):
    """Something is wrong with data on disk or with how it was asked for; the message names the file and the mend."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def shown(text: str) -> str:
    """A text out of the data, for a message: short, on one line, and nothing in it that a terminal obeys."""
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return text if text.isprintable() else repr(text)[1:-1]


def listed(fields: Iterable[str]) -> str:
    """The names of a record's fields, for a message."""
    names = [shown(name) for name in islice(fields, _FIELDS + 1)]
    return ", ".join([*names[:_FIELDS], "..."] if len(names) > _FIELDS else names)
