# SPDX-License-Identifier: Apache-2.0
"""Rules that say how right an answer is, from 0 to 1: pure functions, each named by what it demands."""
