"""Compiles the Triton kernels for GPUs that are not there, and reads the machine code: ``python -m tests.kernels.offline``.

Apart from the tests, because Triton must be imported without TRITON_INTERPRET for it.
"""

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from r2d2fast.kernels.predict import predict_kernel
from r2d2fast.kernels.scale import BLOCK, scale_kernel
from r2d2fast.kernels.step import long_step_kernel, step_kernel
from r2d2fast.kernels.tiles import options_of, tile_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Variant(NamedTuple):
    target: str
    kernel: str = "step"
    classes: int = 1000
    logits: str = "fp32"
    rows: str = "fp32"
    class_loss: str = "kl_reverse"
    update: bool = True
    stochastic: bool = False
    statistics: bool = True


def source_of(v: Variant) -> tuple[ASTSource, dict[str, Any]]:
    """What the launcher would compile for contiguous, aligned tensors, and how."""
    tile = tile_of(v.classes)
    align = (v.classes | 16) & -(v.classes | 16)
    types = {
        "logits": f"*{v.logits}", "grad": f"*{v.logits}", "out": f"*{v.logits}", "source": f"*{v.logits}",
        "rows": f"*{v.rows}", "index": "*i64", "slots": "*i32", "updates": "*i64", "status": "*i32", "loss": "*fp32",
        "results": "*fp32", "statistics": "*fp64" if v.statistics else "constexpr", "grad_output": "*fp32",
        **dict.fromkeys(("size", "samples", "logits_stride", "rows_stride", "seed", "launch"), "i32"),
        **dict.fromkeys(
            ("alpha", "beta", "label_lr", "grad_scale", "normalizer", "update_normalizer", "label_scale"), "fp32"
        ),
    }  # fmt: skip
    constants: dict[str, Any] = {
        "CLASSES": v.classes, "CLASS_LOSS": v.class_loss, "UPDATE": v.update, "STOCHASTIC": v.stochastic,
        "ROWS": tile.rows, "BLOCK": tile.block, "SPAN": tile.span, "LOGITS_ALIGN": align, "ROWS_ALIGN": align,
        "IN_PLACE": True, "statistics": None,
    }  # fmt: skip
    if v.kernel == "scale":
        kernel, options, constants["BLOCK"] = scale_kernel, {"num_warps": 4}, BLOCK
    elif v.kernel == "predict":
        kernel, options = predict_kernel, {"num_warps": tile.warps}
    else:
        kernel, options = step_kernel if v.classes <= tile.block else long_step_kernel, options_of(tile)
    if v.target == "gfx942":
        options.pop("maxnreg", None)
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    divisible = [name for name, type_ in signature.items() if type_[0] == "*"] + ["size"] * (v.kernel == "scale")
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    chosen = {name: constants[name] for name, type_ in signature.items() if type_ == "constexpr"}
    return ASTSource(kernel, signature, chosen, attributes), options


def cuda_report(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True).stdout
            for tool, options in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
        )
    fields = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return {
        "registers": fields["REG"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "local": fields["STACK"] + fields["LOCAL"],
        "shared": fields["SHARED"],
        "loads": len(re.findall(r"\bLDG\.E\.128\b", code)),
        "stores": len(re.findall(r"\bSTG\.E\.128\b", code)),
    }


def hip_report(assembly: str) -> dict[str, Any]:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])  # type: ignore[index]

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
        "local": number("private_segment_fixed_size"),
        "shared": number("group_segment_fixed_size"),
        "loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly)),
        "stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", assembly)),
    }


def report(v: Variant) -> dict[str, Any]:
    source, options = source_of(v)
    compiled = triton.compile(source, TARGETS[v.target], options)
    found = hip_report(compiled.asm["amdgcn"]) if v.target == "gfx942" else cuda_report(compiled.asm["cubin"])
    return {**v._asdict(), "warps": options["num_warps"], **found}


def reports(variants: list[Variant]) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(2) as pool:
        return list(pool.map(report, variants))


if __name__ == "__main__":
    print(json.dumps(reports([Variant(*fields) for fields in json.load(sys.stdin)])))
