"""Installation: what is built, what is said where nothing could be built, and that it builds as documented."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest
import r2d2fast.kernels
import torch

import r2d2fast
from r2d2fast._backends import cuda, native

ROOT = Path(__file__).parent.parent
# Python in a copy's folder: without this hook of the editable install it would still find the extension of the original.
ISOLATE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)];"
STATUS = f"{ISOLATE} import r2d2fast; print(r2d2fast.backends()['cpu'])"
STEP = (
    f"{ISOLATE} import torch, r2d2fast; bank = r2d2fast.PseudoLabelBank(torch.tensor([-1, 0]), 2);"
    "print(float(r2d2fast.d2_step(torch.zeros(2, 2), torch.arange(2), bank)[0]))"
)


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def copy_without_extension(target: Path) -> Path:
    """A copy of the sources, as they are in a fresh clone."""
    for name in ("csrc", "kernels", "r2d2fast"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    (target / "r2d2fast" / "kernels").symlink_to("../kernels")  # where an installation has it
    return target


def test_the_native_code_knows_no_pytorch():
    includes = {
        line.split()[1]
        for path in (ROOT / "csrc").iterdir()
        for line in path.read_text().splitlines()
        if line.startswith("#include")
    }
    assert not [name for name in includes if re.search("torch|aten|c10", name, re.IGNORECASE)]
    assert "<pybind11/pybind11.h>" in includes


def test_every_package_is_installed():
    listed = set(re.findall(r'^    "(r2d2fast[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "r2d2fast").rglob("__init__.py")}
    assert listed == found | {"r2d2fast.kernels"}


def test_type_checkers_are_told_of_the_annotations(tmp_path):
    source = copy_without_extension(tmp_path)
    built = run(sys.executable, "setup.py", "build_py", "--build-lib", "built", cwd=source)
    assert built.returncode == 0, built.stderr
    assert (source / "built" / "r2d2fast" / "py.typed").exists()


def test_without_a_compiler_it_installs_as_pure_python_and_says_so(tmp_path):
    source = copy_without_extension(tmp_path)
    environment = {**os.environ, "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    built = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source, env=environment)
    assert built.returncode == 0, built.stderr
    assert "installing pure Python" in built.stderr
    assert "apt-get install g++" in built.stderr
    status = run(sys.executable, "-c", STATUS, cwd=source)
    assert "available=False" in status.stdout
    assert "were not built" in status.stdout
    step = run(sys.executable, "-c", STEP, cwd=source)
    assert step.returncode == 0, step.stderr
    assert "using the slow reference backend: the C++ kernels were not built" in step.stderr


def stub(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def quick_build(tmp_path):
    """Builds a copy of the sources with a C++ compiler that only makes the files it is asked for; nvcc is where PATH says."""
    source = copy_without_extension(tmp_path / "source")
    compiler = stub(tmp_path / "c++", 'while [ "$1" ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done')
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in filter(shutil.which, ("sh", "ar")):
        (tools / name).symlink_to(shutil.which(name))

    def build(nvcc: str | None = None, **environment: str) -> subprocess.CompletedProcess:
        if nvcc is not None:
            stub(tools / "nvcc", nvcc)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA", "R2D2FAST"))}
        tried = {"CC": compiler, "CXX": compiler, "PATH": str(tools), "CUDA_HOME": "/nonexistent"}
        environment = {**clean, **tried, **environment}
        built = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source, env=environment)
        built.libraries = {path.name.split(".")[0] for path in source.rglob("*.so")}
        return built

    return build


class TestWithoutNvcc:
    NVCC = "if [ $1 = --list-gpu-code ]; then printf 'sm_75\\nsm_80\\nsm_90\\n'; exit; fi"

    def test_the_rest_is_built_and_the_message_says_what_cuda_tensors_take(self, quick_build):
        built = quick_build()
        assert built.returncode == 0, built.stderr
        assert built.libraries == {"_C"}
        assert "the CUDA kernels were not built (no nvcc on PATH nor under CUDA_HOME" in built.stderr
        assert "CUDA tensors take the Triton kernels" in built.stderr

    def test_the_same_where_nvcc_fails(self, quick_build):
        built = quick_build(f"{self.NVCC}; echo 'nvcc fatal: Unsupported gcc' >&2; exit 1")
        assert built.returncode == 0, built.stderr
        assert built.libraries == {"_C"}
        assert "failed: nvcc fatal: Unsupported gcc" in built.stderr

    @pytest.mark.parametrize("nvcc", [None, f"{NVCC}; exit 1"])
    def test_it_is_an_error_where_the_kernels_were_asked_for(self, quick_build, nvcc):
        built = quick_build(nvcc, R2D2FAST_CUDA="1")
        assert built.returncode != 0
        assert "nvcc" in built.stderr

    def test_they_can_be_left_out(self, quick_build):
        built = quick_build(R2D2FAST_CUDA="0")
        assert built.returncode == 0, built.stderr
        assert built.libraries == {"_C"}
        assert "CUDA" not in built.stderr

    def test_other_values_are_refused(self, quick_build):
        built = quick_build(R2D2FAST_CUDA="yes")
        assert built.returncode != 0
        assert "R2D2FAST_CUDA is 'yes'; accepted: auto, 0, 1" in built.stderr

    @pytest.mark.parametrize(("archs", "wrong"), [("80;70", "70"), ("9.0 12.0", "120")])
    def test_architectures_that_nvcc_does_not_know_are_named(self, quick_build, archs, wrong):
        built = quick_build(self.NVCC, R2D2FAST_CUDA="1", R2D2FAST_CUDA_ARCHS=archs)
        assert built.returncode != 0
        assert f"{wrong} is none of those that" in built.stderr
        assert "knows: 75, 80, 90" in built.stderr

    @pytest.mark.parametrize(("archs", "flags"), [("", "80 90"), ("7.5,90", "75 90")])
    def test_nvcc_is_asked_for_these_architectures_and_for_ptx_of_the_last(self, quick_build, tmp_path, archs, flags):
        log = tmp_path / "log"
        nvcc = f'{self.NVCC}; echo "$@" >> {log}; while [ "$1" ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done'
        built = quick_build(nvcc, R2D2FAST_CUDA="1", R2D2FAST_CUDA_ARCHS=archs)
        assert built.returncode == 0, built.stderr
        assert built.libraries == {"_C", "_cuda"}
        compiled = log.read_text()
        for arch in flags.split():
            assert f"-gencode=arch=compute_{arch},code=sm_{arch} " in compiled
        assert "code=compute_90 " in compiled
        assert compiled.count("-gencode") == 3
        assert "-Werror all-warnings" in compiled


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [((8, 6), [80, 90], True), ((9, 0), [80], True), ((7, 5), [80, 90], False), ((8, 0), [86, 90], False)],
)
def test_a_gpu_that_the_machine_code_is_not_for_is_named(monkeypatch, capability, built, runs):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "this GPU")
    monkeypatch.setattr(native, "cuda", native.Library(types.SimpleNamespace(architectures=built), None))
    problem = cuda._no_machine_code.__wrapped__(0)
    if runs:
        assert problem is None
    else:
        arch = "".join(map(str, capability))
        assert problem.startswith(
            f"the CUDA kernels were built for sm_{built[0]}, sm_{built[1]} and PTX of the last, and this"
        )
        assert f"R2D2FAST_CUDA_ARCHS={arch} pip install" in problem


@pytest.mark.parametrize(("driver", "runs"), [(13000, True), (13020, True), (12080, False), (0, False)])
def test_a_driver_older_than_the_runtime_linked_in_is_named(monkeypatch, driver, runs):
    module = types.SimpleNamespace(cuda_version=13010, driver_version=lambda: driver)
    monkeypatch.setattr(native, "cuda", native.Library(module, None))
    problem = cuda._driver_too_old.__wrapped__()
    if runs:
        assert problem is None
    else:
        assert problem.startswith(
            f"the CUDA kernels were built with CUDA 13, and this driver serves CUDA {driver // 1000};"
        )


def test_without_triton_it_imports_and_says_so():
    code = (
        "import sys; sys.modules['triton'] = None;"
        "import importlib.util; find = importlib.util.find_spec;"
        "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a);"
        "import r2d2fast; print(r2d2fast.backends()['triton'])"
    )
    status = run(sys.executable, "-c", code)
    assert status.returncode == 0, status.stderr
    assert "available=False, detail='triton is not installed; pip install triton'" in status.stdout


@pytest.mark.slow  # compiles the C++ kernels and trains
def test_an_sdist_has_everything_and_its_wheel_works_from_elsewhere(tmp_path):
    """Without a network: the sdist is made where CUDA is left out; the wheel, made of it, trains in an empty folder."""
    listed = run("git", "ls-files", cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout, which says what belongs to the sources")
    files = {name for name in listed.stdout.splitlines() if not name.startswith(".")}
    source = tmp_path / "source"
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    environment = {**os.environ, "R2D2FAST_CUDA": "0", "PIP_NO_INDEX": "1"}

    def done(*command: str, **options) -> str:
        result = run(*command, **{"env": environment} | options)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    done(sys.executable, "setup.py", "sdist", "--dist-dir", str(tmp_path), cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert files <= {name.partition("/")[2] for name in archive.getnames()}
    pip = (sys.executable, "-m", "pip")
    done(*pip, "wheel", "--no-build-isolation", "--no-deps", f"--wheel-dir={tmp_path}", str(sdist))
    (wheel,) = tmp_path.glob("*.whl")
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    done(*pip, "install", "--no-deps", f"--target={installed}", str(wheel))

    empty.mkdir()
    elsewhere = {"cwd": empty, "env": {**environment, "PYTHONPATH": str(installed)}}
    found = done(
        sys.executable,
        "-c",
        "import r2d2fast, r2d2fast.kernels; print(r2d2fast.__file__, r2d2fast.kernels.__file__);"
        "print(r2d2fast.backends()['cpu'].available)",
        **elsewhere,
    )
    assert found.split() == [*(str(installed / "r2d2fast" / part / "__init__.py") for part in ("", "kernels")), "True"]
    program = (sys.executable, str(installed / "bin" / "r2d2fast"))
    short = ("--stage1.epochs=2", "--stage1.cosine-epochs=2", "--stage2.epochs=2", "--stage2.repredict-epochs=1")
    done(*program, "train", *short, "--stage2.lrs=0.1,0.05", "--stage3.epochs=1", **elsewhere)
    done(*program, "report", "runs", **elsewhere)
    (directory,) = (empty / "runs").iterdir()
    assert {"labels.csv", "network.safetensors", "results.json"} <= {path.name for path in directory.iterdir()}
    assert directory.name in (empty / "report.html").read_text()


@pytest.mark.extra("cibuildwheel")
@pytest.mark.parametrize(
    ("system", "machine", "ending"), [("linux", "x86_64", "manylinux"), ("macos", "arm64", "macosx")]
)
def test_cibuildwheel_has_a_wheel_for_this_python(system, machine, ending):
    """It reads its configuration; to build it takes images of containers, or a Mac."""
    command = (sys.executable, "-m", "cibuildwheel", "--print-build-identifiers", "--platform", system)
    listed = run(*command, "--archs", machine, str(ROOT))
    assert listed.returncode == 0, listed.stderr
    found = listed.stdout.split()
    assert f"cp3{sys.version_info.minor}-{ending}_{machine}" in found
    assert not [name for name in found if "musllinux" in name or "i686" in name]


@pytest.mark.extra("cibuildwheel")
def test_cibuildwheel_builds_nothing_on_windows():
    listed = run(sys.executable, "-m", "cibuildwheel", "--print-build-identifiers", "--platform", "windows", str(ROOT))
    assert (listed.returncode, listed.stdout.split()) == (0, [])


@pytest.mark.slow  # imports everything, and trains
def test_it_imports_and_trains_where_what_is_posix_s_own_is_missing(tmp_path):
    """As on Windows, as far as that can be shown elsewhere; and the loader takes its batches without POSIX's signals."""
    code = """
import importlib, mmap, os, pkgutil, signal, sys
for module in ("crypt", "curses", "fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"):
    sys.modules[module] = None
del os.posix_fallocate, os.sysconf, os.preadv, os.getloadavg, os.sched_getaffinity, os.nice, os.killpg, mmap.MADV_DONTNEED
del signal.pthread_sigmask, signal.SIGCHLD, signal.SIGHUP, signal.SIGPIPE, signal.setitimer
import r2d2fast
for module in pkgutil.walk_packages(r2d2fast.__path__, "r2d2fast."):
    # The examples import what is not ours, such as transformers, which wants termios.
    if not module.name.endswith("__main__") and "examples" not in module.name:
        importlib.import_module(module.name)
        print(module.name)
from r2d2fast.data.order import Batch
from r2d2fast.data.photographs.workers import load_batches
index = r2d2fast.bank.torch.arange(2)
print(list(load_batches(len, [Batch(index, None, 2)], workers=0)))

import numpy as np
from r2d2fast import R2D2Classifier
from r2d2fast.train import cli
np.save("rows.npy", np.random.default_rng(0).normal(size=(60, 4)).astype("float32"))
labels = np.where(np.arange(60) < 20, np.arange(60) % 2, -1)
print(R2D2Classifier(max_epochs=1).fit(np.load("rows.npy", mmap_mode="r"), labels).transduction_.shape)
assert cli.main(["--schedule-scale=0.02", "--run-dir=run", "--bank-storage=./bank"]) == 0

def nobody_reads():
    raise BrokenPipeError
sys.exit(cli.exit_status("program", nobody_reads))
"""
    done = run(sys.executable, "-W", "ignore", "-c", code, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 141, done.stderr
    said = {"r2d2fast.train.run_directory", "r2d2fast.data.partial_folder", "[3]", "(60,)"}
    assert said <= set(done.stdout.splitlines())
    assert (tmp_path / "run" / "results.json").exists()


def test_built_but_broken_is_another_message(tmp_path):
    source = copy_without_extension(tmp_path)
    suffix = run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))").stdout.strip()
    (source / "r2d2fast" / f"_C{suffix}").write_bytes(b"not a library")
    status = run(sys.executable, "-c", STATUS, cwd=source)
    assert "available=False" in status.stdout
    assert "were built, but do not load" in status.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() not in ("x86_64", "AMD64"),
    reason="the instruction sets are compiled by g++ for x86-64",
)
def test_the_kernels_are_clean_under_sanitizers(tmp_path):
    """csrc/ has no PyTorch in it, so that a plain C++ program can drive it with buffers of exact size."""
    flags = "-std=c++17 -O1 -g -w -fopenmp -ffp-contract=fast -fsanitize=address,undefined -fno-sanitize-recover=all"
    common = ["g++", *flags.split(), f"-I{ROOT / 'csrc'}"]
    instruction_sets = {
        "portable": "",
        "avx2": "-mavx2 -mfma -mf16c",
        "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c",
    }
    objects = []
    for name, options in instruction_sets.items():
        objects.append(str(tmp_path / f"{name}.o"))
        source = str(ROOT / "csrc" / f"d2_cpu_{name}.cpp")
        compiled = run(*common, *options.split(), "-c", source, "-o", objects[-1])
        assert compiled.returncode == 0, compiled.stderr
    sources = [ROOT / "tests" / "drive_kernels.cpp", ROOT / "csrc" / "d2_cpu.cpp", ROOT / "csrc" / "dispatch.cpp"]
    program = str(tmp_path / "drive")
    linked = run(*common, *map(str, sources), *objects, "-o", program)
    assert linked.returncode == 0, linked.stderr
    result = run(program)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1].startswith("done: ")


def test_version_is_that_of_the_metadata():
    assert f'version = "{r2d2fast.__version__}"' in (ROOT / "pyproject.toml").read_text()
