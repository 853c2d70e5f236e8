# SPDX-License-Identifier: Apache-2.0
"""Exported model → engine directory of one backend."""
