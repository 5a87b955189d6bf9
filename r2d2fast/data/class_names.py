"""Class names that may be mistakes: folders of unlabelled images, and names that are nearly another one."""

from collections.abc import Mapping

_UNLABELLED = frozenset(("unlabelled", "unlabeled", "unsup", "unsupervised", "nolabel", "nolabels"))
_SHORTEST = 3


def means_unlabelled(name: str) -> bool:
    """Whether a folder of this name is one of images without labels: ``unlabelled``, ``Unlabeled``, ``no_label`` …"""
    return name.lower().replace("_", "").replace("-", "").replace(" ", "") in _UNLABELLED


def similar_names(counts: Mapping[str, int]) -> list[str]:
    """A sentence for each two classes whose names differ by case, or by a letter that is another, missing, or in its neighbour's
    place.

    Names shorter than three letters are compared by case alone, and numbers in names may differ.

    Args:
        counts: labelled images by class.
    """
    others: dict[str, list[str]] = {}
    found: dict[tuple[str, str], None] = {}
    for name in counts:
        for key in _keys(name):
            for other in others.setdefault(key, []):
                found.setdefault((other, name))
            others[key].append(name)
    return [
        f"classes {one!r} ({counts[one]}) and {other!r} ({counts[other]}) have nearly one name; if they are one class, rename one"
        for one, other in found
    ]


def _keys(name: str) -> set[str]:
    """The name in small letters, and without each one of them: what is one change away from it has one of these, too."""
    small = name.lower()
    if len(small) < _SHORTEST:
        return {small}
    return {small} | {small[:place] + small[place + 1 :] for place, letter in enumerate(small) if not letter.isdigit()}
