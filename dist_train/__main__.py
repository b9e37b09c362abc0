"""`python -m dist_train`: the command line."""

import sys

from dist_train.cli import main

sys.exit(main())
