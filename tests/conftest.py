"""Backends under test, and what every test needs of them."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from filelock import FileLock

# Where there is no GPU, Triton's kernels run in its interpreter, which must be asked for before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from r2d2fast import BackendError
from r2d2fast._backends import choose, native
from tests.cases import slow_but
from tests.cuda_host.backend import DEFINES, SOURCES, on_the_host
from tests.cuda_host.build import build
from tests.cuda_host.build import problem as no_harness
from tests.cuda_host.host import ORDERS, Host
from tests.sizes import ON_A_GPU

INSTRUCTION_SETS = native.cpu.module.instruction_sets() if native.cpu.module else []
# The others of a kind run the same source: in `pytest -m slow`.
FAST = {"reference", *(f"cpu-{name}" for name in INSTRUCTION_SETS[:1]), f"cuda-{ORDERS[0]}"}
BACKENDS = [
    *slow_but(
        ["reference", *(f"cpu-{name}" for name in INSTRUCTION_SETS), *(f"cuda-{order}" for order in ORDERS)], FAST
    ),
    *([pytest.param(f"{name}-gpu", marks=pytest.mark.gpu) for name in ("cuda", "triton")] if ON_A_GPU else ["triton"]),
]


def pytest_configure() -> None:
    # Of a busy machine a deadline of Hypothesis would say that it is busy.
    hypothesis.settings.register_profile("r2d2fast", deadline=None)
    hypothesis.settings.load_profile("r2d2fast")
    # The processes of `pytest -n auto` are as many as the cores already.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cuda_host(request: pytest.FixtureRequest) -> Host:
    """The CUDA sources as they are, compiled for this processor."""
    reason = no_harness()
    if reason is not None:
        pytest.skip(f"the harness for CUDA sources {reason}")
    cache = request.config.cache.mkdir("cuda_host")
    with FileLock(cache / "build.lock"):  # a minute, of which the other processes of `pytest -n` make use
        return Host(build(SOURCES, cache, defines=DEFINES))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend: the C++ one with each instruction set this processor has; CUDA in the harness, with its threads and blocks
    running forwards, backwards and in disorder; Triton in its interpreter. Where there is a GPU, CUDA and Triton on it: it is
    then PyTorch's default device, so that a test's tensors are there without its saying so."""
    name, _, variant = request.param.partition("-")
    if variant == "gpu":
        with torch.device("cuda", torch.cuda.current_device()):
            _skip_without(name)
            yield name
    elif name == "cpu":
        best = native.cpu.module.instruction_set()
        assert native.cpu.module.use_instruction_set(variant)
        yield name
        native.cpu.module.use_instruction_set(best)
    elif name == "cuda":
        with on_the_host(request.getfixturevalue("cuda_host"), variant):
            yield name
    else:
        if name == "triton":
            _skip_without(name)
            from tests.kernels.interpreter import patch_interpreter  # imports Triton, which need not be there

            patch_interpreter()
        yield name


def _skip_without(name: str) -> None:
    one = torch.empty(1, 2)
    try:
        choose(name, one, one)
    except BackendError as error:
        pytest.skip(str(error))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("extra"):
        for package in marker.args:
            pytest.importorskip(package)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test change PyTorch's thread count."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads: None) -> None:
    """For tensors as small as those of the tests, PyTorch's threads take longer to meet than to work."""
    torch.set_num_threads(1)


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest) -> str:
    """The order in which the harness runs the threads and blocks of a CUDA kernel."""
    return request.param
