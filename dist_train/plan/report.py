"""A plan is a list of figures, each with its formula in plain words; here they become a table."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

_WIDTH = 120
_SCALES = {
    "bytes": ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
    "bytes/s": ((1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s"), (1.0, "B/s")),
    "count": ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, "")),
    "flop": ((1e24, "YFLOP"), (1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")),
    "flop/s": ((1e15, "PFLOP/s"), (1e12, "TFLOP/s"), (1e9, "GFLOP/s")),
    "seconds": ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "us")),
}


@dataclass(frozen=True)
class Entry:
    """One figure: `amount` in `unit` (a key of the scales, "share", "GiB", "GPU-hours", or "" for a plain number)."""

    section: str
    name: str
    amount: float
    unit: str
    how: str


@dataclass
class Plan:
    """The figures of one stage on one machine, in the order in which they are printed; `plan["step"]` is an amount."""

    title: str
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """what is left out, or does not work"""

    def add(self, section: str, name: str, amount: float, unit: str, how: str) -> float:
        """Append a figure and return its amount."""
        self.entries.append(Entry(section, name, amount, unit, how))
        return amount

    def __getitem__(self, name: str) -> float:
        """The amount of the figure `name`. Raises KeyError where there is none."""
        for entry in self.entries:
            if entry.name == name:
                return entry.amount
        raise KeyError(name)

    def __contains__(self, name: str) -> bool:
        """Whether there is a figure `name`."""
        return any(entry.name == name for entry in self.entries)


def render(plan: Plan) -> str:
    """The plan as text of 120 columns: name, figure, formula."""
    first = {section: i for i, section in reversed(list(enumerate(entry.section for entry in plan.entries)))}
    entries = sorted(plan.entries, key=lambda entry: first[entry.section])
    names = max(len(entry.name) for entry in entries)
    shown = [_shown(entry.amount, entry.unit) for entry in entries]
    figures = max(map(len, shown))
    indent = " " * (names + figures + 6)
    lines, section = [plan.title], ""
    for entry, figure in zip(entries, shown, strict=True):
        if entry.section != section:
            section = entry.section
            lines += ["", section]
        how = textwrap.wrap(entry.how, _WIDTH - len(indent)) or [""]
        lines.append(f"  {entry.name:<{names}}  {figure:>{figures}}  {how[0]}".rstrip())
        lines += [indent + more for more in how[1:]]
    if plan.notes:
        lines += ["", *(line for note in plan.notes for line in textwrap.wrap(note, _WIDTH, subsequent_indent="  "))]
    return "\n".join(lines) + "\n"


def _shown(amount: float, unit: str) -> str:
    if unit == "share":
        return f"{amount:.1%}"
    if unit not in _SCALES:
        return f"{amount:,.3g} {unit}".rstrip() if amount < 1000 else f"{amount:,.0f} {unit}".rstrip()
    scales = _SCALES[unit]
    size, name = next((scale for scale in scales if amount >= scale[0]), scales[-1])
    return f"{amount / size:.3g} {name}".rstrip()
