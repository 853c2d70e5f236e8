# SPDX-License-Identifier: Apache-2.0
"""All public data sets by name."""

from starkv.errors import UsageError
from starkv.evaluation.suites.agentnet_bench import AGENTNET_BENCH
from starkv.evaluation.suites.android_control import ANDROID_CONTROL
from starkv.evaluation.suites.base import PublicSuite
from starkv.evaluation.suites.screenspot_pro import SCREENSPOT_PRO
from starkv.evaluation.suites.screenspot_v2 import SCREENSPOT_V2

SYNTHETIC_NAME = "synthetic"
"""The suite that is drawn and lies in no folder."""
SUITES = {suite.name: suite for suite in (SCREENSPOT_V2, SCREENSPOT_PRO, ANDROID_CONTROL, AGENTNET_BENCH)}


def find_suite(name: str) -> PublicSuite:
    """The data set called ``name``.

    Raises:
        UsageError: there is none.
    """
    if name not in SUITES:
        raise UsageError(f"unknown suite {name!r}; known: {', '.join(SUITES)}, {SYNTHETIC_NAME}")
    return SUITES[name]
