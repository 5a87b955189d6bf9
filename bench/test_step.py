"""pytest-benchmark suites: ``pytest bench --benchmark-only``, a group for every shape and thread count.

pytest-benchmark runs all rounds of one step before the next step's, so on a busy machine trust ``python -m bench``,
which takes turns.
"""

from collections.abc import Iterator

import pytest

from bench.__main__ import FULL
from bench.implementations import implementations
from bench.measure import prepare
from bench.workload import Step, Workload
from r2d2fast.train.threads import cpu_threads

CASES = [(shape, threads) for shape in FULL.shapes for threads in FULL.threads]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pairs = [(case, name) for case in CASES for name in implementations(case[0][1])]
    ids = [f"{shape[0]}x{shape[1]}-{threads}-{name}" for (shape, threads), name in pairs]
    metafunc.parametrize(("case", "name"), pairs, indirect=["case"], ids=ids, scope="module")


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Iterator[tuple[Workload, dict[str, Step], str]]:
    (batch, classes), threads = request.param
    workload = Workload(batch, classes, FULL.rows)
    with cpu_threads(threads):
        yield workload, prepare(workload), f"B={batch} N={classes} threads={threads}"


def test_step(case: tuple[Workload, dict[str, Step], str], name: str, benchmark) -> None:  # type: ignore[no-untyped-def]
    workload, steps, benchmark.group = case
    benchmark(lambda: steps[name](next(workload.indices)))
