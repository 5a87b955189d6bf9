import os
import sys

from r2d2fast.train.cli import main

status = main()
if "LOCAL_RANK" in os.environ:
    # Under torchrun a thread of PyTorch's now and then aborts the process while Python ends, when everything is written.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
sys.exit(status)
