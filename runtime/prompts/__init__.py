# SPDX-License-Identifier: Apache-2.0
"""Prompts that models expect, and the turns that an instruction becomes."""
