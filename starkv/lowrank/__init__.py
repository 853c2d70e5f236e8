# SPDX-License-Identifier: Apache-2.0
"""Low-rank and quantized KV caches: the mathematics (STAR-KV, arXiv 2606.08382) and a numpy reference.

A low-rank cache stores a short *latent* in place of a key or value: ``latent = down · y``, ``y ≈ up ·
latent``, where y is the output of the key or value projection without its bias and before rotation.
Everything here needs numpy alone, but for ``soft_threshold`` and ``objective``, which train ranks in PyTorch.
Nothing is imported here, so that the rest stays usable without PyTorch.
"""
