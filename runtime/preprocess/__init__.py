# SPDX-License-Identifier: Apache-2.0
"""Screenshot and text → model inputs, in numpy."""
