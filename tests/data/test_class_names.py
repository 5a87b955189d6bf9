"""Names of classes and folders that may be mistakes."""

import pytest

from r2d2fast.data.class_names import means_unlabelled, similar_names


@pytest.mark.parametrize("name", ["unlabelled", "Unlabeled", "UNSUP", "un-labelled", "no_label", "no labels"])
def test_a_folder_of_images_without_labels_by_its_name(name):
    assert means_unlabelled(name)


@pytest.mark.parametrize("name", ["labelled", "unlabelled cats", "unknown", "none", "other"])
def test_a_folder_that_may_be_a_class(name):
    assert not means_unlabelled(name)


@pytest.mark.parametrize(
    ("one", "other"), [("cat", "Cat"), ("cat", "cta"), ("cat", "cats"), ("dog", "dig"), ("a", "A"), ("Golden fish", "goldenfish")]
)  # fmt: skip
def test_names_that_are_nearly_one_are_told_with_their_numbers(one, other):
    (told,) = similar_names({one: 40, "something else": 7, other: 1})
    assert told.startswith(f"classes {one!r} (40) and {other!r} (1) have nearly one name")


@pytest.mark.parametrize(
    "names", [["cat", "dog"], ["n01440764", "n01440765"], ["class 1", "class 12"], ["a", "b"], ["up", "us"], ["0", "1", "10"]]
)  # fmt: skip
def test_other_names_are_told_apart(names):
    assert similar_names(dict.fromkeys(names, 1)) == []
