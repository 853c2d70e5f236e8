# SPDX-License-Identifier: Apache-2.0
"""How texts are compared."""


def normalised(text: str) -> str:
    """A text without what typing it may change: case, and the amount of white space."""
    return " ".join(text.casefold().split())


def contains(one: str, other: str) -> bool:
    """Whether either text is part of the other, normalised. An empty text is part of an empty one only."""
    first, second = normalised(one), normalised(other)
    if not first or not second:
        return first == second
    return first in second or second in first


def similarity(one: str, other: str) -> float:
    """One minus the edits between two texts per character of the longer one; 1 for two empty texts."""
    longest = max(len(one), len(other))
    return 1.0 - edits(one, other) / longest if longest else 1.0


def edits(one: str, other: str) -> int:
    """Fewest insertions, deletions and replacements of a character that make one text of the other."""
    row = list(range(len(other) + 1))
    for done, character in enumerate(one, 1):
        diagonal, row[0] = row[0], done
        for place, wanted in enumerate(other, 1):
            replaced = diagonal + (character != wanted)
            diagonal = row[place]
            row[place] = min(replaced, row[place] + 1, row[place - 1] + 1)
    return row[-1]
