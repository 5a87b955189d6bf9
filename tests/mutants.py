"""Copies of sources with a bug in them. Texts are compared token by token: where a line is broken does not matter."""

import re


def tokens(text: str) -> re.Pattern[str]:
    """Finds the tokens of ``text`` in a row, whatever white space is between them."""
    found = re.findall(r"\w+|[^\w\s]", text)
    return re.compile(r"(?<!\w)" * found[0].isidentifier() + r"\s*".join(map(re.escape, found)))


def mutate(source: str, right: str, wrong: str, times: int = 1) -> str:
    """The source with ``wrong`` in place of ``right``, which must be there so many times."""
    mutant, found = tokens(right).subn(lambda _: wrong, source)
    assert found == times, f"the source has {found} times, not {times}: {right!r}"
    return mutant
