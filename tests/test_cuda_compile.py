"""Evidence level G3: what the CUDA kernels' machine code has and has not, for every architecture that setup.py builds by default.

What is read is the installed extension, compiled by setup.py with every warning an error; where it lacks an architecture or is
older than the sources, they are compiled here, with the same flags. No device is needed, nor is anything run.

That each element is read once and written once is counted so. In the code of a kernel whose threads hold K elements of a row
there are 3 loads of a row: logits, pseudo-logits, and the logits of a sample's next occurrence in the batch. Each is there for
float32 with K/4 accesses of 128 bits and for 16-bit rows with K/8 (beside a 16-bit row, one of float32 takes K/4, and the
16-bit one K/4 of 64 bits). They stand in one block of instructions without a jump, none waits for another, and the first two
are in no loop, the third in one only, that of the occurrences. So are the stores of gradient and pseudo-logits. Rows too long
for registers are read in a loop more, twice, for mse three times. How often each element is really touched, heads and tails
included, tests/test_cuda.py counts when it runs these sources in the harness.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from bench import occupancy
from bench.occupancy import Kernel
from r2d2fast.cuda_toolkit import find_cuda_tool
from tests import sass
from tests.cases import slow_but
from tests.mutants import mutate
from tests.sass import Code, destination

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "csrc/d2_cuda.cu"
ARCHS = (80, 90, 100)
"""setup.py's, where there is no GPU."""
STEPS = {(2, 8), (4, 8), (8, 8), (16, 8), (32, 8), (32, 16), (32, 32), (128, 16), (256, 16), (512, 16)}

LOAD, STORE = "LDG.E.128", "STG.E.128"


def missing() -> str | None:
    for name in ("cuobjdump", "nvdisasm"):
        if find_cuda_tool(name) is None:
            return f"no {name}: neither a CUDA toolkit nor Triton's wheel is here"
    if occupancy.library() is None:
        return "r2d2fast._cuda is not installed"
    return None


pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


# ------------------------------------------------------------------------------------------- what must hold


class Rows(NamedTuple):
    """Loads and stores of a whole row in the code, each as the number of loops that it is in."""

    loads: tuple[int, ...]
    stores: tuple[int, ...]
    elements: int


def rows_of(kernel: Kernel) -> Rows:
    if kernel.template:
        elements = kernel.template[1]
        return Rows((2,) * 6, (2, 2), elements) if kernel.template[2] else Rows((0, 0, 1), (1, 1), elements)
    return {"scale": Rows((1,), (1,), 8), "predict": Rows((1, 1), (1,), 8)}[kernel.name]


def defects(code: Code) -> Iterator[str]:
    """What is wrong with a kernel, in words."""
    yield from on_the_stack(code)
    yield from unlike_rows(code)
    exponentials = sum(instruction.opcode == "MUFU.EX2" for instruction in code.instructions())
    # Once for each element of two rows, where what the sums took is kept for the derivatives.
    if code.kernel.template and exponentials < 2 * code.kernel.template[1]:
        yield f"{exponentials} MUFU.EX2"


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
    """Vector accesses of a row, as many as it has and in as few loops; its loads all issued before one is waited for."""
    rows, loops = rows_of(code.kernel), sass.loops(code.blocks)
    loads: Counter[tuple[int, int]] = Counter()
    stores: Counter[int] = Counter()
    for name, block in code.blocks.items():
        depth = sum(name in loop for loop in loops)
        at = [number for number, instruction in enumerate(block.instructions) if instruction.opcode == LOAD]
        stored = sum(instruction.opcode == STORE for instruction in block.instructions)
        if stored:
            stores[depth] += stored
        if not at:
            continue
        loads[len(at), depth] += 1
        filled: set[str] = set()
        for instruction in block.instructions[at[0] : at[-1] + 1]:
            if any(register in filled for register in re.findall(r"\bR\d+\b", instruction.text)):
                yield f"waits for a load before the last of {len(at)} in {name}: {instruction.text}"
            if instruction.opcode == LOAD:
                filled |= destination(instruction)
    widths = (rows.elements // 4, rows.elements // 8)
    wanted = Counter((width, depth) for depth in rows.loads for width in widths)
    if loads != wanted:
        yield f"{LOAD} in blocks of (count, loops) {sorted(loads.elements())}, not {sorted(wanted.elements())}"
    if stores != Counter(depth for depth in rows.stores for _ in range(sum(widths))):
        yield f"{STORE} by loops {dict(stores)}, where rows of {rows.elements} elements are stored in {rows.stores}"


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
    names = sorted(code.kernel.name for code in kernels)
    steps = [f"step {threads} x {elements}" for threads, elements in STEPS]
    assert names == sorted([*steps, "step 512 x 16 long", "predict", "scale"])


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
VECTOR_LOAD = "pack.vector = *reinterpret_cast<const Vector*>(data + first);"
VECTOR_STORE = "*reinterpret_cast<Vector*>(data + first) = pack.vector;"
FIRST_LOAD = "load(logits_row(a.batch, a.bank, sample.occurrences.first), slice, x);"
GRADIENT = "derive(loss, team, row, largest, x, y); if"
MUTANTS = {
    "half the registers": Mutant(STEP, "? 384 : 512)", "? 384 : 1024)", "a stack of"),
    "an index only the device knows": Mutant(
        STEP, FIRST_LOAD, f"{FIRST_LOAD} x[a.batch.size % kElements] += 1;", "a stack of"
    ),
    "read one by one": Mutant(
        SLICE,
        VECTOR_LOAD,
        "for (int e = 0; e < kVector; ++e) pack.element[e] = data[first + e];",
        f"{LOAD} in blocks of",
    ),
    "written one by one": Mutant(
        SLICE, VECTOR_STORE, "for (int e = 0; e < kVector; ++e) data[first + e] = pack.element[e];", f"{STORE} by loops"
    ),
    "one load waits for another": Mutant(
        SLICE, VECTOR_LOAD, f"{{ {VECTOR_LOAD} data += pack.element[0] & 4; }}", "waits for a load"
    ),
    "a row read again": Mutant(
        STEP,
        GRADIENT,
        f"__threadfence(); load(logits_row(a.batch, a.bank, i), slice, x); {GRADIENT}",
        f"{LOAD} in blocks of",
    ),
    "a row read in a loop": Mutant(
        STEP,
        FIRST_LOAD,
        f"for (int n = 0; n < a.bank.classes; ++n) {{ __threadfence(); {FIRST_LOAD} }}",
        f"{LOAD} in blocks of",
    ),
}


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
        "template __global__ void r2d2::step_kernel<32, 16, false>(const __grid_constant__ r2d2::StepArguments);\n"
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
    assert any(MUTANTS[name].complaint in defect for defect in found), found[:5]


@pytest.mark.slow
def test_no_defect_is_made_up(mutants: dict[str, Path]) -> None:
    (code,) = sass.read(mutants["right"])
    assert list(defects(code)) == []
