# SPDX-License-Identifier: Apache-2.0
"""What a packed row carries beside its key and value."""

POSITION_BYTES = 12
"""t, h and w as int32: after eviction a row's number says nothing about them, and a packed key is turned by
them, or its bias is."""
