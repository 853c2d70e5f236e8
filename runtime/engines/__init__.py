# SPDX-License-Identifier: Apache-2.0
"""The ``Engine`` protocol and its backends."""
