"""Evidence level G3: what the CUDA kernels' machine code has and has not, for every architecture that setup.py builds by default.

What is read is the installed extension, compiled by setup.py with every warning an error; where it lacks an architecture or is
older than the sources, they are compiled here, with the same flags. No device is needed, nor is anything run.

That each element is read once and written once is counted so. A kernel whose threads hold K elements of a row in vectors of
four has K/4 loads of logits and K/4 of pseudo-logits, of 128 bits for float32 and, in their place, as many of 64 bits for the
other dtypes; K/4 stores of either. The loads of a row stand in one block of instructions without a jump, and none waits for
another. Kernels that go one by one have K accesses of 32 or 16 bits in their place. Rows too long for registers are read twice,
for mse three times. How often each element is really touched tests/test_cuda.py counts when it runs these sources in the
harness.
"""

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from bench import occupancy
from bench.occupancy import Template
from r2d2fast.cuda_toolkit import find_cuda_tool
from r2d2fast.options import CLASS_LOSSES
from tests import sass
from tests.cases import slow_but
from tests.mutants import mutate
from tests.sass import Code, Instruction, destination

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "csrc/d2_cuda.cu"
ARCHS = (80, 90, 100)
"""setup.py's, where there is no GPU."""
SHAPES = {(4, 4), (8, 8), (16, 8), (32, 8), (32, 16), (32, 32), (128, 16), (256, 16), (512, 16)}

LOAD, STORE = "LDG.E.128", "STG.E.128"
SMALL = 125 * 1024
"""Bytes that the machine code of the default loss may have, in vectors. It was up to 358 KB with every loss and access."""


def missing() -> str | None:
    for name in ("cuobjdump", "nvdisasm"):
        if find_cuda_tool(name) is None:
            return f"no {name}: neither a CUDA toolkit nor Triton's wheel is here"
    if occupancy.library() is None:
        return "r2d2fast._cuda is not installed"
    return None


pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


# ------------------------------------------------------------------------------------------- what must hold


def defects(code: Code) -> Iterator[str]:
    """What is wrong with a kernel, in words."""
    yield from on_the_stack(code)
    yield from unlike_rows(code)
    exponentials = sum(instruction.opcode == "MUFU.EX2" for instruction in code.instructions())
    # Once for each element of two rows, where what the sums took is kept for the derivatives.
    if code.kernel.template and exponentials < 2 * code.kernel.template.elements:
        yield f"{exponentials} MUFU.EX2"
    size = 16 * sum(1 for _ in code.instructions())
    step = code.kernel.template
    if step and step.vector == 4 and step.class_loss == "kl_reverse" and size > SMALL:
        yield f"{size} bytes of machine code"


def on_the_stack(code: Code) -> Iterator[str]:
    kernel = code.kernel
    if kernel.stack or kernel.local:
        yield f"a stack of {kernel.stack} and local memory of {kernel.local} bytes"
    for instruction in (*code.instructions(), *code.called):
        # Through an address of any kind, LD and ST may reach local memory; those of global memory are LDG and STG.
        if instruction.opcode.split(".")[0] in ("LDL", "STL", "LD", "ST"):
            yield instruction.text
        if instruction.opcode.startswith(("LDG", "STG")) and ".E" not in instruction.opcode:
            yield f"no 64-bit address: {instruction.text}"


def unlike_rows(code: Code) -> Iterator[str]:
    """Vector accesses of a row, as many as it has, and the loads of both rows all issued before one is waited for."""
    step = code.kernel.template
    if step is None or step.vector == 1:
        return
    passes = 1 if not step.long else 3 if step.class_loss == "mse" else 2
    stored = sum(instruction.opcode == STORE for instruction in code.instructions())
    if stored != 2 * step.elements // 4:
        yield f"{stored} {STORE}, where two rows of {step.elements} elements are stored"
    blocks = [block for block in code.blocks.values() if any(i.opcode == LOAD for i in block.instructions)]
    counts = Counter(sum(i.opcode == LOAD for i in block.instructions) for block in blocks)
    # The search asks for four vectors of the index at a time, before its loop and in it.
    wanted = Counter({step.elements // 4: 2 * passes}) + Counter({4: 2})
    if step.elements == 8 and counts == Counter({1: 4}) + Counter({4: 2}):
        # For sm_100 the compiler jumps over the second vector of a row where it is not there; still nothing waits in between.
        loads = [number for number, block in enumerate(code.blocks.values()) if block in blocks]
        between = list(code.blocks.values())[loads[-4] : loads[-1] + 1]
        yield from waits([instruction for block in between for instruction in block.instructions])
    elif counts != wanted:
        yield f"{LOAD} in blocks of {sorted(counts.elements())}, not {sorted(wanted.elements())}"
    for block in blocks:
        at = [number for number, instruction in enumerate(block.instructions) if instruction.opcode == LOAD]
        yield from waits(block.instructions[at[0] : at[-1] + 1])


def waits(instructions: list[Instruction]) -> Iterator[str]:
    """Instructions that use what a load among those before them fills."""
    filled: set[str] = set()
    for instruction in instructions:
        if any(register in filled for register in re.findall(r"\bR\d+\b", instruction.text)):
            yield f"waits for a load: {instruction.text}"
        if instruction.opcode == LOAD:
            filled |= destination(instruction)


# ------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The cubins of the installed extension, none if it is older than the sources."""
    library = occupancy.library()
    assert library
    if library.stat().st_mtime < max(path.stat().st_mtime for path in sass.included(SOURCE)):
        return {}
    return sass.extract(library, tmp_path_factory.mktemp("cubins"))


@pytest.fixture(scope="module")
def cache(request: pytest.FixtureRequest) -> Path:
    return request.config.cache.mkdir("cubins")


@pytest.fixture(scope="module", params=slow_but(ARCHS, (90,)), ids="sm_{}".format)
def kernels(request: pytest.FixtureRequest, installed: dict[int, Path], cache: Path) -> list[Code]:
    """Of one architecture, all of them."""
    arch = request.param
    if arch not in installed and (reason := sass.cannot_compile(arch)):
        pytest.skip(f"the installed r2d2fast._cuda has no sm_{arch}, or is older than its sources, and {reason}")
    return sass.read(installed.get(arch) or sass.compile_cubin(SOURCE, arch, cache))


def test_every_kernel_is_there(kernels: list[Code]) -> None:
    steps = {
        Template(*shape, vector, long, loss)
        for shape, long in [*((shape, False) for shape in SHAPES), ((512, 16), True)]
        for vector, loss in itertools.product((1, 4), CLASS_LOSSES)
    }
    assert {code.kernel.template for code in kernels} == {*steps, None}
    assert len(kernels) == len(steps) + 4, "predict and scale, by vectors and one by one"


def test_machine_code(kernels: list[Code]) -> None:
    found = {code.kernel.name: list(defects(code))[:5] for code in kernels}
    assert not any(found.values()), {name: wrong for name, wrong in found.items() if wrong}


def test_later_devices_are_served(installed: dict[int, Path]) -> None:
    """The last architecture is there as PTX, too, which the driver compiles for any later one."""
    if not installed:
        pytest.skip("the installed r2d2fast._cuda is older than its sources")
    library = occupancy.library()
    assert library
    assert sass.ptx(library) == [max(installed)]


class Mutant(NamedTuple):
    file: str
    right: str
    wrong: str
    complaint: str


STEP, SLICE = "d2_cuda_step.h", "d2_cuda_slice.h"
FETCH = "fetched.vectors[k / kVector] = InFlight<Words>(reinterpret_cast<const Words*>(row.data + int64_t(at) * 4));"
BOTH = "arrive(x_coming, logits, slice, x); if (!with"
MUTANTS = {
    "half the registers": Mutant(STEP, "? 512 : 384", "? 1024 : 768", "a stack of"),
    "an index only the device knows": Mutant(
        STEP, BOTH, f"x[a.batch.size % kElements] += 1; {BOTH}", "a stack of"
    ),
    "written one by one": Mutant(
        SLICE,
        "*reinterpret_cast<float4*>(data) = {in[k], in[k + 1], in[k + 2], in[k + 3]};",
        "for (int e = 0; e < 4; ++e) data[e] = in[k + e];",
        f"0 {STORE}",
    ),
    "one load waits for another": Mutant(
        SLICE,
        FETCH,
        f"{{ {FETCH} const_cast<RowAt&>(row).data += fetched.vectors[k / kVector].get().x & 4; }}",
        "waits for a load|in blocks of",
    ),
    "a row read again": Mutant(
        STEP, "derive<L>(team, row, largest, x, y); if",
        "__threadfence(); load(logits_row(a.batch, a.bank, i), slice, x); derive<L>(team, row, largest, x, y); if",
        f"{LOAD} in blocks of",
    ),
}  # fmt: skip


def compile_mutant(name: str, folder: Path, cache: Path) -> Path:
    """One kernel, with 16 elements a thread, which takes two seconds; under a name that is no mutant's, as it is."""
    for path in sass.included(SOURCE) - {SOURCE}:
        mutant, text = MUTANTS.get(name), path.read_text()
        if mutant is not None and mutant.file == path.name:
            text = mutate(text, mutant.right, mutant.wrong)
        (folder / path.name).write_text(text)
    source = folder / "one.cu"
    source.write_text(
        '#include "d2_cuda_step.h"\n'
        "template __global__ void r2d2::step_kernel<r2d2::ClassLoss::kl_reverse, 32, 16, 4, false>"
        "(const __grid_constant__ r2d2::StepArguments);\n"
    )
    return sass.compile_cubin(source, 90, cache)


@pytest.fixture(scope="module")
def mutants(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    if reason := sass.cannot_compile(90):
        pytest.skip(reason)
    names = ["right", *MUTANTS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cubins = pool.map(lambda name: compile_mutant(name, tmp_path_factory.mktemp("mutant"), cache), names)
        return dict(zip(names, cubins, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_each_defect_is_found(mutants: dict[str, Path], name: str) -> None:
    (code,) = sass.read(mutants[name])
    found = list(defects(code))
    assert any(re.search(MUTANTS[name].complaint, defect) for defect in found), found[:5]


@pytest.mark.slow
def test_no_defect_is_made_up(mutants: dict[str, Path]) -> None:
    (code,) = sass.read(mutants["right"])
    assert list(defects(code)) == []
