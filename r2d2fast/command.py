"""The console command ``r2d2fast``: ``r2d2fast train`` is ``python -m r2d2fast.train``, and so on.

PyTorch takes seconds to import: only the subcommands do.
"""

import runpy
import sys

COMMANDS = {
    "train": ("r2d2fast.train", "train on images or embeddings, few of which are labelled, and label the rest"),
    "predict": ("r2d2fast.predict", "label new images or embeddings by the network of a finished run"),
    "embed": ("r2d2fast.data.embed", "write the embeddings of images, by a pretrained network, to train on"),
    "pack": ("r2d2fast.data.pack", "write a copy of an image folder that loads faster"),
    "doctor": ("r2d2fast.doctor", "say what is installed, whether it computes right here, and how fast"),
    "report": ("r2d2fast.report", "make a page and a table of any set of runs"),
    "experiments": ("r2d2fast.experiments", "repeat the paper's tables and figures"),
}
"""The module that each subcommand runs, and what it does."""

_started = False


def as_called(name: str) -> str:
    """How to call a subcommand, in the way in which this process was: ``r2d2fast train`` or ``python -m r2d2fast.train``."""
    return f"r2d2fast {name}" if _started else f"python -m {COMMANDS[name][0]}"


def main() -> int:
    """Run the subcommand that the process's first argument names. Returns the exit status where none is run."""
    global _started
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: r2d2fast COMMAND ...\n\nr2d2fast COMMAND --help explains the flags of each:")
        for command, (_, what) in COMMANDS.items():
            print(f"  {command:<12} {what}")
        return 0
    if name not in COMMANDS:
        print(f"r2d2fast: {name}: no command; accepted: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    _started = True
    sys.argv[1:] = arguments
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)
    return 0
