"""Bugs planted in a copy of the CUDA sources: each is found, by what the harness sees or by a number.

cuda_bugs.py has their patches; here is what finds each.
"""

import mmap
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

from r2d2fast import BackendError, reference
from r2d2fast._backends import cuda
from r2d2fast.bank import DTYPES
from r2d2fast.options import StepOptions
from r2d2fast.reference import Bank
from tests.cuda_bugs import PATCHED_TWICE, PATCHES, PLANTED, with_bugs
from tests.cuda_host import backend
from tests.cuda_host.backend import CSRC, DEFINES, SOURCES, on_the_host
from tests.cuda_host.build import build, problem
from tests.cuda_host.host import ORDERS, Host
from tests.test_cuda import (
    BEYOND_ONE_ROUND,
    check_every_order,
    check_predict,
    check_scaled,
    check_statistics,
    check_step,
    check_stochastic,
)
from tests.test_cuda_failures import (
    check_bad_index,
    check_bad_predictions,
    check_bad_row,
    check_bad_scalar,
    check_same_bits,
    check_target,
)
from tests.test_rules import TestSaturation

F32, BF16, F16 = DTYPES

Probe = Callable[[Host, str], None]


def step(*args, **options) -> Probe:
    return lambda host, order: check_step(host, order, *args, **options)


def stochastic(*args) -> Probe:
    return lambda host, order: check_stochastic(host, order, *args)


def predict(*args) -> Probe:
    return lambda host, order: check_predict(host, order, *args)


def scaled(factor: float, keep: bool, size: int = 300) -> Probe:
    return lambda host, order: check_scaled(host, order, size, F32, factor, keep)


def statistics(classes: int) -> Probe:
    return lambda host, order: (check_statistics(host, order, classes), None)[1]


def every_order(classes: int) -> Probe:
    return lambda host, order: check_every_order(host, order, classes)


def target(host: Host, order: str) -> None:
    check_target(host, order)
    assert host._c.current_device() == 0, "device current afterwards"


def failed_launch(host: Host, order: str) -> None:
    host.fail_next_launch(701)
    with on_the_host(host, order), pytest.raises(BackendError):
        cuda.scale_gradient(torch.ones(3), torch.tensor(3.0), 1.0, False)
    assert host._c.last_error() == 0, "error left behind"


def bad_index(classes: int, bad: int | str) -> Probe:
    return lambda host, order: check_bad_index(host, order, classes, bad)


def bad_row(*args) -> Probe:
    return lambda host, order: check_bad_row(host, order, *args)


def bad_predictions(host: Host, order: str) -> None:
    check_bad_predictions(host, order, 100, float("nan"))


def same_bits(host: Host, order: str) -> None:
    check_same_bits(host, order, 100, "kl_reverse")


def saturation(host: Host, order: str) -> None:
    with on_the_host(host, order):
        TestSaturation().test_a_step_saturates("cuda", 100, "nearest", F32)


def bad_scalar(host: Host, order: str) -> None:
    check_bad_scalar(host, order, 100, "beta", float("nan"))


def _two_sided(elements: int) -> Tensor:
    """bfloat16 zeros whose memory goes as far to the front: where an offset of 32 bits wraps, there is memory, too."""
    no_reserve = 0x4000  # mmap.MAP_NORESERVE, which Python has from 3.13 on
    size = 2 * elements * 2
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except OSError:
        pytest.skip(f"this machine gives out no {size / 2**30:.0f} GiB of addresses")
    return torch.frombuffer(memory, dtype=torch.bfloat16, count=elements, offset=elements * 2)


def large(classes: int) -> Probe:
    """Logits and a bank of more than 2^31 elements, of which a few pages are ever made."""

    def check(host: Host, order: str) -> None:
        samples = 2**31 // classes + 3
        rows = _two_sided(samples * classes).view(samples, classes)
        logits = _two_sided(2**31 + 2 * classes).as_strided((2, classes), (2**31 + classes, 1)).normal_()
        index = torch.tensor([5, samples - 1])
        before = rows[index].normal_()
        parts = (torch.arange(samples).int(), torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int32))
        bank = Bank(rows, *parts, 10.0, "stochastic", 3)
        rows[index] = before
        with mock.patch.object(backend, "WATCHED_ELEMENTS", 0), on_the_host(host, order):
            loss, _ = cuda.step(
                logits, index, bank, StepOptions(0.1, 0.03, 40.0, 1.0, "kl_reverse", 1.0, 1.0, True), None
            )
        ours = rows[index]
        rows[index] = before
        bank.updates.zero_()
        exact = reference.d2_step(logits, index, bank, label_lr=40.0, normalizer=1.0)
        torch.testing.assert_close(loss.double(), exact.loss, msg="loss")
        assert (ours != rows[index]).float().mean() < 0.004, "bank rounded or written otherwise"

    return check


RACE = "with nothing to order the two"
NUMBER = "is wrong"
# What finds it, and how the message must begin or what it must contain.
BUGS = {
    # Barriers and fences: 10 classes are 64 rows a block, 1025 a row a block of four warps.
    "barrier dropped in reduce": (step(1025), f"{RACE}|has written"),
    "barrier dropped before the chains": (step(10), f"{RACE}|has written"),
    "barrier dropped after the chains": (step(10), f"{RACE}|has written"),
    "barrier dropped before the result": (step(10), RACE),
    "barrier dropped before the ticket": (step(10), rf"allocation 4\+\d+.*{RACE}"),
    "barrier dropped after the ticket": (step(10), f"{RACE}|has written"),
    "fence dropped before the ticket": (step(1025), rf"allocation 4\+\d+.*{RACE}"),
    "fence dropped after the ticket": (step(1025), rf"allocation 4\+\d+.*{RACE}"),
    "one copy of the partial sums": (step(1025, "duplicates", rows=300), RACE),
    # Teams.
    "mask of the whole warp": (step(10, "duplicates"), "which waits at|which has returned"),
    "wrong shuffle offset": (step(10), NUMBER),
    "last warp forgotten": (step(1025), NUMBER),
    "value of the next lane": (step(1000), NUMBER),
    # Index and duplicates.
    "index read as int32": (step(10), f"{NUMBER}|{RACE}"),
    "index -1": (bad_index(10, -1), "bytes before slots"),
    "index M": (bad_index(10, "size"), "bytes past the end of slots"),
    "bad index not reported": (bad_index(10, -1), "status"),
    "chains not cleared": (step(10), "has written"),
    "rest of a chain forgotten": (step(10, "duplicates"), f"{NUMBER}|{RACE}"),
    "hash of 11 bits": (step(10), "has index [0-9]+ into 'int"),
    "first occurrence not found": (step(10, "duplicates"), NUMBER),
    "last occurrence not found": (step(10, "duplicates"), RACE),
    "next row skipped in the search": (step(10, "duplicates"), NUMBER),
    "search past the last": (step(1025, "duplicates"), "past the end of index"),
    "duplicates not looked for": (step(10, "duplicates"), rf"pseudo_logits\+\d+.*{RACE}"),
    "first occurrence wins": (step(10, "duplicates"), NUMBER),
    "each occurrence moves the row": (step(10, "duplicates"), NUMBER),
    "vectors for duplicates": (step(33, "duplicates"), "aligned to 16 bytes|is off by"),
    # The sum of the losses.
    "ticket not reset": (step(10), "status"),
    "ticket not atomic": (step(10), rf"status\+0.*{RACE}"),
    "sum made by the last block": (every_order(10), "not the same bits"),
    "labelled rows counted": (statistics(10), "statistics"),
    "statistics overwritten": (statistics(10), "statistics"),
    "agreement of an earlier piece": (statistics(20011), "statistics"),
    "step counted too early": (stochastic(10, "different", (F32, BF16)), RACE),
    "summed by the first block": (step(10), rf"allocation [34]\+\d+.*{RACE}"),
    "summed by every block": (step(10), rf"allocation [34]\+\d+.*{RACE}"),
    "loss not divided": (step(10), NUMBER),
    "update not counted": (step(10), "updates counted"),
    "last block forgotten": (step(10), NUMBER),
    # Vectors, heads and tails.
    "alignment of the bank ignored": (step(33, "different"), "aligned to 16 bytes"),
    "all alignments ignored": (step(33, "different"), "aligned to 16 bytes"),
    "head takes no room": (step(255), NUMBER),
    "vector read before the row": (step(33), f"reads of|{RACE}"),
    "vector read past the row": (step(33), f"past its end|{RACE}"),
    "vector written before the row": (step(33), f"bytes before|{RACE}"),
    "vector written past the row": (step(33), f"past its end|{RACE}"),
    "tail not read": (step(33), NUMBER),
    "tail not written": (step(33), NUMBER),
    "element read past the tail": (step(33), f"past its end|{RACE}"),
    "element read past the row": (step(33, "different"), "past its end|between two of its rows"),
    "element written before the row": (step(33), f"bytes before|{RACE}"),
    "element written past the row": (step(33, "different"), f"past its end|{RACE}"),
    "past the row is not masked": (step(33), NUMBER),
    "padding not written": (step(33, "padded"), "writes of the bank"),
    "halves exchanged on reading": (step(64, "alike", (BF16, BF16)), NUMBER),
    "halves exchanged on writing": (step(64, "alike", (BF16, BF16)), NUMBER),
    "bfloat16 shifted by 15": (step(64, "alike", (BF16, F32)), NUMBER),
    # Arithmetic and weights.
    "device scalars ignored": (same_bits, "same bits"),
    "grad_scale dropped": (same_bits, "grad_scale"),
    "scalars not checked": (bad_scalar, "bank"),
    "beta dropped": (step(10), NUMBER),
    "D_u ignored": (step(10), "bank is off by"),
    "maximum not subtracted": (step(100, size=200.0), "nan|is off by"),
    "mean not subtracted": (step(10), "grad is off by"),
    "sums not rebased": (step(8193, size=30.0), NUMBER),
    "label off by one": (step(10, "different"), NUMBER),
    "label_scale ignored": (step(10, "different"), NUMBER),
    "bad row not skipped": (bad_row(10, "logits"), "loss|bank"),
    # The update, and random bits.
    "update forgotten": (step(10), "bank is off by"),
    "update of a long row forgotten": (step(8193), "bank is off by"),
    "update without being asked": (step(10, update=False), "bank is off by"),
    "random bits constant": (stochastic(100, "alike", (F32, BF16)), "rounded otherwise"),
    "same bits each step": (stochastic(100, "alike", (F32, BF16)), "rounded otherwise"),
    "32-bit step": (stochastic(100, "alike", (F32, BF16)), "rounded otherwise"),
    "second block of bits forgotten": (stochastic(33, "padded", (BF16, BF16)), "rounded otherwise"),
    "updates not clamped": (saturation, r"tensor\(False\)"),
    "32-bit offset of the logits": (large(8192), "loss"),
    "32-bit offset in the bank": (large(8192), "bank rounded or written otherwise|loss"),
    "32-bit random counter": (large(8192), "bank rounded or written otherwise"),
    # The small kernels.
    "every prediction written": (predict(10, "duplicates", (F32, F32)), rf"pseudo_logits\+\d+.*{RACE}"),
    "vectors of two widths": (predict(64, "alike", (BF16, F32)), "bank"),
    "predictions not checked": (bad_predictions, "status"),
    "predictions not clamped": (predict(100, "alike", (F32, F16)), "bank"),
    "scale left in": (scaled(0.5, False), "gradient"),
    "factor 1 costs a pass": (scaled(1.0, False), "reads of the gradient"),
    "factor 1 not copied": (scaled(1.0, True), "gradient"),
    "one round of the grid": (scaled(0.5, True, BEYOND_ONE_ROUND), "gradient"),
    # Launches.
    "stream ignored": (target, "stream"),
    "device not set": (target, "device"),
    "device not restored": (target, "device current afterwards"),
    "error left behind": (failed_launch, "error left behind"),
}
NAMES = list(BUGS)


@pytest.fixture(scope="module")
def faulty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Host:
    if problem() is not None:
        pytest.skip(f"the harness for CUDA sources {problem()}")
    folder = tmp_path_factory.mktemp("faulty")
    shutil.copytree(CSRC, folder, dirs_exist_ok=True)
    for name in PATCHES:
        (folder / name).write_text(with_bugs(name, NAMES))
    (folder / "planted.cpp").write_text(PLANTED)
    sources = [*(folder / source.name for source in SOURCES), folder / "planted.cpp"]
    return Host(build(sources, request.config.cache.mkdir("cuda_host"), defines=DEFINES))


@contextmanager
def planted(host: Host, number: int) -> Iterator[None]:
    host._c.plant(number)
    try:
        yield
    finally:
        host._c.plant(-1)


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:
    torch.set_num_threads(1)  # as in test_cuda.py


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(faulty: Host, bug: str) -> None:
    check, message = BUGS[bug]
    found = []
    for order in ORDERS:
        torch.manual_seed(0)
        check(faulty, order)  # with no bug there is nothing to find
        torch.manual_seed(0)
        with planted(faulty, NAMES.index(bug)):
            try:
                check(faulty, order)
            except (AssertionError, BackendError) as error:
                found.append(str(error).split("\n")[0])
    assert any(re.search(message, text) for text in found), found


def test_every_barrier_and_fence_is_dropped_in_turn() -> None:
    names = re.findall(r"BUG\(([^()]+)\)", str([PATCHES, PATCHED_TWICE]))
    assert set(names) == set(BUGS)
    sources = "".join(path.read_text() for path in CSRC.glob("d2_cuda*"))
    assert sources.count("__syncthreads();") == sum("barrier dropped" in name for name in names)
    assert sources.count("__threadfence();") == sum("fence dropped" in name for name in names)
    assert sources.count("__syncwarp();") == 1  # of Team::settle(), for the compiler: nothing is exchanged there
