# SPDX-License-Identifier: Apache-2.0
"""Names of the compression methods that an engine runs."""

FULL, STAR_KV, STREAMING_LLM, RANDOM = "full", "star_kv", "streaming_llm", "random"
SNAPKV, PYRAMIDKV, GUI_KV = "snapkv", "pyramidkv", "gui_kv"
ENGINE_METHODS = (FULL, STAR_KV, SNAPKV, PYRAMIDKV, GUI_KV, STREAMING_LLM, RANDOM)
"""Methods that need nothing but what the decoder puts out. SnapKV, PyramidKV and GUI-KV select per KV head
here; their papers' forms, per attention head, run in the PyTorch reference alone."""
