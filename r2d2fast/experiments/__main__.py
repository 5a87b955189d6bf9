"""The experiments: ``python -m r2d2fast.experiments``."""

import sys

from r2d2fast.command import as_called
from r2d2fast.interruption import quietly_interrupted

with quietly_interrupted(as_called("experiments")):
    from r2d2fast.experiments.cli import main

sys.exit(main())
