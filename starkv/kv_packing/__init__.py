# SPDX-License-Identifier: Apache-2.0
"""How kept rows of a KV cache are packed: what the builder puts into an engine and the runtime packs with."""
