"""Bugs planted in copies of the Triton kernels, one at a time: each is found by a test that is run on the kernels themselves.

bugs.py has the patches; here is what finds each: a test of the matrix or of test_triton.py, and where in it and with what.
"""

import functools
import importlib.util
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from triton.runtime.errors import InterpreterError

from tests import test_bank, test_loss, test_rules, test_step
from tests.kernels import test_triton  # skips where there is no interpreter to run in
from tests.kernels.bugs import PATCHES
from tests.kernels.test_triton import LONG

KERNELS = Path(__file__).parents[2] / "kernels"
TESTS = str(Path(__file__).parents[1])
TRITON = "triton"
BF16, F16 = torch.bfloat16, torch.float16


def in_any_order(classes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_triton.test_programs_may_run_in_any_order(classes, patch)


def offsets() -> None:
    with tempfile.TemporaryDirectory() as folder:
        test_rules.TestBeyondTwoToThe31Elements().test_offsets_are_64_bits(TRITON, Path(folder))


# Tests with their arguments, that several bugs share.
STEP = (test_step.test_index_dtypes, TRITON, torch.int64)
STEP_KL = (test_step.test_every_size, TRITON, 10, "kl")
STEP_MSE = (test_step.test_every_size, TRITON, 10, "mse")
TILE = (test_triton.test_every_tile_agrees_with_the_definition, 20)
LONG_TILE = (test_triton.test_every_tile_agrees_with_the_definition, LONG)
LONG_RULES = (test_triton.test_long_rows_keep_all_rules, "kl_reverse")
LONG_RULES_MSE = (test_triton.test_long_rows_keep_all_rules, "mse")
CLIMB = (test_triton.test_a_long_row_may_climb_from_piece_to_piece, "logits")
FAR_APART = (test_triton.test_occurrences_may_be_far_apart, 2)
DUPLICATES = (test_rules.TestDuplicates().test_read_the_old_row_and_the_last_wins, TRITON, 10)
BAD_ROW = (test_rules.TestBadRows().test_a_non_finite_logit_harms_nothing_else, TRITON, 10, float("inf"), "kl_reverse")
BAD_INDEX = test_rules.TestBadRows().test_an_index_out_of_range_on_a_gpu_harms_nothing_else_and_is_remembered
BAD_BANK = test_triton.test_a_row_of_the_bank_that_is_not_finite_harms_nothing_else
STATISTICS = (test_loss.TestStatistics().test_are_means_over_the_unlabelled_rows, TRITON)
BITS = (test_triton.test_random_bits_are_the_definition_s, 16, BF16)
LONG_BITS = (test_triton.test_random_bits_are_the_definition_s, LONG, BF16)
HALF_BITS = (test_triton.test_random_bits_are_the_definition_s, 16, F16)
LABELLED = (test_rules.TestLabelledSamples().test_touch_no_row, TRITON, 10)
LONG_PASS = (test_triton.test_one_pass, LONG, "kl_reverse")
BACKWARD = (test_triton.test_backward_reads_and_writes_only_what_it_must, BF16)
BAD_PREDICTIONS = (test_bank.test_predict_names_non_finite_logits_and_sets_the_others, TRITON, float("inf"))

OUTSIDE = "memory that is of no tensor of the launch"
NAMED = "is off by"
CLOSE = "not close"
ROUNDED = r"mean\(\) < 0.004"
# What finds it, and what must be among the test's lines that fail and the message.
BUGS = {
    # Index and duplicates.
    "last row left out": (STEP, "loss is off by"),
    "rows past the batch read": (STEP, OUTSIDE),
    "padding of the batch read": (STEP, OUTSIDE),
    "index -1 taken": ((BAD_INDEX, TRITON, 10, -1), OUTSIDE),
    "index M taken": ((BAD_INDEX, TRITON, 10, 20), OUTSIDE),
    "bad index not reported": ((BAD_INDEX, TRITON, 10, 20), "DID NOT RAISE"),
    "rows past the batch reported": (TILE, r"status.tolist\(\) == \[0, 0\]"),
    "rest of the index not searched": (FAR_APART, CLOSE),
    "duplicates not looked for": (DUPLICATES, r"assert_close\(grad"),
    "occurrences done by each other": (DUPLICATES, r"assert_close\((grad|loss)"),
    "earlier occurrences forgotten": (DUPLICATES, r"assert_close\(grad"),
    "occurrence just before forgotten": (FAR_APART, r"agree\(loss"),
    "earlier labelled duplicates forgotten": (DUPLICATES, r"assert_close\(grad"),
    "first occurrence wins": (DUPLICATES, r"assert_close\(bank"),
    "duplicates read the new row": (DUPLICATES, r"assert_close\(grad"),
    "logits of the last row for all": (DUPLICATES, r"assert_close\(grad"),
    "32-bit offsets of rows": ((offsets,), OUTSIDE),
    "alignment divided twice": ((test_step.test_every_size, TRITON, 64, "kl_reverse"), NAMED),
    # Rows, their maxima and their ends.
    "tail of a row skipped": (STEP, NAMED),
    "row read past its end": (STEP, OUTSIDE),
    "maximum not subtracted": ((test_step.test_gaps_beyond_the_range_of_exp, TRITON, 9, 1e2, "kl_reverse"), NAMED),
    "gaps not cut": (STEP, NAMED),
    "powers of 2": (STEP, NAMED),
    # Labelled samples.
    "labelled sample read from the bank": (LABELLED, OUTSIDE),
    "label off by one": (STEP, NAMED),
    "label_scale ignored": (TILE, CLOSE),
    "label_scale of the wrong sign": (STEP, NAMED),
    "row of a labelled sample moved": (LABELLED, OUTSIDE),
    "row of a labelled sample moved, long": (LONG_PASS, OUTSIDE),
    # Losses and gradients.
    "alpha dropped": (STEP, "loss is off by"),
    "beta dropped": (STEP, "loss is off by"),
    "grad_scale ignored": ((test_step.test_grad_scale_keeps_tiny_float16_gradients, TRITON), "scaled"),
    "D ignored in the gradient": (STEP, "grad is off by"),
    "D_u ignored": ((test_step.test_normalizers, TRITON), "bank is off by"),
    "weights of the other in kl": (STEP_KL, "loss is off by"),
    "normaliser of the class loss dropped": (STEP, "loss is off by"),
    "normaliser of the class loss dropped in kl": (STEP_KL, "loss is off by"),
    "normaliser of the entropy dropped": (STEP, "loss is off by"),
    "mean not subtracted": (STEP, "grad is off by"),
    "mean not subtracted in kl": (STEP_KL, "bank is off by"),
    "mean not subtracted in mse": (STEP_MSE, "grad is off by"),
    "mean of the update not subtracted in mse": (STEP_MSE, "bank is off by"),
    "mean of the entropy not subtracted": (STEP, "grad is off by"),
    "deviation of q of the wrong sign": (STEP_MSE, "bank is off by"),
    "factor 2 of mse dropped": (STEP_MSE, "grad is off by"),
    "pseudo-probabilities in no gradient of kl": (STEP_KL, "grad is off by"),
    "update added": (STEP, "bank is off by"),
    "update forgotten": (STEP, "bank is off by"),
    # What is not finite.
    "infinity taken for a number": (BAD_ROW, r"grad\[7\].isnan"),
    "bad row not seen": (BAD_ROW, r"grad\[7\].isnan"),
    "bad pseudo-logits not seen": ((BAD_BANK, float("inf"), 10, "kl_reverse"), "isnan|torch.equal"),
    "scalars not checked": (
        (test_triton.test_a_scalar_that_is_not_finite_harms_no_row, 10, "alpha", float("inf")),
        "isnan",
    ),
    "gradient of a bad row": (BAD_ROW, r"grad\[7\].isnan"),
    "bad row counted in the loss": (BAD_ROW, r"loss.isnan"),
    "bad row moved": (BAD_ROW, r"bank.pseudo_logits\[7\]"),
    # The sums.
    "summed by the first program": (STEP, "loss is off by nan"),
    "summed by every program": (TILE, r"agree\(loss|step\) == 2"),
    "ticket not reset": (TILE, r"agree\(loss"),
    "rows past 64 not summed": (FAR_APART, r"agree\(loss"),
    "sum depends on the last program": ((in_any_order, 10), r"map\(torch.equal"),
    "loss not divided": (STEP, "loss is off by"),
    "one plane for all": (STATISTICS, "read"),
    "labelled rows counted": (STATISTICS, "read"),
    "bad rows counted": (STATISTICS, "read"),
    "bad rows not counted as skipped": (STATISTICS, "skipped"),
    "confidence of the pseudo-labels for the prediction's": (STATISTICS, "read"),
    "all rows agree": (STATISTICS, "read"),
    "statistics overwritten": (STATISTICS, "read"),
    "step not counted": (TILE, r"step\) == 2"),
    "step counted without an update": (
        (test_rules.TestExactlyOnce().test_not_otherwise, TRITON, 10, "eval"),
        r"step\) == 0",
    ),
    # Random bits and what the bank can hold.
    "same bits for every seed": (BITS, ROUNDED),
    "32-bit seed": (BITS, ROUNDED),
    "32-bit step": (BITS, ROUNDED),
    "same bits each step": (BITS, ROUNDED),
    "random bits constant": (BITS, ROUNDED),
    "halves of a word alike": (BITS, ROUNDED),
    "words exchanged": (BITS, ROUNDED),
    "words exchanged where N is odd": (LONG_BITS, ROUNDED),
    "float16 rounded as bfloat16": (HALF_BITS, ROUNDED),
    "always rounded down": (BITS, ROUNDED),
    "bits of the first row for all": (BITS, ROUNDED),
    "bits begin anew in each piece": (LONG_BITS, ROUNDED),
    "subnormals rounded as others": ((test_triton.test_random_bits_of_subnormals,), ROUNDED),
    "updates not clamped": (
        (test_rules.TestSaturation().test_a_step_saturates, TRITON, 4, "nearest", F16),
        "largest",
    ),
    # Long rows.
    "piece of a long row past its end": (LONG_TILE, OUTSIDE),
    "tail of a long row skipped": (LONG_TILE, CLOSE),
    "maximum of one piece": ((*CLIMB, -1e33, "kl_reverse"), "isfinite"),
    "sums not rebased": (LONG_TILE, r"agree\(loss"),
    "entropy not rebased": (LONG_TILE, r"agree\(loss"),
    "class loss not rebased": (LONG_TILE, r"agree\(loss"),
    "class loss not rebased in kl": ((*CLIMB, 60.0, "kl"), r"agree\(loss"),
    "gaps cut at 1e33": ((*CLIMB, 1e33, "kl"), "isfinite"),
    "agreement of an earlier piece": (LONG_RULES, "found == "),
    "deviations of the last piece alone": (LONG_RULES_MSE, "class_loss"),
    "earlier labelled duplicates of long rows forgotten": (LONG_RULES, "agree"),
    "occurrences before the last but one forgotten": (LONG_RULES, "agree"),
    "long row moved by each occurrence": (LONG_RULES, "agree"),
    "update of a long row forgotten": (LONG_RULES, r"agree\(banks"),
    "bad long row moved": ((BAD_BANK, float("inf"), LONG, "kl_reverse"), "pseudo_logits"),
    # The small kernels.
    "every prediction written": ((in_any_order, 10), "predicted"),
    "labelled samples predicted": (LABELLED, OUTSIDE),
    "bad predictions not seen": (BAD_PREDICTIONS, "DID NOT RAISE"),
    "bad predictions written": (BAD_PREDICTIONS, r"\[kept\]"),
    "bad predictions not reported": (BAD_PREDICTIONS, "DID NOT RAISE"),
    "tail of a prediction not written": (BAD_PREDICTIONS, r"\[~kept\]"),
    "prediction written past the row": (BAD_PREDICTIONS, f"{OUTSIDE}|kept"),
    "predictions not clamped": ((test_triton.test_predictions_saturate, 10, F16), "torch.equal"),
    "first piece predicted alone": ((test_triton.test_predictions_saturate, LONG, F16), "torch.equal"),
    "factor ignored": (BACKWARD, "torch.equal"),
    "grad_scale left in": (BACKWARD, "torch.equal"),
    "factor 1 costs a pass": (BACKWARD, "reads"),
    "factor 1 not copied": (BACKWARD, "torch.equal"),
    "one block scaled": (BACKWARD, "torch.equal"),
    "scaled past the end": (BACKWARD, OUTSIDE),
}


@contextmanager
def kernels_of(folder: Path) -> Iterator[None]:
    """What is imported of ``r2d2fast.kernels`` comes from there."""

    def take_out() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if f"{name}.".startswith("r2d2fast.kernels.")]
        return {name: sys.modules.pop(name) for name in names}

    before = take_out()
    spec = importlib.util.spec_from_file_location(
        "r2d2fast.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["r2d2fast.kernels"] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        take_out()
        sys.modules.update(before)


def failure_of(test: Callable, *arguments: object) -> str | None:
    """The lines of our tests that a failure came through, and its message; None if there is none."""
    torch.manual_seed(0)
    try:
        test(*arguments)
    except (AssertionError, pytest.fail.Exception, InterpreterError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        return "\n".join([*(str(f.line) for f in frames if f.filename.startswith(TESTS)), str(error)])
    return None


@pytest.fixture(scope="module")
def failure_without_bug(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    folder = tmp_path_factory.mktemp("kernels")
    shutil.copytree(KERNELS, folder, dirs_exist_ok=True)

    @functools.cache
    def run(*check: object) -> str | None:
        with kernels_of(folder):
            return failure_of(*check)

    return run


@pytest.fixture(autouse=True)
def _memory_is_nan_until_it_is_written() -> Iterator[None]:
    """Else a result that was never written may be that of the run before, which was right."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _one_thread(threads: None) -> None:  # as in test_triton.py
    torch.set_num_threads(1)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, tmp_path: Path, failure_without_bug: Callable) -> None:
    check, message = BUGS[bug]
    assert failure_without_bug(*check) is None
    file, old, new = next((file, *rest) for file, patches in PATCHES.items() for name, *rest in patches if name == bug)
    shutil.copytree(KERNELS, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / file).read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} times: {old!r}"
    (tmp_path / file).write_text(text.replace(old, new))
    with kernels_of(tmp_path):
        found = failure_of(*check)
    assert re.search(message, found or ""), found


def test_every_patch_has_a_check() -> None:
    names = [name for patches in PATCHES.values() for name, _, _ in patches]
    assert len(names) == len(set(names))
    assert set(names) == set(BUGS)
