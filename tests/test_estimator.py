import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from r2d2fast import R2D2Classifier
from r2d2fast.train.trainer import Trainer
from tests.blobs import blobs, few


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


def short(**parameters):
    return R2D2Classifier(**{"max_epochs": 3, "random_state": 0} | parameters)


@pytest.fixture(scope="module")
def fitted():
    torch.set_num_threads(1)
    x, y = blobs()
    return short().fit(x, few(y))


def test_what_a_fit_has(fitted):
    x, y = blobs()
    assert fitted.classes_.tolist() == [0, 1, 2, 3]
    assert fitted.n_features_in_ == 16
    assert np.mean(fitted.transduction_ == y) > 0.95
    assert (fitted.transduction_[:16] == y[:16]).all()
    distributions = fitted.label_distributions_
    assert (distributions.shape, distributions.dtype) == ((240, 4), np.float32)
    np.testing.assert_allclose(distributions.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(distributions[:16], np.eye(4)[y[:16]])
    np.testing.assert_array_equal(fitted.classes_[distributions.argmax(1)], fitted.transduction_)
    np.testing.assert_allclose(fitted.predict_proba(x)[16:], distributions[16:], atol=1e-5)
    assert [row["stage"] for row in fitted.history_][-4:] == [1, 2, 2, 2]
    assert fitted.history_[-1].keys() > {"epoch", "lr", "train_loss", "seconds", "pseudo_confidence"}


def test_new_samples(fitted):
    x, y = blobs(seed=5)
    assert fitted.score(x, y) > 0.95
    probabilities = fitted.predict_proba(x)
    assert (probabilities.shape, probabilities.dtype) == ((240, 4), np.float64)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-12)
    np.testing.assert_array_equal(fitted.classes_[probabilities.argmax(1)], fitted.predict(x))


def test_unlabelled_samples_are_learned_from():
    """With one label a class, and much noise, the others have to help."""
    x, y = blobs(samples=800, spread=1.6)
    errors = [
        np.mean(R2D2Classifier(random_state=seed).fit(x[:n], few(y[:n], 8)).predict(x[n:]) != y[n:])
        for n in (8, 400)
        for seed in range(3)
    ]
    assert np.mean(errors[3:]) < np.mean(errors[:3]) - 0.02


@pytest.mark.parametrize(
    "given",
    [
        lambda x: x.astype(np.float16),
        lambda x: x.astype(np.float64),
        torch.from_numpy,
        lambda x: torch.from_numpy(x).half(),
        lambda x: x.tolist(),
        np.asfortranarray,
    ],
)
def test_kinds_of_x(fitted, given):
    x, y = blobs()
    fit = short().fit(given(x), few(y))
    assert np.mean(fit.transduction_ == fitted.transduction_) > 0.98
    np.testing.assert_array_equal(fit.predict(given(x))[16:], fit.transduction_[16:])


def test_mapped_x_gives_the_same_bits(fitted, tmp_path):
    x, y = blobs()
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = short().fit(mapped, few(y))
    np.testing.assert_array_equal(fit.predict_proba(mapped), fitted.predict_proba(x))


NAMES = np.array(["ant", "bee", "cat", "dog"])


class NotAvailable:
    """As pandas.NA is."""

    def __eq__(self, other):
        return self

    __ne__ = __eq__

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")


@pytest.mark.parametrize(
    ("y", "classes"),
    [
        (lambda y: np.where(y < 0, "-1", NAMES[y]), NAMES),
        (lambda y: np.where(y < 0, "-1", NAMES[y]).tolist(), NAMES),
        (lambda y: np.where(y < 0, -1, NAMES[y].astype(object)), NAMES),
        (lambda y: [None if label < 0 else str(NAMES[label]) for label in y], NAMES),
        (lambda y: np.where(y < 0, np.nan, NAMES[y].astype(object)), NAMES),  # as pandas has missing values
        (lambda y: np.where(y < 0, NotAvailable(), NAMES[y].astype(object)), NAMES),
        (lambda y: np.where(y < 0, -1, 10 * y + 3), [3, 13, 23, 33]),
        (lambda y: np.where(y < 0, -1, y).astype(np.float64), [0, 1, 2, 3]),
        (lambda y: torch.from_numpy(y), [0, 1, 2, 3]),
        (lambda y: y.astype(object), [0, 1, 2, 3]),
    ],
)
def test_kinds_of_labels(fitted, y, classes):
    x, numbers = blobs()
    fit = short().fit(x, y(few(numbers)))
    np.testing.assert_array_equal(fit.classes_, classes)
    np.testing.assert_array_equal(fit.transduction_, np.asarray(classes)[fitted.transduction_])
    np.testing.assert_array_equal(fit.predict(x), np.asarray(classes)[fitted.predict(x)])


def test_booleans_are_classes():
    x, y = blobs(classes=2)
    fit = short().fit(x, y == 1)
    assert fit.classes_.tolist() == [False, True]
    assert fit.score(x, y == 1) > 0.95


def test_everything_labelled_is_stage_1_alone():
    x, y = blobs()
    fit = short().fit(x, y)
    assert {row["stage"] for row in fit.history_} == {1}
    assert fit.score(x, y) > 0.95
    np.testing.assert_array_equal(fit.transduction_, y)
    np.testing.assert_array_equal(fit.label_distributions_, np.eye(4)[y])


@pytest.mark.parametrize("unlabelled", [1, 2, 9])
@pytest.mark.parametrize("labelled", [2, 4])
def test_tiny_data(labelled, unlabelled):
    x, y = blobs(labelled + unlabelled, classes=2)
    fit = short().fit(x, few(y, labelled))
    assert fit.transduction_.shape == y.shape
    assert {row["stage"] for row in fit.history_} == {1, 2}


@pytest.mark.parametrize("sizes", [(12,), [24]])
def test_hidden_layers(sizes):
    x, y = blobs()
    fit = short(hidden_layer_sizes=sizes).fit(x, few(y))
    assert np.mean(fit.transduction_ == y) > 0.9


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generators_alone(fitted):
    x, y = blobs()
    state = torch.get_rng_state()
    again, other = short().fit(x, few(y)), short(random_state=1).fit(x, few(y))
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(again.predict_proba(x), fitted.predict_proba(x))
    assert (other.predict_proba(x) != fitted.predict_proba(x)).any()


def test_x_and_y_are_left_alone():
    x, y = blobs()
    y = few(y)
    before = x.copy(), y.copy()
    fit = short().fit(x, y)
    fit.predict(x)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(y, before[1])


def test_a_pickled_one_predicts_the_same(fitted):
    x, _ = blobs()
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict_proba(x), fitted.predict_proba(x))
    np.testing.assert_array_equal(again.label_distributions_, fitted.label_distributions_)


def test_clone_parameters_and_repr(fitted):
    copied = clone(fitted.set_params(verbose=0))
    assert copied.get_params() == fitted.get_params()
    assert not hasattr(copied, "label_distributions_")
    with pytest.raises(NotFittedError):
        copied.predict(np.zeros((2, 16)))
    assert repr(R2D2Classifier((8,), beta=0.01)) == "R2D2Classifier(beta=0.01, hidden_layer_sizes=(8,))"


def test_in_a_pipeline_and_a_grid_search():
    x, y = blobs()
    pipeline = make_pipeline(StandardScaler(), R2D2Classifier(max_epochs=2, random_state=0))
    assert pipeline.fit(x, few(y)).score(x, y) > 0.9
    search = GridSearchCV(pipeline, {"r2d2classifier__dropout": [0.1, 0.5]}, cv=2, error_score="raise").fit(x, y)
    assert search.best_score_ > 0.9


def test_progress_is_shown_on_request(capsys):
    x, y = blobs()
    short().fit(x, few(y))
    assert capsys.readouterr().out == ""
    short(verbose=1).fit(x, few(y))
    assert "stage 2 epoch 3/3" in capsys.readouterr().out


def interrupt(monkeypatch, after):
    """Ctrl-C at a training step, in the middle of the computation."""
    step, calls = Trainer.step, []

    def interrupted(self, *arguments):
        calls.append(0)
        if len(calls) == after:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "step", interrupted)


def test_after_ctrl_c_it_is_what_it_has_learned_up_to_then(monkeypatch):
    x, y = blobs()
    for after in (1, 200, 305):
        with monkeypatch.context() as patch:
            interrupt(patch, after)
            with pytest.warns(UserWarning, match="interrupted after"):
                fit = short().fit(x, few(y))
        assert fit.transduction_.shape == y.shape
        if after > 1:
            assert fit.score(x, y) > 0.9


def test_a_failed_fit_leaves_the_one_before(fitted):
    x, y = blobs()
    fit = pickle.loads(pickle.dumps(fitted))
    with pytest.raises(ValueError, match="labels no sample"):
        fit.fit(x, np.full(len(y), -1))
    np.testing.assert_array_equal(fit.predict(x), fitted.predict(x))


def with_value(value, row=7):
    def change(x):
        x = x.copy()
        x[row, 3] = value
        return x

    return change


@pytest.mark.parametrize(
    ("change_x", "change_y", "error", "said"),
    [
        (None, lambda y: np.full_like(y, -1), ValueError, "y labels no sample: all are -1"),
        (
            None,
            lambda y: np.where(y > 0, -1, y),
            ValueError,
            "y has one class only, .*0.*: samples of 2 classes or more",
        ),
        (None, lambda y: y[:-1], ValueError, "inconsistent numbers of samples"),
        (None, lambda y: None, ValueError, "requires y to be passed"),
        (None, lambda y: y + 0.5, ValueError, "Unknown label type: continuous"),
        (None, lambda y: np.where(y < 0, np.nan, y), ValueError, "Input y contains NaN"),
        (with_value(np.nan), None, ValueError, "X has NaN in row 7, column 3"),
        (with_value(-np.inf), None, ValueError, "X has inf.* in row 7, column 3"),
        (scipy.sparse.csr_matrix, None, TypeError, "Sparse data was passed.*dense data is required"),
        (lambda x: x[0], None, ValueError, "Expected 2D array"),
        (lambda x: torch.from_numpy(x)[0], None, ValueError, r"X is a tensor of shape \[16\]; accepted: \[M, D\]"),
    ],
)
def test_what_cannot_be_fitted_is_said(change_x, change_y, error, said):
    x, y = blobs()
    x, y = (change_x or (lambda x: x))(x), (change_y or (lambda y: y))(few(y))
    with pytest.raises(error, match=said):
        short().fit(x, y)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_x_of_another_width(fitted, kind):
    with pytest.raises(ValueError, match="X has 17 features, but R2D2Classifier is expecting 16 features"):
        fitted.predict(kind(np.zeros((3, 17), np.float32)))


def test_nan_in_x_of_predict(fitted):
    with pytest.raises(ValueError, match="X has NaN in row 7, column 3"):
        fitted.predict(with_value(np.nan)(blobs()[0]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", -1), ("beta", np.nan), ("learning_rate", "high"), ("weight_decay", -0.1), ("dropout", 1),
        ("max_epochs", 0), ("max_epochs", 2.5), ("batch_size", 3), ("hidden_layer_sizes", (0,)),
        ("hidden_layer_sizes", 256), ("device", "abacus"),
    ],
)  # fmt: skip
def test_parameters_out_of_range_are_named(name, value):
    x, y = blobs()
    with pytest.raises(
        ValueError, match=f"{name} (is )?{value!r}".replace("(0,)", r"\(0,\)").replace("'abacus'", "abacus")
    ):
        short(**{name: value}).fit(x, few(y))


def test_divergence_is_an_error_with_a_way_out():
    x, y = blobs()
    with pytest.raises(RuntimeError, match=r"diverged.*lower learning_rate"):
        short(learning_rate=1e29, weight_decay=1e9).fit(x, few(y))


def test_the_package_is_imported_without_it():
    code = (
        "import sys, r2d2fast; assert 'R2D2Classifier' in r2d2fast.__all__;"
        "heavy = {'sklearn', 'torchvision', 'rich', 'r2d2fast.train', 'r2d2fast.estimator'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "import r2d2fast.train.cli; assert 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    import r2d2fast

    with pytest.raises(AttributeError, match="has no attribute 'R2D3Classifier'"):
        r2d2fast.R2D3Classifier  # noqa: B018


def test_the_readme_s_five_lines_label_the_digits():
    X, y = load_digits(return_X_y=True)
    few = np.where(np.arange(len(y)) < 50, y, -1)
    labels = R2D2Classifier(random_state=0).fit(X, few).transduction_
    assert np.mean(labels == y) > 0.8


def test_cuda_graphs_need_a_gpu():
    x, y = blobs()
    with pytest.raises(ValueError, match=r"^cuda_graphs needs a GPU; leave it out on a CPU$"):
        short(device="cpu", cuda_graphs=True).fit(x, few(y))
