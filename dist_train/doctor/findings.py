"""One line of the doctor's table."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal

_WIDTH = 120


@dataclass(frozen=True)
class Finding:
    """What a check found on a node (or "all"): `mend` says what to do where it is not well."""

    check: str
    where: str
    verdict: Literal["ok", "note", "FAIL"]
    text: str
    mend: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether the run should not start."""
        return self.verdict == "FAIL"


def render(finding: Finding, node_width: int) -> str:
    """The finding as one row of the table, continued below itself where a terminal would break it."""
    head = f"{finding.verdict:<4}  {finding.check:<14}  {finding.where:<{node_width}}  "
    text = f"{finding.text}; {finding.mend}" if finding.mend else finding.text
    # A row is cut at words only, never within a path that a user will copy.
    return textwrap.fill(
        text,
        max(_WIDTH, len(head) + 40),
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
