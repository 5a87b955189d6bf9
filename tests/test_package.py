"""Installation: what is built, what is said where nothing could be built, and that it builds as documented."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import r2d2fast.kernels

import r2d2fast

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
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.split()
    for name in files or []:
        if name.split("/")[0] in ("csrc", "kernels", "r2d2fast", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    assert not list(target.rglob("*.so"))
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


def test_built_but_broken_is_another_message(tmp_path):
    source = copy_without_extension(tmp_path)
    suffix = run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))").stdout.strip()
    (source / "r2d2fast" / f"_C{suffix}").write_bytes(b"not a library")
    status = run(sys.executable, "-c", STATUS, cwd=source)
    assert "available=False" in status.stdout
    assert "were built, but do not load" in status.stdout


@pytest.mark.parametrize("flags", ["-fsanitize=address,undefined"])
def test_the_kernels_are_clean_under_sanitizers(tmp_path, flags):
    """csrc/ has no PyTorch in it, so that a plain C++ program can drive it with buffers of exact size."""
    program = tmp_path / "drive"
    sources = [str(ROOT / "csrc" / name) for name in ("d2_cpu.cpp", "dispatch.cpp")]
    sets = {"d2_cpu_portable.cpp": [], "d2_cpu_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"]}
    sets["d2_cpu_avx512.cpp"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
    common = [
        "g++",
        "-std=c++17",
        "-O1",
        "-g",
        "-w",
        "-fopenmp",
        "-ffp-contract=fast",
        flags,
        "-fno-sanitize-recover=all",
    ]
    objects = []
    for name, instruction_set in sets.items():
        objects.append(str(tmp_path / name) + ".o")
        compiled = run(*common, *instruction_set, "-c", str(ROOT / "csrc" / name), "-o", objects[-1])
        assert compiled.returncode == 0, compiled.stderr
    linked = run(
        *common, f"-I{ROOT / 'csrc'}", str(ROOT / "tests" / "drive_kernels.cpp"), *sources, *objects, "-o", str(program)
    )
    assert linked.returncode == 0, linked.stderr
    result = run(str(program))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1].startswith("done: ")


def test_version_is_that_of_the_metadata():
    assert f'version = "{r2d2fast.__version__}"' in (ROOT / "pyproject.toml").read_text()
