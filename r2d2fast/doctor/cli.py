"""The doctor's command line: every part is printed as soon as it is known."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from r2d2fast import BackendError, backends
from r2d2fast._backends import NAMES, choose
from r2d2fast.doctor import environment, text
from r2d2fast.doctor.cases import cases
from r2d2fast.doctor.compare import judge, settle
from r2d2fast.doctor.examination import Examination, Target
from r2d2fast.doctor.rules import RULES
from r2d2fast.doctor.speed import Speed, measure, workloads

_EXAMPLES = """examples:
  python -m r2d2fast.doctor                        everything
  python -m r2d2fast.doctor --quick                a tenth of the checks, one shape timed
  python -m r2d2fast.doctor --json report.json     text here, and all that was found in the file
  python -m r2d2fast.doctor --json > report.json   JSON, and nothing else, on standard output
  python -m r2d2fast.doctor --device cuda:1 --backend triton

exit status: 0 if every backend examined is right, 1 if one is not, 2 for a wrong command line"""


_ON_CPU = ("reference", "cpu")
"""Triton's interpreter would take hours: it has to be asked for."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console(quiet=options.json == "-", highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = 130
    about, statuses = environment.describe(), backends()
    text.print_environment(console, about)
    text.print_backends(console, statuses)
    devices = options.device or [torch.device("cpu"), *([torch.device("cuda:0")] if about["gpus"] else [])]
    why_not = {
        Target(name, device): _why_not(name, device)
        for device in devices
        for name in options.backend or (NAMES if device.type == "cuda" else _ON_CPU)
    }
    targets = [target for target, reason in why_not.items() if reason is None]
    if not targets:
        _parser().error("; ".join(str(reason) for reason in why_not.values()))

    examination = Examination(targets)
    with console.status("checking") as status:
        for case in cases(options.quick):
            status.update(f"checking: {case}")
            exact = settle(case)
            for target in targets:
                examination.run(target, case.kind, case.inputs, partial(judge, case, exact, *target))
        for kind, rule in RULES.items():
            status.update(f"checking: {kind}")
            for target in targets:
                examination.run(target, kind, "", partial(rule, *target))
    text.print_checks(console, examination)

    speeds: list[Speed] = []
    with console.status("timing") as status:
        for target in targets:
            for shape, dtype in workloads(target.device, options.quick):
                status.update(f"timing: {target}, {shape[0]} x {shape[1]}, {dtype}")
                work = partial(measure, *target, shape, dtype, options.quick)
                examination.run(target, "timing", f"{shape[0]} x {shape[1]}, {dtype}", lambda: speeds.append(work()))  # noqa: B023
    text.print_speeds(console, speeds)
    text.print_verdict(console, examination)

    if options.json is not None:
        result = {
            "passed": not examination.failed,
            "quick": options.quick,
            "environment": about,
            "backends": {name: status._asdict() for name, status in statuses.items()},
            "examined": [str(target) for target in targets],
            "checks": [dataclasses.asdict(check) for check in examination.checks],
            "speed": [dataclasses.asdict(speed) | {"gb_per_second": speed.gb_per_second} for speed in speeds],
        }
        _write(options.json, json.dumps(result, indent=1, allow_nan=False))
    return 1 if examination.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m r2d2fast.doctor",
        description="What is installed, whether each backend agrees with the definition in float64, and how fast it is here.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer checks, one shape timed: for a first look")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        type=_file,
        metavar="FILE",
        help="write every finding to FILE as well; without FILE: to stdout, alone",
    )
    parser.add_argument(
        "--device", nargs="+", type=_device, metavar="DEVICE", help="default: cpu, and cuda:0 where PyTorch finds a GPU"
    )
    parser.add_argument(
        "--backend", nargs="+", choices=NAMES, help="default: all that are available, but for Triton's interpreter"
    )
    return parser


def _file(name: str) -> str:
    try:
        if name != "-":
            Path(name).open("a").close()  # now, and not when the work of minutes is to be written
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {name}: {error.strerror}") from error
    return name


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise argparse.ArgumentTypeError(f"PyTorch cannot use device {name!r}: {reason}") from error
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"no backend has kernels for {name!r}; pass cpu or cuda:N")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _why_not(backend: str, device: torch.device) -> str | None:
    one = torch.empty(1, 2, device=device)
    try:
        choose(backend, one, one)
    except BackendError as error:
        return str(error)
    return None


def _write(file: str, content: str) -> None:
    if file == "-":
        print(content)
    else:
        Path(file).write_text(content + "\n")
