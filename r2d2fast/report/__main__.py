"""The report: ``python -m r2d2fast.report``."""

import sys

from r2d2fast.report.cli import main

sys.exit(main())
