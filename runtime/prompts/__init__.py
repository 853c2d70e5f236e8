# SPDX-License-Identifier: Apache-2.0
"""Prompts that models were trained on, and the turns that an instruction becomes."""
