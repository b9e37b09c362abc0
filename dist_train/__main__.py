"""`dist-train`, and `python -m dist_train`: the command line."""

from __future__ import annotations

import os
import sys


def run() -> int:
    """Its exit code. Ctrl-C while it is being imported ends it in silence, as when the ranks of --nproc start."""
    try:
        from dist_train.cli import main

        return main()
    except KeyboardInterrupt:
        os._exit(130)


if __name__ == "__main__":
    sys.exit(run())
