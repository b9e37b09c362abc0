"""Packing conversations into sequences of one length, so that little of a batch is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack_documents(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each document, longest first, goes to the fullest pack that still has room for it.

    `lengths` in tokens; a document longer than `capacity` gets a pack of its own (readers cut it). Returns the
    documents of each pack. Best-fit decreasing needs at most 11/9 of the fewest possible packs (Johnson, 1973).
    """
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> packs with just that much
    rooms: list[int] = []  # the keys of by_room, sorted
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = min(lengths[document], capacity)
        at = bisect_left(rooms, length)
        if at == len(rooms):
            pack, room = len(packs), capacity
            packs.append([])
        else:
            room = rooms[at]
            pack = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        packs[pack].append(document)
        if left := room - length:
            if left not in by_room:
                by_room[left] = []
                insort(rooms, left)
            by_room[left].append(pack)
    return packs
