"""`python -m dist_train`: the command line."""

import os
import sys

try:
    from dist_train.cli import main

    code = main()
except KeyboardInterrupt:  # before main can tell of it, as when the ranks of --nproc start
    os._exit(130)
sys.exit(code)
