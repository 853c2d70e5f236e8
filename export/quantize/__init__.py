# SPDX-License-Identifier: Apache-2.0
"""Weight quantizers: pure functions on numpy arrays."""
