# SPDX-License-Identifier: Apache-2.0
"""Training of low-rank KV factors by distillation from the model itself (STAR-KV, arXiv 2606.08382).

Needs PyTorch; docs/low-rank-training.md describes it. Nothing is imported here.
"""
