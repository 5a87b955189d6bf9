"""``python -m bench.occupancy``: what the installed CUDA kernels' machine code needs, and how much of it fits on a
multiprocessor (SM); and what the step would cost on devices nobody here has measured: a prediction, and labelled as one."""

import importlib.util
import math
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tyro

from r2d2fast.cuda_toolkit import find_cuda_tool
from r2d2fast.options import CLASS_LOSSES
from r2d2fast.tables import markdown_table

WARP = 32
SUB_PARTITIONS = 4
REGISTER_UNIT = 256
"""Registers are given to a warp in pieces of this size, from one of the SM's four parts (CUDA toolkit, cuda_occupancy.h)."""


_EACH = {4: "", 1: " one by one"}


class Template(NamedTuple):
    """Which step a kernel is of."""

    threads: int
    """Of a row."""
    elements: int
    """Of a thread."""
    vector: int
    """Elements of an access."""
    long: bool
    """Rows of any length."""
    class_loss: str


class Limits(NamedTuple):
    warps: int
    blocks: int
    shared: int
    """Bytes of an SM, of which the driver keeps `reserved` for each block."""
    reserved: int = 1024
    shared_unit: int = 128
    registers: int = 65536


LIMITS = {
    75: Limits(32, 16, 64 * 1024, reserved=0, shared_unit=256),
    80: Limits(64, 32, 164 * 1024),
    86: Limits(48, 16, 100 * 1024),
    89: Limits(48, 24, 100 * 1024),
    90: Limits(64, 32, 228 * 1024),
    100: Limits(64, 32, 228 * 1024),
    120: Limits(48, 24, 100 * 1024),
}
"""An SM of each compute capability: CUDA C++ Programming Guide, "Compute Capabilities", "Technical Specifications per Compute
Capability", https://docs.nvidia.com/cuda/cuda-c-programming-guide/#features-and-technical-specifications."""


class Device(NamedTuple):
    name: str
    arch: int
    sms: int
    bandwidth: float


DEVICES = (
    Device("A100 SXM 80GB", 80, 108, 2.039e12),
    Device("H100 SXM", 90, 132, 3.35e12),
    Device("B200", 100, 148, 8e12),
)
"""NVIDIA's data sheets: bytes per second of DRAM, as published and never reached."""

LATENCIES = (600e-9, 800e-9)
"""Seconds that a DRAM read takes: the range that microbenchmarks of such devices report, and that is assumed here."""

BATCH, CLASSES = 1024, 1000
PREDICTED = Template(32, 32, 4, False, "kl_reverse")
DTYPES = {"float32": (4, 4), "bfloat16 / float32 bank": (2, 4)}
"""Bytes of a logit and of a pseudo-logit: each is read once and written once."""


class Kernel(NamedTuple):
    """What the machine code of one kernel asks of an SM."""

    arch: int
    symbol: str
    registers: int
    stack: int
    shared: int
    local: int

    @property
    def template(self) -> Template | None:
        """None for a kernel that is not the step's."""
        found = re.search(r"step_kernelIL\w+?ClassLossE(\d)ELi(\d+)ELi(\d+)ELi(\d)ELb([01])E", self.symbol)
        if not found:
            return None
        loss, threads, elements, vector, long = map(int, found.groups())
        return Template(threads, elements, vector, bool(long), CLASS_LOSSES[loss])

    @property
    def name(self) -> str:
        if self.template:
            threads, elements, vector, long, loss = self.template
            return f"step {threads} x {elements}{' long' if long else ''}{_EACH[vector]}, {loss}"
        found = re.search(r"\d(predict|scale)_kernelILi(\d)E", self.symbol)
        return f"{found[1]}{_EACH[int(found[2])]}" if found else self.symbol

    @property
    def vector(self) -> int:
        return self.template.vector if self.template else 4

    @property
    def threads(self) -> int:
        return max(128, self.template.threads if self.template else 0)

    @property
    def loads(self) -> int:
        """Loads of one row that a thread has under way at a time."""
        return self.template.elements // self.template.vector if self.template else 2

    @property
    def classes(self) -> str:
        if not self.template:
            return "any"
        threads, elements, _, long, _ = self.template
        return f"> {threads * elements}" if long else f"≤ {threads * elements}"


class Occupancy(NamedTuple):
    blocks: int
    warps: int
    limit: str


def occupancy(kernel: Kernel) -> Occupancy:
    """Blocks and warps that an SM holds at a time, as cuda_occupancy.h counts them, with all of its memory as shared memory."""
    limits = LIMITS[kernel.arch]
    warps = math.ceil(kernel.threads / WARP)
    registers = _round_up(kernel.registers * WARP, REGISTER_UNIT)
    # From sm_90 on the cubin counts the reserved bytes in.
    reserved = 0 if kernel.arch >= 90 else limits.reserved
    shared = _round_up(kernel.shared + reserved, limits.shared_unit)
    bounds = {
        "registers": limits.registers // SUB_PARTITIONS // registers * SUB_PARTITIONS // warps,
        "shared memory": limits.shared // shared if shared else limits.blocks,
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
    }
    limit = min(bounds, key=lambda name: bounds[name])
    return Occupancy(bounds[limit], bounds[limit] * warps, limit)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


# ------------------------------------------------------------------------------------------- what the machine code says


def library() -> Path | None:
    """The installed r2d2fast._cuda."""
    found = importlib.util.find_spec("r2d2fast._cuda")
    return Path(found.origin) if found and found.origin else None


def kernels(binary: Path, arch: int = 0) -> list[Kernel]:
    """Every kernel of every architecture that a library has machine code for; a cubin is of one, and does not say which."""
    cuobjdump = find_cuda_tool("cuobjdump")
    assert cuobjdump, "no cuobjdump"
    text = subprocess.run([cuobjdump, "-res-usage", str(binary)], check=True, capture_output=True, text=True).stdout
    result = []
    for line in re.finditer(r"^arch = sm_(\d+)|Function (\S+):\s+(REG:.*)$", text, re.MULTILINE):
        if line[1]:
            arch = int(line[1])
        else:
            used = {name: int(count) for name, count in re.findall(r"(\w+):(\d+)", line[3])}
            result.append(Kernel(arch, line[2], used["REG"], used["STACK"], used["SHARED"], used["LOCAL"]))
    return result


# ------------------------------------------------------------------------------------------- tables


def occupancy_table(found: list[Kernel]) -> str:
    """A row for each kernel. Where a figure differs between architectures, the cell has one for each of them."""
    archs = sorted({kernel.arch for kernel in found})
    names = sorted({kernel.name: kernel for kernel in found}.values(), key=_order)
    rows = []
    for name in (kernel.name for kernel in names):
        built = sorted((kernel for kernel in found if kernel.name == name), key=lambda kernel: kernel.arch)
        fits = [occupancy(kernel) for kernel in built]
        columns = (
            [kernel.registers for kernel in built],
            [kernel.stack + kernel.local for kernel in built],
            [kernel.shared for kernel in built],
            [kernel.threads for kernel in built],
            [there.blocks for there in fits],
            [f"{there.warps} of {LIMITS[kernel.arch].warps}" for kernel, there in zip(built, fits, strict=True)],
            [there.limit for there in fits],
            [
                there.warps * WARP * kernel.loads * (16 if kernel.vector > 1 else 4) // 1024
                for kernel, there in zip(built, fits, strict=True)
            ],
        )
        rows.append((name, built[0].classes, *(_each(column) for column in columns)))
    kernel = f"kernel (sm_{', '.join(map(str, archs))})"
    header = (kernel, "N", "registers", "local bytes", "shared bytes", "threads", "blocks/SM", "warps/SM", "limit")
    return markdown_table((*header, "KiB in flight/SM"), rows)


def _order(kernel: Kernel) -> tuple[bool, bool, int, int, int, str]:
    threads, elements, vector, long, _ = kernel.template or Template(0, 0, 0, False, "")
    return kernel.template is None, long, threads, elements, vector, kernel.name


def _each(values: Sequence[object]) -> str:
    return ", ".join(map(str, values)) if len(set(values)) > 1 else str(values[0])


def prediction_table(found: list[Kernel]) -> str:
    rows = []
    for device in DEVICES:
        kernel = next((k for k in found if k.arch == device.arch and k.template == PREDICTED), None)
        if kernel is None:
            continue
        rows_a_block = kernel.threads // WARP
        blocks = BATCH / rows_a_block / device.sms
        # A block more on some of the SMs than on others: the average is what DRAM sees.
        warps = min(blocks * rows_a_block, occupancy(kernel).warps)
        needed = [device.bandwidth * latency / device.sms / 1024 for latency in LATENCIES]
        for dtype, (logit, pseudo) in DTYPES.items():
            bytes_a_step = 2 * BATCH * CLASSES * (logit + pseudo)
            flight = warps * WARP * kernel.loads * 4 * logit / 1024
            rows.append(
                (
                    device.name,
                    dtype,
                    f"{bytes_a_step / 1e6:.1f}",
                    f"{bytes_a_step / device.bandwidth * 1e6:.1f}",
                    f"{blocks / occupancy(kernel).blocks:.2f}",
                    f"{warps:.1f}",
                    f"{flight:.0f}",
                    f"{needed[0]:.0f} to {needed[1]:.0f}",
                )
            )
    columns = ("device", "dtype", "MB a step", "predicted µs, at least", "waves", "warps/SM")
    return markdown_table((*columns, "KiB in flight/SM", "KiB to fill DRAM"), rows)


_SHORTEST, _LONGEST = (f"{latency * 1e9:.0f}" for latency in LATENCIES)
EXPLANATION = f"""\
N: row lengths that take the kernel, where every row begins at a multiple of four elements; the kernels that go one by one take
the others. KiB in flight: warps x 32 x the loads of one float32 row, which a thread issues, as those of its second row, before it
waits for any.

PREDICTION, measured on none of these devices, for {BATCH} x {CLASSES}: the bytes that must cross DRAM over the published
bandwidth. A floor: no device reaches that bandwidth, a launch takes microseconds of its own, and a batch this small is one
wave or less (waves < 1), so that each warp waits for sample number, slot, logits and pseudo-logits one after the other, and
nothing hides it. Where a repeated step's rows stay in the L2 cache, it may be faster. KiB to fill DRAM: bandwidth x latency
/ SMs (Little's law), latency {_SHORTEST} to {_LONGEST} ns; KiB in flight: the logits of the warps that this batch gives an SM."""


def main() -> None:
    """What the installed CUDA kernels need of a multiprocessor, how much of it fits, and a prediction of the step's time."""
    binary = library()
    if binary is None:
        raise SystemExit("r2d2fast._cuda is not installed: pip install -e . where nvcc is found")
    if find_cuda_tool("cuobjdump") is None:
        raise SystemExit("no cuobjdump on PATH, under CUDA_HOME, nor in Triton's wheel")
    found = [kernel for kernel in kernels(binary) if kernel.arch in LIMITS]
    print(occupancy_table(found), EXPLANATION, prediction_table(found), sep="\n\n")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench.occupancy", config=(tyro.conf.FlagCreatePairsOff,))
