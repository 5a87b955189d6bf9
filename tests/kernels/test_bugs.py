"""Bugs planted in copies of the Triton kernels, one at a time, of the kinds that only watched memory and another order of
programs can show: accesses outside the tensors, accesses too many, results that depend on which program is last."""

import importlib.util
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from triton.runtime.errors import InterpreterError

from tests import test_rules, test_step
from tests.kernels import test_triton  # skips where there is no interpreter to run in
from tests.kernels.test_triton import LONG
from tests.mutants import mutate

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

KERNELS = Path(__file__).parents[2] / "kernels"
TRITON = "triton"


def in_any_order(classes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_triton.test_programs_may_run_in_any_order(classes, patch)


class Bug(NamedTuple):
    file: str
    right: str
    wrong: str
    check: tuple
    """A test of the kernels, and its arguments."""
    message: str


STEP = (test_step.test_indices, TRITON, torch.int64, 1)
LONG_TILE = (test_triton.test_every_tile_agrees_with_the_definition, LONG)
LABELLED = (test_rules.TestLabelledSamples().test_touch_no_row, TRITON, 10)
LONG_PASS = (test_triton.test_one_pass, LONG, "kl_reverse")
BAD_INDEX = test_rules.TestBadRows().test_an_index_out_of_range_on_a_gpu_harms_nothing_else_and_is_remembered
BACKWARD = (test_triton.test_backward_reads_and_writes_only_what_it_must, torch.bfloat16)
SATURATE = (test_triton.test_predictions_saturate, 10, torch.float16)

OUTSIDE = "memory that is of no tensor of the launch"
BUGS = {
    "rows past the batch": Bug("batch.py", "inside = position < size", "inside = position < size + 1", STEP, OUTSIDE),
    "index M": Bug("batch.py", "(sample < samples)", "(sample <= samples)", (BAD_INDEX, TRITON, 10, 20), OUTSIDE),
    "padding of the batch": Bug("step.py", "inside & valid, columns", "valid, columns", STEP, OUTSIDE),
    "the bank read for a labelled sample": Bug(
        "step.py", "mask=mask & (slot >= 0), other", "mask=mask, other", LABELLED, OUTSIDE
    ),
    "a labelled sample's row moved": Bug(
        "step.py", "mask=due & moves & sound & valid", "mask=due & sound & valid", LABELLED, OUTSIDE
    ),
    "a labelled sample's long row moved": Bug(
        "step.py", "valid & (slot >= 0) & (position", "valid & (position", LONG_PASS, OUTSIDE
    ),
    "a piece of a long row past its end": Bug(
        "step.py", "valid = due & (columns < CLASSES)", "valid = due & (columns <= CLASSES)", LONG_TILE, OUTSIDE
    ),
    "the last program in the sum": Bug(
        "step.py", "(sums / normalizer)", "(sums / normalizer + 1e-6 * tl.program_id(0))", (in_any_order, 10), "assert"
    ),
    "every prediction written": Bug(
        "predict.py", "(slot >= 0) & ~occurs_later", "(slot >= 0)", (in_any_order, 10), "assert"
    ),
    "a prediction past the row": Bug(
        "predict.py", "0) & (begin + columns < CLASSES)", "0) & (begin + columns <= CLASSES)", SATURATE, OUTSIDE
    ),
    "a factor of 1 that costs a pass": Bug("scale.py", "factor == 1", "factor == -1", BACKWARD, "reads"),
    "a gradient scaled past its end": Bug(
        "scale.py", "element_ty), mask=at < size)", "element_ty))", BACKWARD, OUTSIDE
    ),
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


def failure_of(check: Callable, *arguments: object) -> str | None:
    torch.manual_seed(0)
    try:
        check(*arguments)
    except (AssertionError, pytest.fail.Exception, InterpreterError) as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name: str, tmp_path: Path) -> None:
    bug = BUGS[name]
    shutil.copytree(KERNELS, tmp_path, dirs_exist_ok=True)
    with kernels_of(tmp_path):
        assert failure_of(*bug.check) is None
    (tmp_path / bug.file).write_text(mutate((tmp_path / bug.file).read_text(), bug.right, bug.wrong))
    with kernels_of(tmp_path):
        found = failure_of(*bug.check)
    assert re.search(bug.message, found or "", re.IGNORECASE), found
