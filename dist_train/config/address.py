"""Addresses of servers: well formed, without secrets, and whether a key may go there."""

from __future__ import annotations

from urllib.parse import urlsplit

from dist_train.runtime.world import on_loopback


def refuse_secrets(url: str) -> None:
    """Raise ValueError where an address holds a name or password: it is kept beside results and shown in messages."""
    if "@" in url:
        host = url.rpartition("@")[2]
        raise ValueError(f"***@{host}: what stands before @ would be kept and shown; leave it out")


def check_address(url: str) -> None:
    """Raise ValueError, which shows the address, where it is none of a server, or holds a secret."""
    refuse_secrets(url)
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url}: no address such as http://node7:8000")


def carries_openly(url: str) -> bool:
    """Whether what is sent there can be read on the way: plain http, to another machine."""
    parts = urlsplit(url)
    return parts.scheme != "https" and not on_loopback(parts.hostname or "")
