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


def paired_interval(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    """Bounds at 95 % confidence of how two shares over the same trials differ (Newcombe 1998, method 10).

    Args:
        both: trials that both got right.
        first: that the first got right alone.
        second: that the second got right alone.
        neither: that neither got right.

    Returns:
        bounds of the first's share less the second's, from −1 to 1.
    """
    trials = both + first + second + neither
    if not trials:
        return -1.0, 1.0
    share, other = (both + first) / trials, (both + second) / trials
    low, high = wilson_interval(both + first, trials)
    other_low, other_high = wilson_interval(both + second, trials)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    agreement = float(both * neither - first * second)
    # Newcombe's correction for continuity: weak agreement counts as none.
    agreement = max(agreement - trials / 2, 0.0) if agreement > 0 else agreement
    phi = agreement / math.sqrt(margins) if margins else 0.0
    below, above, other_below, other_above = share - low, high - share, other - other_low, other_high - other
    down = below**2 - 2 * phi * below * other_above + other_above**2
    up = above**2 - 2 * phi * above * other_below + other_below**2
    difference = share - other
    return (
        max(-1.0, difference - math.sqrt(max(0.0, down))),
        min(1.0, difference + math.sqrt(max(0.0, up))),
    )
