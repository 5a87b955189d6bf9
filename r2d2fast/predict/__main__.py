import sys

from r2d2fast.command import as_called
from r2d2fast.interruption import quietly_interrupted

with quietly_interrupted(as_called("predict")):
    from r2d2fast.predict.cli import main

sys.exit(main())
