"""scikit-learn's own checks of an estimator: all of them with ``-m slow``, else those about what users meet first."""

import pytest
import torch
from sklearn.utils.estimator_checks import estimator_checks_generator

from r2d2fast import R2D2Classifier

EXPECTED_FAILURES = {
    "check_classifiers_classes": "its classes are -1 and 1, and -1 marks unlabelled samples, as in SelfTrainingClassifier"
}
FAST = {
    "check_do_not_raise_errors_in_init_or_set_param",
    "check_dict_unchanged",
    "check_estimators_pickle",
    "check_estimators_unfitted",
    "check_fit1d",
    "check_fit2d_1feature",
    "check_fit2d_1sample",
    "check_n_features_in",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_readonly_memmap_input",
    "check_requires_y_none",
}
CHECKS = list(
    estimator_checks_generator(
        R2D2Classifier(), expected_failed_checks=EXPECTED_FAILURES, mark="xfail", xfail_strict=True
    )
)


def _name(check):
    return getattr(check, "func", check).__name__


def _parameters():
    for parameter in CHECKS:
        estimator, check = getattr(parameter, "values", parameter)
        marks = list(getattr(parameter, "marks", ()))
        if _name(check) not in FAST:
            marks.append(pytest.mark.slow)
        # No address of a function: the processes of `pytest -n` must have the same names.
        details = [f"{name}={value}" for name, value in getattr(check, "keywords", {}).items()]
        yield pytest.param(estimator, check, marks=marks, id="-".join([_name(check), *details]))


@pytest.mark.parametrize(("estimator", "check"), list(_parameters()))
def test_scikit_learns_checks(estimator, check, threads):
    torch.set_num_threads(1)
    check(estimator)
