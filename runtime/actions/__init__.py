# SPDX-License-Identifier: Apache-2.0
"""Model text → typed actions → screen coordinates. Never evaluates model output."""
