import sys

from r2d2fast.train.cli import main

sys.exit(main())
