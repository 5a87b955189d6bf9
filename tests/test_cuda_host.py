"""The harness that runs CUDA sources on the host: right kernels pass in every order, and each planted bug is found."""

import ctypes
import errno
import mmap
import os
from pathlib import Path

import pytest
import torch

from tests.cuda_host.build import BuildError, build, problem
from tests.cuda_host.guard import guarded
from tests.cuda_host.host import Host, Report

HERE = Path(__file__).parent / "cuda_host"

pytestmark = pytest.mark.skipif(problem() is not None, reason=str(problem()))


@pytest.fixture(scope="module")
def host(request: pytest.FixtureRequest) -> Host:
    return Host(build([HERE / "toys.cu", HERE / "toys_binding.cpp"], request.config.cache.mkdir("cuda_host")))


class Toy:
    """The tensors of a launch. Unused ones are there too, and watched."""

    def __init__(self, host: Host, n: int = 0, size: int = 256) -> None:
        self.host, self.n = host, n
        self.input = torch.randint(-8, 8, (size,)).float()
        self.out = torch.full((size,), -1.0)
        self.scratch = torch.zeros(size)
        self.counter = torch.zeros(1, dtype=torch.int32)

    def launch(self, kernel: str, *, grid: int = 1, block: int = 64, stream: int = 0) -> None:
        pointers = [tensor.data_ptr() for tensor in (self.input, self.out, self.scratch, self.counter)]
        self.host.module.launch(kernel, *pointers, self.n, grid, block, stream)

    def run(self, kernel: str, order: str, **options: int) -> Report:
        buffers = {"out": self.out, "scratch": self.scratch, "counter": self.counter}
        with self.host.launches(order, buffers=buffers, constants={"in": self.input}, seed=1) as report:
            self.launch(kernel, **options)
        return report


def test_block_sum(host: Host, order: str) -> None:
    toy = Toy(host, n=70, size=210)
    report = toy.run("block_sum", order, grid=3, block=64)
    assert torch.equal(toy.out[:3], toy.input.view(3, 70).sum(1))
    assert (report.reads("in") == 1).all()
    assert report.writes("out").tolist() == [1] * 3 + [0] * 207
    assert report.reads("out").sum() + report.reads("scratch").sum() == 0


def test_a_wrong_offset_is_a_wrong_sum(host: Host, order: str) -> None:
    toy = Toy(host, n=64, size=64)
    toy.run("block_sum: wrong offset", order)
    assert toy.out[0] != toy.input.sum()


def test_reverse_groups(host: Host, order: str) -> None:
    toy = Toy(host)
    toy.run("reverse_groups", order, block=256)
    assert torch.equal(toy.out.view(-1, 8), toy.input.view(-1, 8).flip(1))


def test_groups_of_lanes_meet_without_the_others(host: Host, order: str) -> None:
    toy = Toy(host)
    toy.run("group_votes", order, block=256)
    assert torch.equal(toy.out, toy.input.view(-1, 8).mean(1).repeat_interleave(8))


def test_vectors(host: Host, order: str) -> None:
    toy = Toy(host, n=256)
    report = toy.run("vectors", order, grid=2, block=32)
    assert torch.equal(toy.out, toy.input + 1)
    assert (report.reads("in") == 1).all()
    assert (report.writes("out") == 1).all()


def test_atomics_do_not_race(host: Host, order: str) -> None:
    toy = Toy(host)
    report = toy.run("one_flag", order, grid=2)
    assert (toy.counter.item(), report.writes("counter").item()) == (1, 128)


def test_last_block_sum(host: Host, order: str) -> None:
    toy = Toy(host)
    for _ in range(2):  # the counter is back at 0
        toy.run("last_block_sum", order, grid=4, block=64)
        assert (toy.out[0], toy.counter) == (toy.input.sum(), 0)


def test_last_warp_sum(host: Host, order: str) -> None:
    toy = Toy(host)
    toy.run("last_warp_sum", order, grid=4, block=32)
    assert torch.equal(toy.out[:32], toy.input[:128].view(4, 32).flip(1).sum(0))


# What is launched, and what the error must say.
BUGS = {
    "block_sum: barrier dropped": "shared memory.*nothing in this block has written|nothing to order the two",
    "block_sum: second barrier dropped": r"4 bytes at shared memory\+\d+, which block \d thread \d+ (read|wrote)",
    "block_sum: divergent shuffle": r"waits at __shfl_xor_sync \(line \d+\) for thread \d+, which waits at __shfl_xor_sync",
    "block_sum: early return": "for thread 40, which has returned",
    "block_sum: another barrier": r"waits at __syncthreads \(line \d+\) for thread \d+, which waits at __syncthreads",
    "block_sum: lane not named": "by a lane that its mask does not name",
    "reverse_groups: no syncwarp": "shared memory.*nothing in this block has written|nothing to order the two",
    "reverse_groups: half the mask": "has written|by a lane that its mask does not name",
    "vectors: reads one on": r"reads \d+ bytes at .*in",
    "vectors: writes one on": r"writes \d+ bytes at .*out",
    "vectors: reads unaligned": r"takes in\+\d+ for a 'const struct float4', aligned to 16 bytes",
    "vectors: writes unaligned": r"takes out\+\d+ for a 'struct float4', aligned to 16 bytes",
    "one_flag: plain write": r"writes 4 bytes at counter\+0, which block \d thread \d+ wrote with nothing to order",
    "flag_and_read: plain read": r"at out\+0, which block \d thread \d+ (changed atomically|read) with nothing to order",
    "last_block_sum: no release": r"reads 4 bytes at scratch\+\d+, which block \d thread \d+ wrote",
    "last_block_sum: no acquire": r"reads 4 bytes at scratch\+\d+, which block \d thread \d+ wrote",
    "last_block_sum: no barrier before": r"(reads 4 bytes at scratch\+\d+, which block \d thread \d+ wrote|has written)",
    "last_block_sum: no barrier after": "shared memory.*nothing in this block has written|nothing to order the two",
    "last_block_sum: every block": "nothing to order the two",
    "last_warp_sum: no syncwarp before": r"reads 4 bytes at scratch\+\d+, which block \d thread \d+ wrote",
    "last_warp_sum: no syncwarp after": r"reads 4 bytes at scratch\+\d+, which block \d thread \d+ wrote",
    "uninitialised": "reads 4 bytes at shared memory.*nothing in this block has written",
    "shared_overflow": r"has index \d+ into 'float \[32\]'",
    "write_constant": r"writes 4 bytes at in\+\d+, which is constant",
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug(host: Host, bug: str, order: str) -> None:
    toy = Toy(host, n=128 if "block_sum" in bug else 256)
    with pytest.raises(RuntimeError, match=rf"^block \d+ thread \d+: .*({BUGS[bug]})"):
        toy.run(bug, order, grid=2, block=32 if "warp_sum" in bug else 64)


def test_memory_that_was_not_registered(host: Host) -> None:
    toy = Toy(host, n=256)
    # By its distance from a buffer where PyTorch has put it nearby.
    message = "reads 4 bytes at (0x|[0-9]+ bytes (before|past the end of) out)"
    with pytest.raises(RuntimeError, match=message), host.launches(buffers={"out": toy.out}):
        toy.launch("vectors")
    with host.launches(checks=False):
        toy.launch("vectors")
    assert torch.equal(toy.out, toy.input + 1)


def test_between_the_rows_of_a_buffer(host: Host) -> None:
    toy = Toy(host, n=256)
    toy.input = toy.input.view(8, 32)[:, :28]
    with pytest.raises(RuntimeError, match=r"thread 7: reads 4 bytes at in\+112, between two of its rows"):
        toy.run("vectors", "forward")


def test_buffers_that_overlap_are_refused(host: Host) -> None:
    x = torch.zeros(8)
    with pytest.raises(ValueError, match="b overlaps a"), host.launches(buffers={"a": x, "b": x[7:]}):
        pass
    with host.launches(buffers={"a": x, "none": None, "empty": x[8:]}):  # the failed call left nothing behind
        pass


def test_counts_add_up_over_launches_and_are_there_after_an_error(host: Host) -> None:
    toy = Toy(host, n=256)
    with host.launches(buffers={"out": toy.out}, constants={"in": toy.input}) as report:
        toy.launch("vectors")
        with pytest.raises(RuntimeError, match="past the end of in"):
            toy.launch("vectors: reads one on")
    assert report.launches == 2
    assert report.reads("in").tolist() == [1] * 4 + [2] * 252


def test_what_was_launched_is_recorded(host: Host) -> None:
    report = Toy(host, n=256).run("vectors", "forward", grid=3, block=96, stream=1234)
    assert (report.launches, report.grid, report.block, report.stream) == (1, 3, 96, 1234)


def test_a_launch_that_fails(host: Host) -> None:
    toy = Toy(host, n=256)
    host.fail_next_launch(701)
    with pytest.raises(RuntimeError, match=r"^cudaErrorLaunchOutOfResources$"):
        toy.run("vectors", "forward")
    assert (toy.out == -1).all()
    with pytest.raises(RuntimeError, match=r"^cudaErrorInvalidConfiguration$"):
        toy.run("vectors", "forward", block=1025)
    toy.run("vectors", "forward")


def test_a_source_that_does_not_compile(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text("#include <cuda_runtime.h>\nint answer() { return forty_two; }\n")
    with pytest.raises(BuildError, match="forty_two"):
        build([source], request.config.cache.mkdir("cuda_host"))


def test_a_patched_source_is_a_build_beside_the_first(
    host: Host, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    text = (HERE / "toys.cu").read_text()
    (tmp_path / "toys.cu").write_text(text.replace("make_float4(v.x + 1,", "make_float4(v.y + 1,"))
    sources = [tmp_path / "toys.cu", HERE / "toys_binding.cpp"]
    patched, right = (
        Toy(h, n=256) for h in (Host(build(sources, request.config.cache.mkdir("cuda_host"), [HERE])), host)
    )
    for toy in (patched, right):
        toy.run("vectors", "forward")
    assert torch.equal(right.out, right.input + 1)
    assert torch.equal(patched.out[::4], patched.input[1::4] + 1)


def convert(host: Host, how: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(values.numel(), dtype=dtype)
    host.module.convert(how, values.data_ptr(), out.data_ptr(), values.numel())
    return out


def assert_same_bits(ours: torch.Tensor, exact: torch.Tensor) -> None:
    assert torch.equal(ours.isnan(), exact.isnan())
    bits = torch.int32 if exact.dtype == torch.float32 else torch.int16
    assert torch.equal(ours.view(bits)[~ours.isnan()], exact.view(bits)[~exact.isnan()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions(host: Host, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    narrow = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    assert_same_bits(convert(host, f"from {name}", narrow, torch.float32), narrow.float())

    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 20,)).to(torch.int32)
    exact = narrow.float().view(
        torch.int32
    )  # with each value that float32 has between two: ties, and either side of them
    tie = 1 << (12 if dtype == torch.float16 else 15)
    half = narrow.float()[narrow.isfinite()]
    between = torch.cat(
        [(half[1:].double() / 2 + half[:-1].double() / 2).float().view(torch.int32) + d for d in (-1, 0, 1)]
    )
    for wide in (bits, exact, *(exact + tie + d for d in (-1, 0, 1)), between):
        wide = wide.view(torch.float32)
        assert_same_bits(convert(host, f"to {name}", wide, dtype), wide.to(dtype))


@pytest.mark.parametrize("edge", ["start", "end"])
def test_guarded(edge: str) -> None:
    tensor = torch.randn(3, 1001).half()
    copy = guarded(tensor, edge)
    assert torch.equal(copy, tensor)
    libc, (reader, writer) = ctypes.CDLL(None, use_errno=True), os.pipe()
    begin, end = copy.data_ptr(), copy.data_ptr() + tensor.numel() * 2
    outside, inside = (begin - 1, begin) if edge == "start" else (end, end - 1)
    assert outside // mmap.PAGESIZE != inside // mmap.PAGESIZE
    assert libc.write(writer, ctypes.c_void_p(inside), 1) == 1
    assert libc.write(writer, ctypes.c_void_p(outside), 1) == -1
    assert ctypes.get_errno() == errno.EFAULT
    os.close(reader)
    os.close(writer)
