# SPDX-License-Identifier: Apache-2.0
"""One file per model family, written like a PyTorch forward over ``export.graph``."""
