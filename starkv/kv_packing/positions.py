# SPDX-License-Identifier: Apache-2.0
"""What a packed row carries beside its key and value."""

COMPONENTS = 3
"""Of a position: t, h and w."""
POSITION_BYTES = 4 * COMPONENTS
"""They are int32: after eviction a row's number says nothing about them, and a packed key is turned by
them, or its bias is."""
