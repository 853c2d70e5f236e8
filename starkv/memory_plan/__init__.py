# SPDX-License-Identifier: Apache-2.0
"""How much device memory a TensorRT engine needs, before there is one: ``starkv doctor --plan``.

Formulas over a model's sizes and nothing else. What they say of weights and KV caches is exact, of
activations a bound; the tests compare them with lowered graphs and with what the runtime allocates.
"""
