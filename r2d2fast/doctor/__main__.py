import sys

from r2d2fast.doctor.cli import main

sys.exit(main())
