# SPDX-License-Identifier: Apache-2.0
"""Int8 and int4 caches on a TensorRT engine: gui-tiny on the strict fakes, whose plugins are the references."""

PROMPTS = ("Click the red star.", "Click 'Save'.", "Click the black star.")
