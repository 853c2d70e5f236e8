# SPDX-License-Identifier: Apache-2.0
"""Which screen belongs to which split: every screen has a seed of its own, and no two splits share one."""

import numpy as np
from screens import Screen, random_screen

SPLITS = {"vision": 0, "language": 1, "validation": 2, "test": 3, "large": 4}
TRAINING_RUN = 0
"""Part of every seed; another value makes other screens of the same kind."""


def draw_screen(
    split: str, index: int, size: int, fewest: int, most: int
) -> tuple[Screen, np.random.Generator]:
    """Screen number ``index`` of a split, and the generator to draw its questions from."""
    rng = np.random.default_rng([SPLITS[split], TRAINING_RUN, index])
    return random_screen(rng, size, size, fewest, most), rng
