# SPDX-License-Identifier: Apache-2.0
"""Many sessions on one engine."""
