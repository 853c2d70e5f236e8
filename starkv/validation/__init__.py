# SPDX-License-Identifier: Apache-2.0
"""Do implementations agree? Cases, comparisons and the report that every ``starkv validate`` writes.

Needs no pydantic, so that it runs on a GPU machine with nothing but PyTorch, Triton and ONNX.
"""
