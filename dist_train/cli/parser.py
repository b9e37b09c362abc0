"""argparse, told once how this command line speaks."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from dist_train.api.stages import Stage

BAD_INPUT = 2
STOPPED = 130  # as a shell has it of a process that SIGINT ended


class Parser(argparse.ArgumentParser):
    """Errors are one line; the help of a stage lists the keys of its configuration."""

    stage: Stage | None = None

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, in one line, and exit with 2."""
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n")

    def format_help(self) -> str:
        """argparse's help, and what is not known before the configuration's class is imported."""
        text = super().format_help()
        if self.stage is None:
            return text
        from dist_train.config import describe

        keys = [
            (f"{key}={default}" if default else key, text) for key, default, text in describe(self.stage.config_class)
        ]
        width = min(44, max(len(key) for key, _ in keys))
        listed = "\n".join(f"  {key:<{width}}  {text}".rstrip() for key, text in keys)
        return f"{text}\nconfiguration keys (without a default: required):\n{listed}\n"


def add(
    commands: argparse._SubParsersAction, name: str, summary: str, example: str, function: Callable[..., int | None]
) -> Parser:
    """Add a command with its summary, example and function."""
    parser: Parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(function=function)
    return parser


def processes(text: str) -> int:
    """An argument that counts processes."""
    count = int(text) if text.isdigit() else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} processes; it takes at least 1")
    return count
