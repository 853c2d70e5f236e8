# SPDX-License-Identifier: Apache-2.0
"""The GPU implementations: Triton kernels, and the CUDA library behind its C ABI."""
