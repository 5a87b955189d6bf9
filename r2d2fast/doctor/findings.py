"""What the doctor found: which backend was checked where, with what result; an error is a finding and stops nothing else."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from r2d2fast.testing import Mismatch


class Target(NamedTuple):
    backend: str
    device: torch.device

    def __str__(self) -> str:
        return f"{self.backend} on {self.device}"


@dataclass(frozen=True)
class Finding:
    """``error`` is in units of what rounding allows; None where a check has no such number or did not get that far."""

    backend: str
    device: str
    kind: str
    inputs: str
    error: float | None
    problem: str | None

    def __str__(self) -> str:
        return f"{self.backend} on {self.device}: {', '.join(filter(None, (self.kind, self.inputs)))}: {self.problem}"


@dataclass
class Findings:
    """What was found so far; ``lost`` are targets on a device that answers no more."""

    targets: list[Target]
    checks: list[Finding] = field(default_factory=list)
    lost: set[Target] = field(default_factory=set)

    def run(self, target: Target, kind: str, inputs: str, call: Callable[[], float | None]) -> None:
        """Make one check: ``call`` returns an error or None, or raises."""
        if target in self.lost:
            return
        error, problem = None, None
        try:
            error = call()
        except Mismatch as wrong:
            problem = str(wrong)
        except Exception as raised:  # whatever a backend raises is what we are here to find
            problem = f"raised {type(raised).__name__}: {str(raised).strip() or 'no message'}"
        self._add(target, kind, inputs, error, problem)
        if problem is not None and target.device.type == "cuda":
            self._note_a_lost_device(target)

    def of(self, target: Target) -> list[Finding]:
        return [check for check in self.checks if (check.backend, check.device) == (target.backend, str(target.device))]

    @property
    def failed(self) -> list[Finding]:
        return [check for check in self.checks if check.problem is not None]

    def _note_a_lost_device(self, culprit: Target) -> None:
        """An illegal access, say, ends a process's use of its GPU: what came after would blame the innocent."""
        try:
            torch.cuda.synchronize(culprit.device)
        except Exception as error:
            reason = f"{str(error).splitlines()[0]}; the GPU is lost to this process since {culprit} failed"
            for target in self.targets:
                if target.device.type == "cuda" and target not in self.lost:
                    self.lost.add(target)
                    self._add(target, "the rest", "", None, f"not checked: {reason}. Try --backend {target.backend}")

    def _add(self, target: Target, kind: str, inputs: str, error: float | None, problem: str | None) -> None:
        self.checks.append(Finding(target.backend, str(target.device), kind, inputs, error, problem))
