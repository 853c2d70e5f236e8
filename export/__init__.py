# SPDX-License-Identifier: Apache-2.0
"""Checkpoint → portable ONNX → engine directory. Never imports runtime; torch only in ``trace``."""
