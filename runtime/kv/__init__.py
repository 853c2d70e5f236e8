# SPDX-License-Identifier: Apache-2.0
"""KV memory: the arena, the pools of slots, and metadata of rows."""
