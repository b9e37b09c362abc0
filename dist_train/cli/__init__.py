"""The command line: one word per stage, each with a configuration file, overrides and an example.

Imports of torch and its kind happen inside the stages, so that help and error messages come at once.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from data_shards.errors import DataError
from dist_train.api.stages import STAGES
from dist_train.cli.parser import BAD_INPUT, STOPPED, Parser
from dist_train.cli.preflight import add_preflight
from dist_train.cli.slurm import add_job, add_status, add_submit
from dist_train.cli.stages import add_stage
from dist_train.cli.tools import add_checkpoint, add_demo, add_tokenizer
from dist_train.errors import LostPeerError, RankError, UserError, printable
from dist_train.runtime.faults import fault_kind, node_fault_line
from dist_train.runtime.progress import heartbeat
from dist_train.runtime.version import __version__
from dist_train.runtime.world import is_spokesman, node_name

# What a file system refuses, and no code can foresee for each file that it reads.
_OF_THE_SYSTEM = (
    errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE, errno.EIO, errno.EROFS,
)  # fmt: skip

_SHORT = ("submit", "status", "plan", "job")  # what they print is read by others, a script or a table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 for bad input, told in one line; Ctrl-C ends the process.

    75 where another node is needed: its GPU failed, or another rank is gone.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # Overrides may stand after options, which argparse does not expect of positional arguments.
    if rest and (not hasattr(options, "words") or any(word.startswith("-") for word in rest)):
        parser.error(f"unknown arguments: {' '.join(rest)}; see dist-train {options.command} --help")
    options.words = [*getattr(options, "words", []), *rest]
    try:
        with heartbeat(_label(options)) if options.command not in _SHORT else nullcontext():
            return options.function(options) or 0
    except (UserError, DataError) as error:
        _tell(f"dist-train {options.command}: {error}", every=isinstance(error, RankError))
        return getattr(error, "exit_code", BAD_INPUT)
    except OSError as error:
        if error.filename is None or error.errno not in _OF_THE_SYSTEM:
            raise
        _tell(f"dist-train {options.command}: {error.filename}: {error.strerror}")
        return BAD_INPUT
    except RuntimeError as error:  # CUDA's and NCCL's are such
        if fault_kind(str(error)) != "node fault":
            raise
        from dist_train.runtime.devices import current_gpu

        line = node_fault_line(node_name(), current_gpu(), error)
        _tell(f"dist-train {options.command}: {line}", every=True)
        return LostPeerError.exit_code
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # --nproc passes on what its terminal has sent to all
        _tell(f"dist-train {options.command}: {'; '.join(['stopped', *stop.args])}")
        os._exit(STOPPED)  # the interpreter's end would wait for threads that are at work


def _label(options: argparse.Namespace) -> str:
    """What its lines begin with: what a dry run prints is a configuration or a script, in which they are comments."""
    return f"{'# ' if getattr(options, 'dry_run', False) else ''}{options.command}"


def _tell(line: str, *, every: bool = False) -> None:
    """Say it once, since every rank finds the same fault; `every` rank says what is its own.

    Texts of others in it cannot begin a line of their own.
    """
    if every or is_spokesman():
        print(printable(line), file=sys.stderr, flush=True)


def _parser() -> Parser:
    parser = Parser(
        prog="dist-train",
        description="Train draft models for speculative decoding, aligned with a chat LLM.",
        epilog="example: dist-train demo --out demo-run",
    )
    parser.add_argument("--version", action="version", version=f"dist-train {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_demo(commands)
    add_tokenizer(commands)
    for stage in STAGES.values():
        add_stage(commands, stage)
    add_submit(commands)
    add_status(commands)
    add_job(commands)
    add_checkpoint(commands)
    add_preflight(commands)
    return parser
