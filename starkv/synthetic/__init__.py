# SPDX-License-Identifier: Apache-2.0
"""Synthetic GUI screens, and what can be asked about them: ground truth that anyone can draw from a seed."""
