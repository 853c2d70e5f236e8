# SPDX-License-Identifier: Apache-2.0
"""Weights that a checkpoint stores quantized already; their integers go into the engine unchanged."""
