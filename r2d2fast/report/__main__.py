"""The report: ``python -m r2d2fast.report``."""

import sys

from r2d2fast.command import as_called
from r2d2fast.interruption import quietly_interrupted

with quietly_interrupted(as_called("report")):
    from r2d2fast.report.cli import main

sys.exit(main())
