# SPDX-License-Identifier: Apache-2.0
"""One file per public data set: how it lies on disk, what it asks, how its figures are put together."""
