"""The doctor's command line. Each section of the report is printed as soon as it is known."""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import tyro
from rich.console import Console

from r2d2fast import BackendError, backends, d2_step, machine
from r2d2fast._backends import NAMES, choose
from r2d2fast.command import as_called
from r2d2fast.doctor import text
from r2d2fast.doctor.behaviour import CHECKS
from r2d2fast.doctor.findings import Findings, Target
from r2d2fast.doctor.inputs import StepInputs, step_inputs
from r2d2fast.doctor.speed import Speed, measure, workloads
from r2d2fast.help_texts import with_help_texts
from r2d2fast.testing import Expected, compare, expect

PROGRAM = as_called("doctor")
STDOUT = "-"
DESCRIPTION = f"""What is installed, whether each backend agrees with the definition in float64, and how fast it is here.

Examples:
  {PROGRAM}                         everything
  {PROGRAM} --quick                 a tenth of the checks, one shape timed
  {PROGRAM} --json report.json      the report here, and all that was found in the file
  {PROGRAM} --json > report.json    JSON, and nothing else, on standard output
  {PROGRAM} --device cuda:1 --backend triton

Exit status: 0 if every backend examined is right, 1 if one is not, 2 for a wrong command line."""

_ON_CPU = ("reference", "cpu")
"""Triton's interpreter would take hours: it has to be asked for."""


@with_help_texts
@dataclasses.dataclass(frozen=True)
class Arguments:
    quick: bool = False
    """Make fewer checks and time one shape, for a first look."""

    json: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[FILE]")] = None
    """Write every finding as JSON to FILE as well; without FILE, write it to standard output and print nothing else."""

    device: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DEVICE [DEVICE ...]")] = ()
    """Devices to examine the backends on. The default is cpu, and cuda:0 where PyTorch finds a GPU."""

    backend: Annotated[tuple[str, ...], tyro.conf.arg(metavar="BACKEND [BACKEND ...]")] = ()
    """Backends to examine: reference, cpu, cuda, triton. The default is all that are available, except Triton's
    interpreter on CPU tensors."""


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line (default: the process's), examine the backends, and return the exit status."""
    chosen = tyro.cli(
        Arguments, args=arguments, prog=PROGRAM, description=DESCRIPTION, config=(tyro.conf.FlagCreatePairsOff,)
    )
    output = None if chosen.json is None else _json_output(chosen.json)
    devices = [_device(name) for name in chosen.device]
    for name in chosen.backend:
        if name not in NAMES:
            _refuse(f"--backend {name}: unknown; accepted: {', '.join(NAMES)}")
    console = Console(quiet=output == STDOUT, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = 130
    about, statuses = machine.describe() | machine.describe_toolchain(), backends()
    text.print_environment(console, about)
    text.print_backends(console, statuses)
    devices = devices or [torch.device("cpu"), *([torch.device("cuda:0")] if about["gpus"] else [])]
    why_not = {
        Target(name, device): _why_not(name, device)
        for device in devices
        for name in chosen.backend or (NAMES if device.type == "cuda" else _ON_CPU)
    }
    targets = [target for target, reason in why_not.items() if reason is None]
    if not targets:
        _refuse("; ".join(str(reason) for reason in why_not.values()))

    findings = Findings(targets)
    with console.status("checking") as status:
        for inputs in step_inputs(chosen.quick):
            status.update(f"checking: {inputs}")
            expected = _expected(inputs)
            for target in targets:
                findings.run(target, inputs.kind, inputs.summary, partial(_error, inputs, expected, target))
        for kind, check in CHECKS.items():
            status.update(f"checking: {kind}")
            for target in targets:
                findings.run(target, kind, "", partial(check, *target))
    text.print_checks(console, findings)

    speeds: list[Speed] = []
    with console.status("timing") as status:
        for target in targets:
            for shape, dtype in workloads(target.device, chosen.quick):
                status.update(f"timing: {target}, {shape[0]} x {shape[1]}, {dtype}")
                work = partial(measure, *target, shape, dtype, chosen.quick)
                findings.run(target, "timing", f"{shape[0]} x {shape[1]}, {dtype}", lambda: speeds.append(work()))  # noqa: B023
    text.print_speeds(console, speeds)
    text.print_verdict(console, findings)

    if output is not None:
        result = {
            "passed": not findings.failed,
            "quick": chosen.quick,
            "environment": about,
            "backends": {name: status._asdict() for name, status in statuses.items()},
            "examined": [str(target) for target in targets],
            "checks": [dataclasses.asdict(check) for check in findings.checks],
            "speed": [dataclasses.asdict(speed) | {"gb_per_second": speed.gb_per_second} for speed in speeds],
        }
        content = json.dumps(result, indent=1, allow_nan=False)
        if output == STDOUT:
            print(content)
        else:
            Path(output).write_text(content + "\n")
    return 1 if findings.failed else 0


def _expected(inputs: StepInputs) -> Expected:
    cpu = torch.device("cpu")
    return expect(*inputs.batch_on(cpu), inputs.bank(cpu), **inputs.options(cpu))


def _error(inputs: StepInputs, expected: Expected, target: Target) -> float:
    bank = inputs.bank(target.device)
    batch, options = inputs.batch_on(target.device), inputs.options(target.device)
    return compare(expected, *d2_step(*batch, bank, backend=target.backend, **options), bank)


def _refuse(problem: str) -> NoReturn:
    print(f"{PROGRAM}: {problem}", file=sys.stderr)
    sys.exit(2)


def _json_output(words: tuple[str, ...]) -> str:
    """The file of ``--json``, or STDOUT. It is opened now, and not only when the work of minutes is to be written."""
    file, *others = words or (STDOUT,)
    if others:
        _refuse(f"--json {' '.join(words)}: name one file")
    try:
        if file != STDOUT:
            Path(file).open("a").close()
    except OSError as error:
        _refuse(f"--json {file}: cannot write {file}: {error.strerror}")
    return file


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        _refuse(f"--device {name}: PyTorch cannot use device {name!r}: {reason}")
    if device.type not in ("cpu", "cuda"):
        _refuse(f"--device {name}: no backend has kernels for {name!r}; pass cpu or cuda:N")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _why_not(backend: str, device: torch.device) -> str | None:
    one = torch.empty(1, 2, device=device)
    try:
        choose(backend, one, one)
    except BackendError as error:
        return str(error)
    return None
