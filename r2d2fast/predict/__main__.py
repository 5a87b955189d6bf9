import sys

from r2d2fast.interruption import quietly_interrupted

with quietly_interrupted("python -m r2d2fast.predict"):
    from r2d2fast.predict.cli import main

sys.exit(main())
