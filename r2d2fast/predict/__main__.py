import sys

from r2d2fast.predict.cli import main

sys.exit(main())
