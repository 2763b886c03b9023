"""Which problems of a training file are for validation, and in which order a split comes.

Both follow from a hash of a problem's text, so they depend on no seed, nor on the order or the size
of a file: no file's beginning is taken for the whole, as MATH's is algebra alone.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")

VALIDATION_SHARE = 0.1  # of the templates of a training file


def template(problem: str) -> str:
    """The words of a problem, each a run of letters, in lower case and with single spaces."""
    return " ".join("".join(c if c.isalpha() else " " for c in problem.casefold()).split())


def split_of(problem: str) -> str:
    """'train' or 'validation': the split of a training problem, by the hash of its template.

    Problems that differ in numbers, punctuation or case alone are always in the same split.
    """
    return "validation" if _unit_hash(template(problem)) < VALIDATION_SHARE else "train"


def side_of(problem: str) -> str:
    """The split of a problem that is drawn: of 16 one is for validation, and one for the test."""
    return {0: "test", 1: "validation"}.get(int(16 * _unit_hash(problem)), "train")


def of_split(items: Iterable[Item], split: str, problem: Callable[[Item], str]) -> list[Item]:
    """Those of the items that belong to a split, shuffled.

    items: of the training file, of which there are 'train' and 'validation', or of the test's,
    where all belong to it.
    """
    mine = [item for item in items if split == "test" or split_of(problem(item)) == split]
    return shuffled(mine, problem)


def shuffled(items: Iterable[Item], problem: Callable[[Item], str]) -> list[Item]:
    """The items in the order of the hashes of their problems' texts, so that any prefix is fair."""
    return sorted(items, key=lambda item: _unit_hash(problem(item)))


def _unit_hash(text: str) -> float:
    """A fixed number in [0, 1) for a text, uniform over texts: 53 bits of BLAKE2b."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
