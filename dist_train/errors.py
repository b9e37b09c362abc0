"""The exceptions for what a user can mend, and how text goes into a line that people and SLURM's scripts read."""

from __future__ import annotations

import re


class UserError(Exception):
    """Bad input of any kind; the command line prints it as one line and exits with code 2."""

    exit_code = 2


class LostPeerError(UserError):
    """Another rank is gone: nothing is wrong with the input, the same command goes on.

    Its exit code is EX_TEMPFAIL, which a process that its watchdog ended has too.
    """

    exit_code = 75


class RankError(UserError):
    """What one rank alone has met with, and so has to tell itself: a full disk of its node, say."""


def printable(text: str) -> str:
    """One line for log and terminal of a text that may be anybody's: what is not printed as it is, escaped.

    A line break within a key or a server's answer could otherwise begin a line that passes for SLURM's own words, and
    an escape sequence command the terminal.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return without_passwords(shown)


def without_passwords(text: str) -> str:
    """`text` without what stands before the host in addresses such as s3://NAME:PASSWORD@HOST/FILE."""
    return re.sub(r"(?<=://)[^/?#\s@]*:[^/?#\s]*@", "***@", text)
