"""Machines that are taken away: SIGTERM, and checkpoints within long epochs."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from r2d2fast.train.errors import PreemptedError
from r2d2fast.train.ranks import Ranks

# Steps between two moments at which the ranks ask each other: a collective on the host, some 0.1 ms.
STEPS_BETWEEN_AGREEMENTS = 10
# What a rank has to say, the larger the more urgent.
NOTHING, SAVE, STOP = range(3)


class Pauses:
    """Called between steps: saves when it is time, and stops the run when the machine goes.

    Args:
        ranks: of the run; they save and stop at the same step.
        save: writes a checkpoint.
        due: whether it is time for one.
    """

    def __init__(self, ranks: Ranks, save: Callable[[], None], due: Callable[[], bool]) -> None:
        self.ranks = ranks
        self.save = save
        self.due = due
        self.calls = 0
        self.signalled = False

    def __call__(self) -> None:
        """Raises PreemptedError, with a checkpoint written, after a SIGTERM to any rank."""
        self.calls += 1
        if self.ranks.count > 1 and self.calls % STEPS_BETWEEN_AGREEMENTS:
            return
        wish = self.ranks.largest(STOP if self.signalled else SAVE if self.due() else NOTHING)
        if wish > NOTHING:
            self.save()
        if wish == STOP:
            raise PreemptedError("SIGTERM: stopped, with a checkpoint; the same command with --resume goes on")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """SIGTERM is heard while the context lasts; a second one ends the process at once."""

        def hear(number: int, frame: FrameType | None) -> None:
            self.signalled = True
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

        before = signal.signal(signal.SIGTERM, hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
