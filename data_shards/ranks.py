"""Ranks that work side by side, and end side by side: what one of them raises, all raise."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data_shards.errors import DataError, first_line

Result = TypeVar("Result")
_CALLED_OFF = 1  # the tag of the message by which a failed rank calls the others from their work


class Communicator(Protocol):
    """What is used of an mpi4py communicator."""

    rank: int
    size: int

    def allgather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""

    def isend(self, value: Any, *, dest: int, tag: int) -> Any:
        """Send without waiting; the request that comes back is waited for by `wait()`."""

    def recv(self, *, source: int, tag: int) -> Any:
        """Wait for a message."""

    def iprobe(self, *, tag: int) -> bool:
        """Whether a message is there."""


class Alone:
    """Stands in for MPI's communicator where one process does all."""

    rank, size = 0, 1

    def allgather(self, value: Any) -> list[Any]:
        """Nobody else's."""
        return [value]

    def isend(self, value: Any, *, dest: int, tag: int) -> Any:
        """There is nobody to send to."""
        raise NotImplementedError

    def recv(self, *, source: int, tag: int) -> Any:
        """There is nobody to hear from."""
        raise NotImplementedError

    def iprobe(self, *, tag: int) -> bool:
        """Nothing ever comes."""
        return False


class AgreedError(DataError):
    """Raised by every rank alike: there is nobody left to be told."""


def together(comm: Communicator, action: Callable[[], Result]) -> Result:
    """What this rank's `action` gives, once all ranks are done with theirs; if any fails, all raise the failures.

    Collective, and may be nested. All ranks have to go through the same calls in the same order and through no other
    collective: whatever a rank raises between two inner calls then meets the others at their next one.
    Ctrl-C alone is not shared: it ends its process, and with it the launcher ends the others.
    """
    result: Any = None
    failure: str | None = None
    requests: list[Any] = []
    try:
        result = action()
    except (AgreedError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a rank that left on its own would have the others wait for ever
        failure = _told(error, comm.rank)
        requests = [comm.isend(None, dest=rank, tag=_CALLED_OFF) for rank in range(comm.size) if rank != comm.rank]
    failures = {rank: text for rank, text in enumerate(comm.allgather(failure)) if text}
    if failures:
        for rank in failures:
            if rank != comm.rank:
                comm.recv(source=rank, tag=_CALLED_OFF)
        for request in requests:
            request.wait()
        raise AgreedError("; ".join(dict.fromkeys(failures.values())))
    return result


def called_off(comm: Communicator) -> bool:
    """Whether another rank has failed, so that going on is of no use; asked now and then within `together`."""
    return comm.iprobe(tag=_CALLED_OFF)


def _told(error: BaseException, rank: int) -> str:
    """A failure as one line: of one that nobody expected also whose it is and where it arose."""
    if isinstance(error, DataError) or hasattr(error, "exit_code"):  # what a user can mend, of whatever package
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}, line {place.lineno}"
    return f"rank {rank}: {type(error).__name__}: {first_line(error)} ({where})"
