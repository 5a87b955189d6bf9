"""The experiments: ``python -m r2d2fast.experiments``."""

import sys

from r2d2fast.experiments.cli import main

sys.exit(main())
