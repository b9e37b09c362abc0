"""Files with one record a line, and files that are one JSON array of records; each read in linear time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from data_shards.streams import BLOCK, BOM

TooLong = Callable[[int], None]
"""Told where a line is that is too long: counts it, or raises."""


def lines_in(file: BinaryIO, start: int, stop: int, max_bytes: int, too_long: TooLong) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in the bytes [start, stop) of a seekable file, each after its first byte's position."""
    position = start
    if position > 0:
        # The line that runs into this range belongs to the range before it.
        file.seek(position - 1)
        position += _skip_line(file, stop - position + 1) - 1
    while position < stop and (line := file.readline(max_bytes + 1)):
        if len(line) > max_bytes and not line.endswith(b"\n"):
            too_long(position)
            position += len(line) + _skip_line(file)
            continue
        yield position, line if position else line.removeprefix(BOM)
        position += len(line)


def numbered_lines(file: BinaryIO, max_bytes: int, too_long: TooLong) -> Iterator[tuple[int, bytes]]:
    """All lines of a file that is read from its beginning to its end, each after its number from 1."""
    number = 1
    while line := file.readline(max_bytes + 1):
        if len(line) > max_bytes and not line.endswith(b"\n"):
            too_long(number)
            _skip_line(file)
        else:
            yield number, line if number > 1 else line.removeprefix(BOM)
        number += 1


def _skip_line(file: BinaryIO, most: int | None = None) -> int:
    """Read to the end of a line of any length, or `most` bytes of it, and say how many bytes that were."""
    size = 0
    while (most is None or size < most) and (part := file.readline(BLOCK)):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


# -- one array ----------------------------------------------------------------------------------------------------


class ArrayError(ValueError):
    """An array that cannot be read on: behind what is wrong with an item nobody knows where the next begins."""


_BLANK = re.compile(r"[ \t\r\n]*")
_TAIL = 12  # characters: a literal or an escape that the end of a block cut shows its fault so near the end


def is_array(file: BinaryIO) -> bool:
    """Whether a file of JSON is one array, by its first character."""
    block = file.read(len(BOM)).removeprefix(BOM) or file.read(BLOCK)
    while block:
        if found := block.lstrip(b" \t\r\n"):
            return found.startswith(b"[")
        block = file.read(BLOCK)
    return False


def array_items(file: BinaryIO, max_bytes: int) -> Iterator[Any]:
    """The items of a JSON array, parsed one after another; of the file no more is held than an item and a block.

    The parser is Python's own, as for lines: it takes NaN, numbers of any size and any escape, and stops where an item
    does. Raises ArrayError where the file is no array, or an item has more than `max_bytes` characters.
    """
    items = _Items(file, max_bytes)
    if items.next_character() != "[":
        raise ArrayError("not a JSON array")
    items.at += 1
    if items.next_character() != "]":
        yield items.next_value()
        while items.next_character() == ",":
            items.at += 1
            yield items.next_value()
    if items.next_character() != "]":
        raise ArrayError("neither a comma nor the end of the array after it" if items.next_character() else "torn off")
    items.at += 1
    if items.next_character():
        raise ArrayError("more after the end of the array")


class _Items:
    """A file's text from `at` on, as far as it has been read."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self._file, self._max_bytes = file, max_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._parser = json.JSONDecoder()
        self._text, self._ended = "", False
        self.at = 0

    def next_character(self) -> str:
        """The next one that is not blank, `at` which this is then; nothing at the end."""
        while True:
            self.at = _BLANK.match(self._text, self.at).end()  # type: ignore[union-attr] # it may be empty
            if self.at < len(self._text) or not self._more():
                return self._text[self.at : self.at + 1]

    def next_value(self) -> Any:
        """The next item; `at` is then behind it."""
        self.next_character()
        while True:
            try:
                value, end = self._parser.raw_decode(self._text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _TAIL
                if not cut:
                    raise ArrayError(f"not JSON: {error.msg}") from error
                if len(self._text) - self.at > self._max_bytes:
                    raise self._too_long() from error
                if not self._more():
                    raise ArrayError("torn off") from error
                continue
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
                raise ArrayError(f"not JSON: {error}") from error
            if end < len(self._text) or not self._more():  # a number might go on in the next block
                if end - self.at > self._max_bytes:
                    raise self._too_long()
                self.at = end
                return value

    def _too_long(self) -> ArrayError:
        return ArrayError(f"it has more than {self._max_bytes:,} bytes (max_bytes)")

    def _more(self) -> bool:
        """Read as much as there is already, so that an item is parsed again only a few times; False at the end."""
        if self._ended:
            return False
        wanted = max(BLOCK, len(self._text) - self.at)
        part = self._file.read(wanted)
        self._ended = not part
        try:
            self._text = self._text[self.at :] + self._decoder.decode(part, final=self._ended)
        except UnicodeDecodeError as error:
            raise ArrayError(f"not UTF-8: {error.reason}") from error
        self.at = 0
        return True
