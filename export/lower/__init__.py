# SPDX-License-Identifier: Apache-2.0
"""Canonical graph → the dialect of one backend."""
