"""Bugs planted in a copy of the CUDA sources, of the kinds that only the harness can find: each of them is found.

Every barrier and every order of memory is dropped in turn, and every atomic is made a plain read and write. BUGS adds what
reads or writes outside a row, unaligned, at the same time as another thread, or once too often. All bugs are in one build, each
behind a switch, because a build takes longer than all the tests of it. What is wrong with a number is the business of
tests/test_step.py.
"""

import functools
import re
import shutil
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from r2d2fast import BackendError, d2_step
from r2d2fast.bank import DTYPES
from r2d2fast.testing import make_bank
from tests import test_cuda_failures
from tests.cuda_host.backend import CSRC, DEFINES, SOURCES, on_the_host
from tests.cuda_host.build import build, problem
from tests.cuda_host.host import ORDERS, Host
from tests.mutants import mutate
from tests.test_cuda import check_predict, check_scaled, check_step
from tests.test_cuda_failures import check_bad_index, check_target

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(problem() is not None, reason=f"the harness for CUDA sources {problem()}"),
]

F32, BF16, F16 = DTYPES


def check_overwritten(host: Host, order: str) -> None:
    """A row that is not finite, whose gradient overwrites the logits."""
    logits = torch.full((5, 100), float("inf"))
    with on_the_host(host, order):
        _, grad = d2_step(logits, torch.arange(5), make_bank(8, 100), out=logits, backend="cuda")
    assert grad.isnan().all()


Probe = Callable[[Host, str], None]


def probe(check: Callable, *arguments: object, **options: object) -> Probe:
    return lambda host, order: check(host, order, *arguments, **options)


# 10 classes are 32 rows a block, 1025 are a row a block of four warps. 100 go in vectors of four, the others one by one.
STEP, STEP_1025, STEP_100 = probe(check_step, 10), probe(check_step, 1025), probe(check_step, 100)
STEP_16_BITS = probe(check_step, 10, dtypes=(BF16, BF16))
DUPLICATES, FAR_APART = probe(check_step, 10, "duplicates"), probe(check_step, 1025, "duplicates", rows=300)
CROWDED, PADDED = probe(check_step, 10, "crowded", rows=603), probe(check_step, 33, "padded")
PREDICT = probe(check_predict, 10, "duplicates", (F32, F32))
NOT_FINITE = probe(test_cuda_failures.TestBadInputs().test_predictions_that_are_not_finite, 100, float("nan"))
BAD_INDEX, INDEX_M = probe(check_bad_index, 10, -1), probe(check_bad_index, 10, "size")

RACE = "with nothing to order the two"
UNWRITTEN = "nothing in this block has written"
UNALIGNED = "aligned to 16 bytes"


class Bug(NamedTuple):
    file: str
    right: str
    wrong: str
    """Where PLANTED is true while the bug is planted."""
    probe: Probe
    message: str
    """What the harness says, or what it has counted."""


TEAM, BATCH, SLICE, STEPS, LAUNCH = (f"d2_cuda{name}" for name in ("_team.h", "_batch.h", "_slice.h", "_step.h", ".cu"))
READ = "at < row.classes) fetched.vectors[k / kVector] = InFlight<Words>(reinterpret_cast<const Words*>"
WRITE = "if (at >= row.width) continue; uint16_t* data"
TICKET = "ticket.fetch_add(step.launch, cuda::memory_order_acq_rel)"
PAST = f"past its end|past the end|between two of its rows|{RACE}"
BUGS = {
    # Threads that meet, or do not.
    "a mask of the whole warp": Bug(
        TEAM, "mask_ = ((1u", "mask_ = PLANTED ? 0xFFFFFFFFu : ((1u", DUPLICATES, "which waits at|which has returned"
    ),
    "one copy of the partial sums": Bug(
        TEAM, "turn_ ^= 1;", "turn_ ^= !PLANTED;", probe(check_step, 1025, "crowded", rows=600), RACE
    ),
    "chains not cleared": Bug(BATCH, "heads_[h] = kNone;", "if (!PLANTED) heads_[h] = kNone;", STEP, UNWRITTEN),
    "duplicates not looked for": Bug(
        STEPS, "if (a.step.update) occ", "if (a.step.update && !PLANTED) occ", DUPLICATES, RACE
    ),
    "every prediction written": Bug(
        LAUNCH, "occurrences.last != i)", "(occurrences.last != i && !PLANTED))", PREDICT, RACE
    ),
    "summed by every block": Bug(
        BATCH, "== step.launch * gridDim.x;", "== step.launch * gridDim.x || PLANTED;", STEP, RACE
    ),
    "a ticket that is no atomic": Bug(
        BATCH, f"is_last = {TICKET}", f"is_last = (PLANTED ? (*step.status += step.launch) - step.launch : {TICKET})", STEP, RACE
    ),
    "step counted too early": Bug(
        STEPS,
        "if (!reports_last",
        "if (PLANTED && blockIdx.x + threadIdx.x == 0) *a.bank.updates += 1; if (!reports_last",
        STEP,
        rf"{RACE}|counts 2 updates instead of 1",
    ),
    "logits overwritten too early": Bug(
        TEAM, "if constexpr (kThreads <= 32) __syncwarp(mask_);",
        "if constexpr (kThreads <= 32) if (!PLANTED) __syncwarp(mask_);", probe(check_overwritten), RACE,
    ),
    # Outside of an array or a tensor.
    "a hash of 10 bits": Bug(BATCH, "* 0x9E3779B1u >> 23", "* 0x9E3779B1u >> (23 - PLANTED)", STEP, "has index [0-9]+ into 'int"),
    "a note too many": Bug(
        BATCH, "if (number < kNotes) notes_", "if (number < kNotes + PLANTED) notes_", CROWDED, "has index 256 into"
    ),
    "a search past the last": Bug(
        BATCH, "i < occurrences.last && sample_at", "(i < occurrences.last || PLANTED) && sample_at",
        CROWDED, "past the end of index",
    ),
    "an index read past its end": Bug(
        BATCH, "number < parts.vectors) ahead", "number < parts.vectors + PLANTED) ahead", STEP, "past the end of index"
    ),
    "index M": Bug(BATCH, "sample < bank.samples;", "sample < bank.samples + PLANTED;", INDEX_M, "past the end of slots"),
    "a vector read past the row": Bug(SLICE, READ, READ.replace("classes", "classes + 4 * PLANTED"), STEP_100, PAST),
    "an element written past the row": Bug(
        SLICE, WRITE, WRITE.replace("width", "width + PLANTED"), STEP_16_BITS, PAST
    ),
    # Unaligned.
    "the bank's alignment ignored": Bug(
        LAUNCH,
        "in_vectors_of_four(bank.rows, bank.dtype, bank.stride, bank.classes);",
        "(PLANTED || in_vectors_of_four(bank.rows, bank.dtype, bank.stride, bank.classes));",
        probe(check_step, 100, "shifted"),
        UNALIGNED,
    ),
    # Once too often, or not at all, and elsewhere.
    "padding not written": Bug(
        STEPS, "int(bank.stride)};", "PLANTED ? int(bank.classes) : int(bank.stride)};", PADDED, "writes of the bank"
    ),
    "a factor of 1 costs a pass": Bug(
        LAUNCH, "if (factor == 1 &&", "if (factor == 1 && !PLANTED &&",
        probe(check_scaled, 300, F32, 1.0, False), "reads of the gradient",
    ),
    "the last elements scaled by every block": Bug(
        LAUNCH, "blockIdx.x == gridDim.x - 1 &&", "(blockIdx.x == gridDim.x - 1 || PLANTED) &&",
        probe(check_scaled, 1029, F32, 0.5, False), RACE,
    ),
    "the stream ignored": Bug(
        LAUNCH, "<cudaStream_t>(target.stream)", "<cudaStream_t>(PLANTED ? nullptr : target.stream)",
        probe(check_target), "stream",
    ),
}  # fmt: skip

# What each kind of call is replaced with: `k` is the bug's number.
CALLS = {
    "barrier": (r"__syncthreads\s*\(\s*\)\s*;", "if (!planted({k})) __syncthreads();"),
    "order": (
        r"cuda::memory_order_acq_rel",
        "(planted({k}) ? cuda::memory_order_relaxed : cuda::memory_order_acq_rel)",
    ),
    **{
        f"atomic{name}": (rf"\batomic{name}\s*\(", f"plain_or_atomic{name}<{{k}}>(")
        for name in ("Exch", "Max", "Or", "Add")
    },
}
PRELUDE = """
#include <cuda/atomic>
extern "C" bool planted(int);
#define PLAIN(NAME, NEW)                                   \\
  template <int k, class T, class V>                       \\
  T plain_or_atomic##NAME(T* p, V given) {                 \\
    if (!planted(k)) return atomic##NAME(p, given);        \\
    const T old = *p, v = T(given);                        \\
    *p = NEW;                                              \\
    return old;                                            \\
  }
PLAIN(Exch, v)
PLAIN(Max, v > old ? v : old)
PLAIN(Or, old | v)
PLAIN(Add, old + v)
#undef PLAIN
"""
SWITCH = """
static int chosen = -1;
extern "C" __attribute__((visibility("default"))) void plant(int bug) { chosen = bug; }
extern "C" bool planted(int bug) { return bug == chosen; }
"""
# Of a call, one of these finds that it is missing.
ANY = (STEP, STEP_1025, DUPLICATES, FAR_APART, CROWDED, BAD_INDEX, NOT_FINITE)


def with_bugs() -> tuple[dict[str, str], list[str]]:
    """The sources by file name, and the name of each bug, by number."""
    names = list(BUGS)
    files = {path.name: path.read_text() for path in sorted(CSRC.glob("d2_cuda*"))}
    for number, bug in enumerate(BUGS.values()):
        files[bug.file] = mutate(files[bug.file], bug.right, bug.wrong.replace("PLANTED", f"planted({number})"))
    for file in files:
        for kind, (call, replacement) in CALLS.items():

            def plant(_: re.Match, file: str = file, kind: str = kind, replacement: str = replacement) -> str:
                names.append(f"{file}: {kind} {sum(f'{file}: {kind}' in name for name in names) + 1}")
                return replacement.format(k=len(names) - 1)

            files[file] = re.sub(call, plant, files[file])
    files["d2_cuda_team.h"] = files["d2_cuda_team.h"].replace("#pragma once", f"#pragma once\n{PRELUDE}")
    return files, names


FILES, NAMES = with_bugs()


@pytest.fixture(scope="module")
def faulty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Host:
    folder = tmp_path_factory.mktemp("faulty")
    shutil.copytree(CSRC, folder, dirs_exist_ok=True)
    for name, text in {**FILES, "planted.cpp": SWITCH}.items():
        (folder / name).write_text(text)
    sources = [*(folder / source.name for source in SOURCES), folder / "planted.cpp"]
    return Host(build(sources, request.config.cache.mkdir("cuda_host"), defines=DEFINES))


@functools.cache
def check_without_bug(host: Host, probe: Probe, order: str) -> None:
    torch.manual_seed(0)
    probe(host, order)


def failures(host: Host, probe: Probe, number: int) -> list[str]:
    """What is said of the bug in each order of threads and blocks, after the same has passed without it."""
    found = []
    for order in ORDERS:
        check_without_bug(host, probe, order)
        torch.manual_seed(0)
        host.library.plant(number)
        try:
            probe(host, order)
        except (AssertionError, BackendError) as error:
            found.append(str(error).split("\n")[0])
        finally:
            host.library.plant(-1)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_bug_is_found(faulty: Host, name: str) -> None:
    if name in BUGS:
        found = failures(faulty, BUGS[name].probe, NAMES.index(name))
        assert any(re.search(BUGS[name].message, text) for text in found), found
    else:
        found = [text for probe in ANY for text in failures(faulty, probe, NAMES.index(name))]
        assert any(RACE in text or UNWRITTEN in text for text in found), found
