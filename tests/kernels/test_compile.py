"""Evidence level G3: the Triton kernels compiled for GPUs that are not here, and what their machine code says.

``python -m tests.kernels.tritons`` runs this file over other versions of Triton; ``python -m tests.kernels.offline`` compiles any
variant.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.cases import slow_but

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

CUDA = ("sm_80", "sm_90", "sm_100")
MAIN_PATH = [
    *((target, "step", 1000, *types) for target in CUDA for types in (("fp32", "fp32"), ("bf16", "bf16"))),
    ("gfx942", "step", 1000, "fp32", "fp32"),
]
OTHERS = [
    ("sm_90", "step", 1000, "fp32", "fp32", "mse"),
    ("sm_80", "step", 1000, "fp16", "fp32", "mse"),
    ("sm_100", "step", 1000, "bf16", "bf16", "kl", True, True),
    ("sm_90", "step", 10, "fp32", "fp32", "kl"),
    ("sm_90", "step", 100, "fp16", "fp16", "mse", True, True),
    ("sm_90", "step", 8192, "fp32", "fp32", "kl_reverse"),
    ("sm_90", "step", 32000, "bf16", "fp32", "mse"),
    ("sm_90", "step", 1000, "bf16", "fp32", "kl_reverse", False, False, False),
    ("sm_90", "predict", 1000, "bf16", "fp32"),
    ("sm_90", "scale", 1000, "fp32", "fp32"),
    ("gfx942", "step", 10, "fp32", "fp32", "kl"),
    ("gfx942", "step", 1000, "bf16", "bf16", "kl_reverse", True, True),
    ("gfx942", "step", 32000, "bf16", "bf16", "mse", True, True),
    ("gfx942", "predict", 1000, "bf16", "fp32"),
    ("gfx942", "scale", 1000, "fp32", "fp32"),
]


EVERY_TIME = [("sm_90", "step", 1000, "fp32", "fp32"), ("sm_90", "step", 10, "fp32", "fp32", "kl")]


def each(variants: list[tuple]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("variant", slow_but(variants, EVERY_TIME), ids=lambda v: "-".join(map(str, v)))


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> dict[tuple, dict]:
    """Of the variants that the selected tests want."""
    from tests.kernels.offline import TOOLS

    missing = [tool for tool in ("ptxas", "cuobjdump", "nvdisasm") if shutil.which(tool, path=TOOLS) is None]
    if missing:
        pytest.skip(f"this Triton carries no {', '.join(missing)}")
    here = (item for item in request.session.items if item.path == request.path)
    variants = list(dict.fromkeys(item.callspec.params["variant"] for item in here))
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.offline"],
        input=json.dumps(variants),
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return dict(zip(variants, json.loads(result.stdout), strict=True))


@each(MAIN_PATH + OTHERS)
def test_nothing_is_spilled(reports, variant):
    report = reports[variant]
    # At 8192 columns 16 warps have all 128 registers there are for them: Triton 3.6 spills 8, 3.8 none.
    few = 8 if variant[:3] == ("sm_90", "step", 8192) else 0
    assert report["spills"] <= few
    assert report["local"] <= few
    assert report["registers"] * report["warps"] * 32 <= 65536  # one program, at the least, fits on a processor


@each(MAIN_PATH)
def test_whole_vectors_are_read_and_written(reports, variant):
    report = reports[variant]
    lanes, elements = 64 if variant[0] == "gfx942" else 32, 4 if variant[3] == "fp32" else 8
    vectors = 1024 // (report["warps"] * lanes * elements)
    assert report["loads"] == 3 * vectors  # ŷ, ỹ, and ŷ of an earlier occurrence
    assert report["stores"] == 2 * vectors
