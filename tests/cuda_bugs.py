"""Bugs to plant in the CUDA sources: patches in which `BUG(name)` is true while a test asks for the bug of that name.

All are in one build, so that it takes the time of one to compile them.
"""

import re

from tests.cuda_host.backend import CSRC

# (text of the sources, the same with bugs), where the text is there once.
PATCHES = {
    "d2_cuda_team.h": [
        ("mask_ = ((1u", "mask_ = BUG(mask of the whole warp) ? 0xFFFFFFFFu : ((1u"),
        ("values[c], offset)", "values[c], BUG(wrong shuffle offset) ? offset / 2 : offset)"),
        ("      __syncthreads();", "      if (!BUG(barrier dropped in reduce)) __syncthreads();"),
        ("warp < kThreads / 32;", "warp < kThreads / 32 - BUG(last warp forgotten);"),
        ("turn_ ^= 1;", "turn_ ^= !BUG(one copy of the partial sums);"),
        ("+ 32 * use", "+ 32 * use + BUG(value of the next lane)"),
    ],
    "d2_cuda_batch.h": [
        ("batch.index_is_int64 ?", "batch.index_is_int64 && !BUG(index read as int32) ?"),
        ("sample < 0 || sample >= bank.samples", "sample < -BUG(index -1) || sample >= bank.samples + BUG(index M)"),
        ("* 0x9E3779B1u >> 22", "* 0x9E3779B1u >> (22 - BUG(hash of 11 bits))"),
        ("= position;\n  __syncthreads();", "= position;\n  if (!BUG(barrier dropped before the chains)) __syncthreads();"),
        ("team);\n  __syncthreads();", "team);\n  if (!BUG(barrier dropped after the chains)) __syncthreads();"),
        ("atomicMin(&", "if (!BUG(first occurrence not found)) atomicMin(&"),
        ("atomicMax(&", "if (!BUG(last occurrence not found)) atomicMax(&"),
        ("  __syncthreads();\n  return {", "  if (!BUG(barrier dropped before the result)) __syncthreads();\n  return {"),
        ("begin = position + 1;", "begin = position + 1 + BUG(next row skipped in the search);"),
        ("i < last && sample_at", "(i < last || BUG(search past the last)) && sample_at"),
        ("  __syncthreads();  // what", "  if (!BUG(barrier dropped before the ticket)) __syncthreads();  // what"),
        ("0) {\n    __threadfence();", "0) {\n    if (!BUG(fence dropped before the ticket)) __threadfence();"),
        ("is_last = atomic", "is_last = BUG(ticket not atomic) ? step.status[0]++ == int(gridDim.x) - 1 : atomic"),
        ("(step.status), gridDim.x - 1)", "(step.status), BUG(ticket not reset) ? 0xFFFFFFFFu : gridDim.x - 1)"),
        ("== gridDim.x - 1;", "== (BUG(summed by the first block) ? 0 : gridDim.x - 1) || BUG(summed by every block);"),
        ("if (is_last) __", "if (is_last && !BUG(fence dropped after the ticket)) __"),
        ("  __syncthreads();\n  if (!is", "  if (!BUG(barrier dropped after the ticket)) __syncthreads();\n  if (!is"),
        ("double(step.normalizer)", "double(BUG(loss not divided) ? 1 : step.normalizer)"),
        ("block.reduce(sums,", "sums[kEntropy] += BUG(sum made by the last block) * 1e-9 * blockIdx.x;\n    block.reduce(sums,"),
        ("counts = kind == kCounted", "counts = (kind == kLabelled && BUG(labelled rows counted)) || kind == kCounted"),
        ("statistics[s] += sums[s]", "statistics[s] = sums[s] + (BUG(statistics overwritten) ? 0 : step.statistics[s])"),
        ("heads[h] = -1;", "if (!BUG(chains not cleared)) heads[h] = -1;"),
        ("t = next[t])", "t = BUG(rest of a chain forgotten) ? -1 : next[t])"),
        ("if (step.update) *bank", "if (step.update && !BUG(update not counted)) *bank"),
    ],
    "d2_cuda_slice.h": [
        ("  clamp(values, largest);\n  if (!bank", "  if (!BUG(updates not clamped)) clamp(values, largest);\n  if (!bank"),
        ("&& (!pseudo || pseudo->mis", "&& (BUG(alignment of the bank ignored) || !pseudo || pseudo->mis"),
        ("if (!alike || logits.classes", "if ((!alike && !BUG(all alignments ignored)) || logits.classes"),
        ("+ head > capacity", "+ head * !BUG(head takes no room) > capacity"),
        (
            "if (first >= 0 && first + kVector <= row.width) pack.vector =",
            "if (first >= (BUG(vector read before the row) ? 1 - kVector : 0) && "
            "first + (BUG(vector read past the row) ? 1 : kVector) <= row.width) pack.vector =",
        ),
        (
            "= pack.element[e];\n  }\n",
            "= pack.element[e ^ (sizeof(E) == 2 && BUG(halves exchanged on reading))];\n  }\n  if (BUG(tail not read)) return;\n",
        ),
        ("at < row.classes) raw[k] =", "at < row.classes + BUG(element read past the tail)) raw[k] ="),
        ("at < row.classes ? data[at]", "at < row.classes + BUG(element read past the row) ? data[at]"),
        ("pack.element[e] = raw", "pack.element[e ^ (sizeof(E) == 2 && BUG(halves exchanged on writing))] = raw"),
        (
            "if (first >= 0 && first + kVector <= row.width) *re",
            "if (first >= (BUG(vector written before the row) ? 1 - kVector : 0) && "
            "first + (BUG(vector written past the row) ? 1 : kVector) <= row.width) *re",
        ),
        ("= pack.vector;\n  }\n", "= pack.vector;\n  }\n  if (BUG(tail not written)) return;\n"),
        ("at >= 0 && at < row.width) data", "at >= -BUG(element written before the row) && at < row.width) data"),
        ("    if (at < row.width) data", "    if (at < row.width + BUG(element written past the row)) data"),
        ("uint32_t(bits) << 16", "uint32_t(bits) << (16 - BUG(bfloat16 shifted by 15))"),
        ("at >= row.classes) out[k] =", "(at >= row.classes && !BUG(past the row is not masked))) out[k] ="),
        ("(first >> 3) + block,", "(first >> 3) + block * !BUG(second block of bits forgotten),"),
        (
            "= uint64_t(*bank.updates);",
            "= BUG(same bits each step) ? 0 : BUG(32-bit step) ? uint32_t(*bank.updates) : *bank.updates;",
        ),
        ("random.bits(piece)", "BUG(random bits constant) ? 0x8000u : random.bits(piece)"),
    ],
    "d2_cuda_step.h": [
        ("return scalar.tensor ?", "return scalar.tensor && !BUG(device scalars ignored) ?"),
        ("value_of(step.beta)", "BUG(beta dropped) ? 0 : value_of(step.beta)"),
        ("value_of(step.grad_scale) /", "(BUG(grad_scale dropped) ? 1 : value_of(step.grad_scale)) /"),
        ("/ step.update_normalizer", "/ (BUG(D_u ignored) ? step.normalizer : step.update_normalizer)"),
        ("return finite(w.alpha)", "return BUG(scalars not checked) || finite(w.alpha)"),
        ("fmaxf(x - largest,", "fmaxf(x - (BUG(maximum not subtracted) ? 0 : largest),"),
        ("i * batch.stride * e", "(BUG(32-bit offset of the logits) ? int32_t(i * batch.stride) : i * batch.stride) * e"),
        ("slot * bank.stride * e", "(BUG(32-bit offset in the bank) ? int32_t(slot * bank.stride) : slot * bank.stride) * e"),
        ("int(bank.stride)};", "BUG(padding not written) ? int(bank.classes) : int(bank.stride)};"),
        ("!= sample.occurrences.last) return", "!= sample.occurrences.last && !BUG(vectors for duplicates)) return"),
        ("at == -1 - slot ?", "at == -1 - slot - BUG(label off by one) ?"),
        ("if (moves) {", "if (moves && !BUG(update forgotten)) {"),
        ("if (!moves) continue;", "if (!moves || BUG(update of a long row forgotten)) continue;"),
        ("    rebase(loss, total, own[0]", "    if (!BUG(sums not rebased)) rebase(loss, total, own[0]"),
        ("if (dx < 0 || dy < 0) total", "if ((dx < 0 || dy < 0) && !BUG(agreement of an earlier piece)) total"),
        (": -bank.label_scale;", ": BUG(label_scale ignored) ? -10.0f : -bank.label_scale;"),
        ("  sum_up<", "  if (BUG(step counted too early) && blockIdx.x + threadIdx.x == 0) *a.bank.updates += 1;\n  sum_up<"),
        ("if (a.step.update) occ", "if (a.step.update && !BUG(duplicates not looked for)) occ"),
        ("if (team.rank == 0) atomicOr", "if (team.rank == 0 && !BUG(bad index not reported)) atomicOr"),
    ],
    "d2_math.h": [("((u - v) - r.mean_d)", "((u - v) - (BUG(mean not subtracted) ? T{} : r.mean_d))")],
    "d2_cuda.cu": [
        ("slot < 0 || occurrences.last != i)", "slot < 0 || (occurrences.last != i && !BUG(every prediction written)))"),
        ("!= element_size(row.dtype)) slice", "!= element_size(row.dtype) && !BUG(vectors of two widths)) slice"),
        ("!= float(logits.classes)) {", "!= float(logits.classes) && !BUG(predictions not checked)) {"),
        ("clamp(x, a.bank", "if (!BUG(predictions not clamped)) clamp(x, a.bank"),
        ("first += stride", "first += BUG(one round of the grid) ? a.size : stride"),
        ("*a.grad_output / value_of(a.grad_scale)", "*a.grad_output / (BUG(scale left in) ? 1 : value_of(a.grad_scale))"),
        (
            "if (factor == 1 && a.out == a.in)",
            "if (factor == 1 && !BUG(factor 1 costs a pass) && (a.out == a.in || BUG(factor 1 not copied)))",
        ),
        ("if (changed_) cuda", "if (changed_ && !BUG(device not restored)) cuda"),
        ("&& before_ != device)", "&& before_ != device && !BUG(device not set))"),
        ("<cudaStream_t>(target.stream)", "<cudaStream_t>(BUG(stream ignored) ? nullptr : target.stream)"),
        ("  cudaGetLastError();", "  if (!BUG(error left behind)) cudaGetLastError();"),
        ("TeamType::kRows - 1)", "TeamType::kRows - (BUG(last block forgotten) ? TeamType::kRows : 1))"),
    ],
}  # fmt: skip

# The same, where the text is there once for rows in registers and once for long ones.
PATCHED_TWICE = {
    "d2_cuda_step.h": [
        ("total[kFinite] == float(a.bank.classes)", "(total[kFinite] == float(a.bank.classes) || BUG(bad row not skipped))"),
        (
            "moves = i == last && a.step.update &&",
            "moves = i == (BUG(first occurrence wins) ? sample.occurrences.first : last) && "
            "(a.step.update || BUG(update without being asked)) &&",
        ),
        ("if (!moves) weights", "if (!moves && !BUG(each occurrence moves the row)) weights"),
        (
            "uint64_t(sample.slot) * a.bank.classes",
            "(BUG(32-bit random counter) ? uint64_t(int32_t(sample.slot * a.bank.classes)) : "
            "uint64_t(sample.slot) * a.bank.classes)",
        ),
    ],
}  # fmt: skip

PLANTED = """
#include <cuda_runtime.h>
extern "C" __attribute__((visibility("default"))) int last_error() { return cudaGetLastError(); }
extern "C" __attribute__((visibility("default"))) int current_device() {
  int device = -1;
  cudaGetDevice(&device);
  cudaSetDevice(0);
  return device;
}
static int chosen = -1;
extern "C" __attribute__((visibility("default"))) void plant(int bug) { chosen = bug; }
extern "C" bool planted(int bug) { return bug == chosen; }
"""


def with_bugs(name: str, bugs: list[str]) -> str:
    """The source with its bugs, by number; what is to be patched must be there, as often as is said."""
    text, spans = (CSRC / name).read_text(), []
    for times, patches in ((1, PATCHES), (2, PATCHED_TWICE)):
        for old, new in patches.get(name, ()):
            assert text.count(old) == times, f"{name} has {text.count(old)} times: {old!r}"
            spans += [(match.start(), match.end(), new) for match in re.finditer(re.escape(old), text)]
    parts, end = ['extern "C" bool planted(int);\n'], 0
    for begin, stop, new in sorted(spans):
        assert begin >= end, f"two patches overlap at {new!r}"
        parts += [text[end:begin], new]
        end = stop
    return re.sub(r"BUG\(([^()]+)\)", lambda bug: f"planted({bugs.index(bug[1])})", "".join(parts) + text[end:])
