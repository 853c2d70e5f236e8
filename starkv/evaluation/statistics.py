# SPDX-License-Identifier: Apache-2.0
"""How sure a share of right answers is."""

import math


def wilson_interval(successes: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Bounds of a share at 95 % confidence (Wilson 1927).

    Args:
        successes: right answers; the sum of the grades where answers may be partly right, whose interval is
            then wider than it need be, because such grades vary less than ones that are all or nothing.
        trials: answers.
        z: standard deviations that the bounds lie away.
    """
    if not trials:
        return 0.0, 1.0
    share, spread = successes / trials, z * z / trials
    center = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / trials / 4) / (1 + spread)
    # Rounding must not push a bound out of the range of shares.
    return max(0.0, center - half), min(1.0, center + half)
